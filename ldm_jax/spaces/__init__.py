"""Gymnasium spaces as data: their leaves in canonical order, how values are carried, samples under jit, and JSON."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
