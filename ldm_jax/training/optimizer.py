"""How parameters are moved: the configuration of training, schedules of the learning rate, and the optimizers."""

from __future__ import annotations

import dataclasses
import typing

import jax
import numpy as np
import optax

from ldm_jax.errors import ConfigError, check_at_least, check_finite
from ldm_jax.model.network import Params
from ldm_jax.training.muon import scale_by_muon
from ldm_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Attributes:
      steps: optimizer steps.
      optimizer: `"adamw"`, or `"muon"` (orthogonalized momentum for the matrices, Adam for the rest; Jordan 2024).
      learning_rate: peak, of AdamW or of Muon's matrices.
      adam_learning_rate: peak, of what Muon leaves to Adam.
      schedule: what follows the warm-up: `"cosine"` to a tenth of the peak, or `"wsd"`, the peak itself and then a
        straight line to 0 (warm-up, stable, decay; Hu et al. 2024).
      warmup: steps of linear warm-up.
      decay: share of the steps that `"wsd"` decays in; the last ones.
      weight_decay: of matrices only.
      clip_norm: global gradient norm that is not exceeded.
      accumulation: pieces that a batch is worked through in, one after the other; they save memory and change nothing
        but the rounding.
      drop_previous: probability of hiding the previous action in a window.
      drawn_slots: of each kind of an action, categorical and continuous: where an action has more, the loss of a step
        looks at so many of them, drawn evenly, and its gradient is in the mean that of all. Validation looks at all.
      seed: of parameters, batches, dropping and drawing; 0 to 2**32 - 1.
    """

    steps: int = 1200
    optimizer: typing.Literal["adamw", "muon"] = "muon"
    learning_rate: float = 2e-2
    adam_learning_rate: float = 3e-3
    schedule: typing.Literal["cosine", "wsd"] = "cosine"
    warmup: int = 50
    decay: float = 0.2
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    accumulation: int = 1
    drop_previous: float = 0.2
    drawn_slots: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_finite(self)
        for name, known in (("optimizer", ("adamw", "muon")), ("schedule", ("cosine", "wsd"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected {' or '.join(known)}")
        if not 1 <= self.steps <= np.iinfo(np.int32).max:
            raise ConfigError(f"steps is {self.steps}, expected 1 to {np.iinfo(np.int32).max}")
        if not 0 <= self.warmup < self.steps:
            raise ConfigError(f"warmup is {self.warmup}, expected 0 or more and less than the {self.steps} steps")
        if self.schedule == "wsd" and not 0 < self.decay <= 1 - self.warmup / self.steps:
            raise ConfigError(
                f"decay is {self.decay} of the {self.steps} steps, expected more than 0 and no more than the "
                f"{self.warmup} steps of warm-up leave: at most {1 - self.warmup / self.steps:.3g}"
            )
        if not 0 <= self.drop_previous <= 1:
            raise ConfigError(f"drop_previous is {self.drop_previous}, expected a probability")
        check_at_least(self, {"accumulation": 1, "drawn_slots": 1})
        if not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"seed is {self.seed}, expected 0 to {(1 << 32) - 1}: keys hold no more")
        # Parameters are float32, so what is infinite there would be infinite in them.
        largest = float(np.finfo(np.float32).max)
        if not 0 <= self.weight_decay <= largest:
            raise ConfigError(f"weight_decay is {self.weight_decay}, expected 0 to {largest:.3g}")
        for name in ("learning_rate", "adam_learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) <= largest:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a positive number up to {largest:.3g}")


def is_matrix(path: tuple[typing.Any, ...]) -> bool:
    """Whether a parameter path ends at the kernel of a linear layer (its last two axes map inputs to outputs)."""
    return path[-1].key == "kernel"


def make_schedule(cfg: TrainingConfig, peak: float) -> optax.Schedule:
    """The learning rate as a function of the number of steps done.

    Args:
      cfg: shape of the schedule.
      peak: the rate after the warm-up.
    """
    if cfg.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, cfg.warmup, cfg.steps, peak / 10)
    decay = max(1, round(cfg.decay * cfg.steps))
    stages = (
        optax.linear_schedule(0.0, peak, cfg.warmup) if cfg.warmup else optax.constant_schedule(peak),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, 0.0, decay),
    )
    return optax.join_schedules(stages, (cfg.warmup, cfg.steps - decay))


def make_optimizer(cfg: TrainingConfig) -> optax.GradientTransformation:
    """Builds the gradient transformation of a configuration."""

    def matrices(params: Params) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), params)

    def labels(params: Params) -> PyTree:
        return jax.tree.map(lambda matrix: "muon" if matrix else "adam", matrices(params))

    rate = make_schedule(cfg, cfg.learning_rate)
    if cfg.optimizer == "muon":
        steps = (scale_by_muon(), optax.add_decayed_weights(cfg.weight_decay), optax.scale_by_learning_rate(rate))
        adam = optax.adamw(make_schedule(cfg, cfg.adam_learning_rate), weight_decay=0.0, nesterov=True)
        update = optax.partition({"muon": optax.chain(*steps), "adam": adam}, labels)
    else:
        update = optax.adamw(rate, weight_decay=cfg.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), update)
