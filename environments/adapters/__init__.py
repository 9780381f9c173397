"""Adapters: each file imports one foreign library, when its first environment is made."""
