"""What proximal policy optimization minimizes, and the settings of it.

Source: Schulman et al. 2017 (PPO); Schulman et al. 2016 (generalized advantage estimation).
"""

from __future__ import annotations

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.encoding.actions import ActionLayout, Slots
from ldm_jax.errors import ConfigError
from ldm_jax.types import Array, PyTree

from .hyperparameters import Hyperparameters, check_hyperparameters, check_minibatches
from .learning import average, blank
from .memory import ActorCritic
from .moments import Moments
from .policy import choice_logits


@dataclasses.dataclass(frozen=True)
class PPOConfig(Hyperparameters):
    """Hyperparameters; the defaults do for most small environments.

    Attributes:
      budget_steps: environment steps of training, over all parallel environments.
      num_envs: parallel environments.
      rollout_length: steps of a rollout in each environment.
      learning_rate: of Adam, falling linearly to 0.
      discount: gamma.
      gae_lambda: lambda of the advantage estimation.
      epochs: passes over a rollout.
      minibatches: per pass; divides num_envs times rollout_length.
      clip_eps: how far the probability ratio may go from 1 before the objective stops rewarding it.
      entropy_coef: weight of the entropy bonus.
      value_coef: weight of the value loss.
      max_gradient_norm: of the whole gradient.
      hidden: widths of the hidden layers of policy and value.
      activation: a name in `jax.nn`.
      convolved: whether small grids are seen through convolutions, and not number by number.
      initial_std: initial standard deviation of continuous slots, in half ranges.
      learn_std: whether it is trained.
      noise_correlation: of the exploration noise of continuous slots from step to step, 0 (white) to below 1.
      action_scale: how far actions reach in dimensions that declare no bounds, see `action_range.limits`; 0: it is
        found by trying, before training.
      memory: width of what policy and value remember of the episode; 0: they see the observation alone.
      sequence_length: steps that learning goes back through memory at once; divides rollout_length.
    """

    traced = (
        "learning_rate",
        "discount",
        "gae_lambda",
        "clip_eps",
        "entropy_coef",
        "value_coef",
        "max_gradient_norm",
        "learn_std",
        "noise_correlation",
    )

    budget_steps: int = 500_000
    num_envs: int = 64
    rollout_length: int = 128
    learning_rate: float = 1e-3
    discount: float = 0.99
    gae_lambda: float = 0.95
    epochs: int = 4
    minibatches: int = 8
    clip_eps: float = 0.2
    entropy_coef: float = 0.01
    value_coef: float = 0.5
    max_gradient_norm: float = 0.5
    hidden: tuple[int, ...] = (64, 64)
    activation: str = "tanh"
    convolved: bool = False
    initial_std: float = 1.0
    learn_std: bool = True
    noise_correlation: float = 0.0
    action_scale: float = 0.0
    memory: int = 0
    sequence_length: int = 32

    def __post_init__(self) -> None:
        check_hyperparameters(
            self,
            whole=("budget_steps", "num_envs", "rollout_length", "epochs", "minibatches", "sequence_length"),
            positive=("learning_rate", "clip_eps", "max_gradient_norm", "initial_std"),
            not_negative=("entropy_coef", "value_coef", "action_scale", "memory"),
            shares=("discount", "gae_lambda", "noise_correlation"),
        )
        if self.memory != int(self.memory) or self.noise_correlation == 1:
            raise ConfigError(
                f"memory is {self.memory} and noise_correlation {self.noise_correlation}, expected a whole number and "
                "less than 1"
            )
        if not callable(getattr(jax.nn, self.activation, None)):
            raise ConfigError(f"activation is {self.activation!r}, expected a name in jax.nn")
        length = self.sequence_length if self.memory else 1
        if self.rollout_length % length:
            raise ConfigError(
                f"a rollout of {self.rollout_length} steps does not split into sequences, sequence_length is {length}"
            )
        check_minibatches(self.num_envs * (self.rollout_length // length), self.minibatches)


@dataclasses.dataclass(frozen=True)
class RecurrentPPOConfig(PPOConfig):
    """The same with a memory, for environments whose observation hides something."""

    budget_steps: int = 1_000_000
    memory: int = 64


def advantages(
    value: Array, reward: Array, terminated: Array, truncated: Array, discount: float, gae_lambda: float
) -> tuple[Array, Array]:
    """Generalized advantages under next-step reset.

    A termination cuts the value after it; a truncation does not, and its last observation is there to be valued. The
    action at the end of an episode was ignored, so it has no advantage and what it met counts nowhere.

    Args:
      value: `float32 [T + 1, B]`, of the observations.
      reward: `float32 [T + 1, B]`, earned on the way to them.
      terminated: `bool [T + 1, B]`.
      truncated: `bool [T + 1, B]`.
      discount: gamma.
      gae_lambda: lambda.

    Returns:
      Advantages `float32 [T, B]`, 0 where not valid, and `bool [T, B]`, whether the action counts.

    Source: Schulman et al. 2016, equation 16.
    """
    last = terminated | truncated
    valid = ~last[:-1]
    after = jnp.where(terminated[1:], 0.0, value[1:])
    error = jnp.where(valid, reward[1:] + discount * after - value[:-1], 0.0)

    def back(advantage: jax.Array, now: tuple[jax.Array, Array, Array]) -> tuple[jax.Array, jax.Array]:
        error, valid, ends = now
        advantage = jnp.where(valid, error + discount * gae_lambda * jnp.where(ends, 0.0, advantage), 0.0)
        return advantage, advantage

    _, result = jax.lax.scan(back, jnp.zeros_like(value[0]), (error, valid, last[1:]), reverse=True)
    return result, valid


class Batch(typing.NamedTuple):
    """N steps to learn from, or N sequences of L where the model remembers: then `[N, L]` for `[N]`; a pytree.

    Attributes:
      seen: what the model sees, each leaf `[N, ...]`.
      action_mask: `bool [N, M]` or None.
      slots: what was sampled.
      log_prob: `float32 [N]`, of it, when acting.
      advantage: `float32 [N]`.
      target: `float32 [N]`, of the value.
      valid: `bool [N]`; the other rows count for nothing, whatever they hold.
      first: `bool [N]`, whether an episode begins.
      memory: before the step, or before the first of a sequence; each leaf `[N, ...]`.
    """

    seen: PyTree
    action_mask: Array | None
    slots: Slots
    log_prob: Array
    advantage: Array
    target: Array
    valid: Array
    first: Array | None = None
    memory: PyTree = ()


def loss(
    params: PyTree,
    config: PPOConfig,
    layout: ActionLayout,
    model: ActorCritic,
    moments: Moments,
    batch: Batch,
) -> Array:
    """The clipped objective, with value loss and entropy bonus, averaged over the valid steps."""
    valid, first, memory = batch.valid, batch.first, batch.memory
    batch = blank(valid, batch._replace(first=None, memory=()))
    logits, mean, value = model.unroll(params["perceptrons"], moments, memory, batch.seen, batch.action_mask, first)
    log_std = jnp.where(config.learn_std, params["log_std"], jax.lax.stop_gradient(params["log_std"]))
    log_prob, entropy = log_prob_and_entropy(layout, batch.slots, logits, mean, log_std)

    centered = batch.advantage - average(valid, batch.advantage)
    advantage = centered / (jnp.sqrt(average(valid, centered**2)) + 1e-8)  # rewards came normalized: 1 is their unit
    ratio = jnp.exp(jnp.where(valid, log_prob - batch.log_prob, 0.0))
    clipped = jnp.clip(ratio, 1 - config.clip_eps, 1 + config.clip_eps)
    objective = jnp.minimum(ratio * advantage, clipped * advantage)
    value_loss = 0.5 * (value - batch.target) ** 2
    return average(valid, -objective + config.value_coef * value_loss - config.entropy_coef * entropy)


def log_prob_and_entropy(
    layout: ActionLayout, slots: Slots, logits: Array, mean: Array, log_std: Array
) -> tuple[Array, Array]:
    """Log-probability of the slots and entropy of the distribution, `[N]` each, summed over slots."""
    choices = choice_logits(layout, logits)
    chosen = jnp.take_along_axis(choices, slots.categorical[..., None], -1)[..., 0]
    whitened = (slots.continuous - mean) * jnp.exp(-log_std)
    constant = 0.5 * np.log(2 * np.pi)
    log_prob = chosen.sum(-1) - (0.5 * whitened**2 + log_std + constant).sum(-1)
    entropy = -(jnp.exp(choices) * choices).sum((-2, -1)) + (log_std + constant + 0.5).sum()
    return log_prob, entropy
