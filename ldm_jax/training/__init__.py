"""Training: the loss, the step, the loop around it, and what they cost and report."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
