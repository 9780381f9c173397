"""ldm_jax: one transformer policy for thousands of reinforcement-learning environments."""

import importlib
import typing

if typing.TYPE_CHECKING:
    from ldm_jax.cards import EnvironmentCard
    from ldm_jax.config import SIZES, ModelConfig
    from ldm_jax.model import Model, make_model
    from ldm_jax.policy import Policy, load, save
    from ldm_jax.types import Agent, EnvironmentSpec, TimeStep

__version__ = "0.1.0"

_HOMES = {
    "Agent": "types",
    "EnvironmentCard": "cards",
    "EnvironmentSpec": "types",
    "Model": "model",
    "ModelConfig": "config",
    "Policy": "policy",
    "SIZES": "config",
    "TimeStep": "types",
    "load": "policy",
    "make_model": "model",
    "save": "policy",
}

__all__ = [
    "SIZES",
    "Agent",
    "EnvironmentCard",
    "EnvironmentSpec",
    "Model",
    "ModelConfig",
    "Policy",
    "TimeStep",
    "load",
    "make_model",
    "save",
]


def __getattr__(name: str) -> typing.Any:
    # Imported on first use: flax and orbax take longer to import than jax.
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ldm_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
