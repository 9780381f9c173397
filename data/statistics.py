"""What standardizes an environment's data, measured on it."""

from __future__ import annotations

import collections.abc

import numpy as np

from ldm_jax import spaces
from ldm_jax.cards import Statistics
from ldm_jax.encoding.actions import ActionLayout, action_layout, denormalize, to_slots
from ldm_jax.encoding.observations import numeric_vector, observation_layout
from ldm_jax.measuring import floored_deviation
from ldm_jax.types import EnvironmentSpec, PyTree


def measure(spec: EnvironmentSpec, leaves: dict[str, np.ndarray], outside: int = 0) -> Statistics:
    """Measures what standardizes an environment's data.

    Everything follows the unit of what is measured. Deviations are floored, see `floored_deviation`; the scale of
    rewards that are all 0 is 1.

    Args:
      spec: the environment's.
      leaves: `[T, B, ...]` by name, as `collect` makes them.
      outside: the number of observations outside their declared bounds.

    Returns:
      The statistics.
    """
    layout, steps = observation_layout(spec.observation_space), leaves["reward"].size
    mean = std = np.zeros(0)
    if layout.numbers:
        numbers = np.asarray(numeric_vector(layout, _observation(spec, leaves))).reshape(-1, layout.numbers)
        mean = numbers.mean(0, np.float64)
        std = np.sqrt(sum(((block - mean) ** 2).sum(0) for block in _blocks(numbers)) / steps)
        std = floored_deviation(std, mean, numbers.min(0), numbers.max(0))
    reward = leaves["reward"][leaves["reward"] != 0].astype(np.float64)
    actions = action_layout(spec.action_space, low=-1.0, high=1.0)
    executed = _continuous(actions, spec, leaves).reshape(steps, actions.continuous)
    return Statistics(
        observation_mean=tuple(mean.tolist()),
        observation_std=tuple(std.tolist()),
        reward_scale=float(np.sqrt((reward**2).mean())) if reward.size else 1.0,
        action_low=tuple(executed.min(0).tolist()),
        action_high=tuple(executed.max(0).tolist()),
        steps=steps,
        outside=outside,
        masked="action_mask" in leaves,
        unlabelled=int((~(leaves["label_mask"] | leaves["terminated"] | leaves["truncated"])).sum()),
    )


def _observation(spec: EnvironmentSpec, leaves: dict[str, np.ndarray]) -> PyTree:
    names = [f"observation/{leaf.name}" for leaf in spaces.leaves(spec.observation_space)]
    return spaces.unflatten(spec.observation_space, [leaves[name] for name in names])


def _continuous(layout: ActionLayout, spec: EnvironmentSpec, leaves: dict[str, np.ndarray]) -> np.ndarray:
    values = [leaves[f"action/{leaf.name}"] for leaf in spaces.leaves(spec.action_space)]
    slots = to_slots(layout, spaces.unflatten(spec.action_space, values))
    return np.asarray(denormalize(layout, slots.continuous))


def _blocks(array: np.ndarray, size: int = 2**16) -> collections.abc.Iterator[np.ndarray]:
    # float64 copies of a block at a time: the whole would double the memory
    for begin in range(0, len(array), size):
        yield array[begin : begin + size].astype(np.float64)
