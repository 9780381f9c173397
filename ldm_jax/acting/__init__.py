"""Acting with a model: in one environment, and in rows of many as one batch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
