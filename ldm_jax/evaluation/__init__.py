"""How good a policy is: scores, aggregates over environments, and the scaling law."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
