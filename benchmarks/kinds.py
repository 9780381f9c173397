"""Batches of one kind of space each, through the real codec, to see what each kind costs."""

from __future__ import annotations

import gymnasium
import jax
import numpy as np
from gymnasium import spaces as gs

from ldm_jax import cards, spaces
from ldm_jax.encoding.actions import Distribution, action_layout
from ldm_jax.encoding.codec import Codec
from ldm_jax.encoding.observations import observation_layout
from ldm_jax.encoding.transition import Transition, to_leaves
from ldm_jax.model.network import Inputs
from ldm_jax.training.loss import Example
from ldm_jax.types import TimeStep

_NUMBERS, _CHOICES = gs.Box(-np.inf, np.inf, (4,)), gs.Discrete(3)

PLAIN = "plain"
KINDS: dict[str, tuple[gymnasium.Space, gymnasium.Space]] = {
    PLAIN: (_NUMBERS, _CHOICES),
    "grid 10x10x4": (gs.Box(0, 1, (10, 10, 4)), _CHOICES),
    "grid 7x7x3": (gs.Box(0, 255, (7, 7, 3), np.uint8), _CHOICES),
    "image 84x84x4": (gs.Box(0, 255, (84, 84, 4), np.uint8), _CHOICES),
    "image 64x64x3": (gs.Box(0, 255, (64, 64, 3), np.uint8), _CHOICES),
    "text": (gs.Text(100), _CHOICES),
    "64 categories": (gs.MultiDiscrete([10] * 64), _CHOICES),
    "4672 choices": (_NUMBERS, gs.Discrete(4672)),
    "39 slots": (_NUMBERS, gs.Box(-1, 1, (39,))),
    "290 slots": (_NUMBERS, gs.Box(-1, 1, (290,))),
    "MultiDiscrete": (_NUMBERS, gs.MultiDiscrete([5] * 10)),
}
"""Observation and action spaces by name; the first is what the others are compared with."""


def make_codec(observation_space: gymnasium.Space, action_space: gymnasium.Space, name: str) -> Codec:
    """The codec of an environment of these spaces, with plain statistics."""
    numbers = observation_layout(observation_space).numbers
    slots = action_layout(action_space, low=-1.0, high=1.0).continuous
    returns = cards.Returns.of(np.zeros((1, 1)))
    card = cards.EnvironmentCard(
        id=f"benchmark/{name}",
        library="benchmark",
        version="1",
        domain="benchmark",
        observation_space=observation_space,
        action_space=action_space,
        time_limit=1000,
        statistics=cards.Statistics((0.0,) * numbers, (1.0,) * numbers, 1.0, (-1.0,) * slots, (1.0,) * slots, 1),
        random_returns=returns,
        reference_returns=returns,
        reference=cards.Reference("none", "sample", 0, 0),
    )
    return Codec(card)


def make_example(codec: Codec, rows: int, steps: int) -> Example:
    """Windows of random observations, actions and labels of an environment."""
    features, targets = codec.window(_random_leaves(codec, rows * steps))
    # One long window cut into rows: only its first step has no previous action.
    cut = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(rows, steps, *leaf.shape[1:]), (features, targets))
    signature = jax.tree.map(lambda leaf: np.stack([leaf] * rows), codec.signature)
    return Example(Inputs(cut[0], signature), cut[1], np.zeros(rows, np.int32))


def _random_leaves(codec: Codec, steps: int) -> dict[str, np.ndarray]:
    card, rng = codec.card, np.random.default_rng(0)
    observation_key, action_key, label_key = jax.random.split(jax.random.key(0), 3)

    def flags(*, value: bool) -> np.ndarray:
        return np.full(steps, value)

    observed = _random_texts(rng, steps, card.observation_space)
    if observed is None:
        observed = spaces.sample(observation_key, card.observation_space, steps)
    reward = rng.normal(size=steps).astype(np.float32)
    layout = codec.action_layout
    distribution = Distribution(
        rng.normal(size=(steps, layout.flat_choices)).astype(np.float16),
        rng.uniform(-1, 1, (steps, layout.continuous)).astype(np.float32),
        np.full((steps, layout.continuous), 0.1, np.float32),
    )
    action, label = (spaces.sample(key, card.action_space, steps) for key in (action_key, label_key))
    timestep = TimeStep(
        observation=observed,
        reward=reward,
        terminated=flags(value=False),
        truncated=flags(value=False),
        first=np.arange(steps) == 0,
    )
    transition = Transition(timestep, action, label, distribution, flags(value=True))
    transition = jax.tree.map(np.asarray, transition)
    return to_leaves(card.observation_space, card.action_space, transition)


def _random_texts(rng: np.random.Generator, steps: int, space: gymnasium.Space) -> np.ndarray | None:
    """Letters and blanks, of any length up to the longest; another text at every step."""
    if not isinstance(space, gs.Text):
        return None
    longest = spaces.leaf_shape_dtype(space).shape[0]
    letters = rng.choice(np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", np.uint8), (steps, longest))
    return np.where(np.arange(longest) < rng.integers(1, space.max_length + 1, (steps, 1)), letters, 0).astype(np.uint8)
