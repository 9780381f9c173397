"""Cards, codecs and random windows for tests of the core, over spaces of every kind."""

import jax
import numpy as np
from gymnasium import spaces as gs

from ldm_jax import cards, spaces
from ldm_jax.encoding.actions import action_layout, denormalize, to_slots
from ldm_jax.encoding.codec import Codec
from ldm_jax.encoding.observations import observation_layout
from ldm_jax.model.network import Inputs
from ldm_jax.training.loss import Example
from ldm_jax.types import TimeStep

SPACES = {
    "vector": (gs.Box(-1, np.inf, (4,)), gs.Discrete(3)),
    "continuous": (gs.Box(-2, 2, (3,)), gs.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))),
    "category": (gs.Discrete(700, start=-3), gs.MultiDiscrete([2, 5])),
    "grid": (gs.Box(0, 1, (10, 7, 4)), gs.MultiBinary(3)),
    "mixed": (
        gs.Dict(
            image=gs.Box(0, 255, (7, 7, 3), np.uint8), facing=gs.Discrete(4), mission=gs.Text(12), at=gs.Box(0, 9, (2,))
        ),
        gs.Tuple([gs.Discrete(4), gs.Box(-1, 1, (1,))]),
    ),
    "image": (gs.Box(0, 255, (3, 20, 30), np.uint8), gs.Discrete(5)),
}
"""Observation and action spaces by name."""


def make_card(observation_space, action_space, name="test/Some-v0"):
    """A card with plain statistics and a reference better than random."""
    numbers = observation_layout(observation_space).numbers
    slots = action_layout(action_space, low=-1.0, high=1.0).continuous
    statistics = cards.Statistics((0.1,) * numbers, (2.0,) * numbers, 0.5, (-1.0,) * slots, (1.0,) * slots, 1000)
    rng = np.random.default_rng(0)
    return cards.EnvironmentCard(
        id=name,
        library="test",
        version="1",
        domain="test",
        observation_space=observation_space,
        action_space=action_space,
        time_limit=10,
        statistics=statistics,
        random_returns=cards.Returns.of(rng.normal(0, 1, (8, 2))),
        reference_returns=cards.Returns.of(rng.normal(10, 1, (8, 2))),
        reference=cards.Reference(algorithm="none", decoding="greedy", budget_steps=0, seed=0),
    )


def make_codec(name):
    """The codec of one of `SPACES`."""
    return Codec(make_card(*SPACES[name], name=f"test/{name}"))


def random_tree(space, lead, rng):
    """Uniform values of a space, bounded where it is not."""
    values = []
    for leaf in spaces.leaves(space):
        struct = spaces.leaf_shape_dtype(leaf.space)
        shape = (*lead, *struct.shape)
        if isinstance(leaf.space, gs.Box):
            low, high = spaces.bounds(leaf.space)
            low = np.where(np.isfinite(low), low, np.minimum(high, 0) - 5)
            value = rng.uniform(low, np.minimum(high, low + 300), shape)
        elif isinstance(leaf.space, gs.Text):
            value = rng.integers(97, 123, shape)
        else:
            sizes = np.array(spaces.choices(leaf.space)).reshape(struct.shape)
            value = rng.integers(0, sizes, shape) + spaces.first_value(leaf.space)
        values.append(np.asarray(value).astype(struct.dtype))
    return spaces.unflatten(space, values)


def random_stream(codec, steps, seed, episode=5):
    """A stream by leaf name, as the trajectory store holds it: `[T, ...]`, episodes of about `episode` steps."""
    rng = np.random.default_rng(seed)
    card = codec.card
    ends = rng.random(steps) < 1 / episode
    truncated = ends & (rng.random(steps) < 0.5)
    first = np.concatenate([[True], ends[:-1]])
    ends &= ~first
    truncated &= ends
    first = np.concatenate([[True], ends[:-1]])
    arrays = {
        "reward": np.where(first, 0, rng.normal(0, 1, steps)).astype(np.float32),
        "terminated": ends & ~truncated,
        "truncated": truncated,
        "first": first,
        "label_mask": ~ends,
    }
    trees = {"observation": card.observation_space, "action": card.action_space, "reference_action": card.action_space}
    for prefix, space in trees.items():
        tree = random_tree(space, (steps,), rng)
        arrays |= {f"{prefix}/{leaf.name}": spaces.get(tree, leaf.path) for leaf in spaces.leaves(space)}
    layout = codec.action_layout
    if layout.flat_choices:
        arrays["reference/logits"] = rng.normal(0, 1, (steps, layout.flat_choices)).astype(np.float16)
        if layout.continuous:  # points at the label
            arrays["reference/mean"] = denormalize(layout, to_slots(layout, tree).continuous)
            arrays["reference/scale"] = np.zeros((steps, layout.continuous), np.float32)
    return arrays


def random_params(model, seed=0):
    """Parameters of about the size of fresh ones, drawn without compiling anything; no scale is 1, no bias 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "scale":
            return rng.uniform(0.7, 1.3, leaf.shape).astype(np.float32)
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else leaf.shape[-1]
        return (rng.normal(0, 1, leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


def stack(trees):
    """Stacks pytrees on a new first axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def random_example(codec, rows, steps, seed, index=0):
    """A training example of random windows."""
    windows = [codec.window(random_stream(codec, steps, 1000 * seed + row)) for row in range(rows)]
    features, targets = stack(windows)
    return Example(Inputs(features, stack([codec.signature] * rows)), targets, np.full(rows, index, np.int32))


def random_batch(names, rows, steps, seed):
    """One example per named space."""
    codecs = [make_codec(name) for name in names]
    return {codec.bucket.name: random_example(codec, rows, steps, seed, i) for i, codec in enumerate(codecs)}


def timestep_at(codec, arrays, t):
    """Time step t of some streams, `[B, ...]`, from `random_stream` arrays stacked to `[B, T, ...]`."""
    space = codec.card.observation_space
    observation = spaces.unflatten(space, [arrays[f"observation/{leaf.name}"][:, t] for leaf in spaces.leaves(space)])
    flags = {name: arrays[name][:, t] for name in ("reward", "terminated", "truncated", "first")}
    return TimeStep(observation=observation, **flags)
