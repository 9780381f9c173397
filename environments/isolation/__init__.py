"""Libraries in interpreters of their own: virtual environments and containers, on one protocol."""
