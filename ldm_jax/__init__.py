"""ldm_jax: one transformer policy for thousands of reinforcement-learning environments."""

import lazy_loader

__version__ = "0.2.0"

# Loaded when first used: flax and orbax take longer to import than jax.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
