"""ldm_jax: one transformer policy for thousands of reinforcement-learning environments."""

__version__ = "0.1.0"
