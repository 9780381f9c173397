"""Libraries in interpreters of their own: virtual environments and containers, on one protocol.

Each public name is loaded when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
