"""Spaces as arrays: what a time step and an action are to the model, and back."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
