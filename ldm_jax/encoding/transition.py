"""The stored step: names, dtypes and shapes of everything that is kept of one time step, from the spaces alone.

Collection writes by this schema, the codec and the store's checks read by it. A leaf `[..., *shape]` of the schema has
the same leading axes as all others of its transition: `[T, B]` in the store, `[T]` in a training window.

    observation/<leaf>        what the agent saw; `<leaf>` is `ldm_jax.spaces.Leaf.name`
    reward, terminated, truncated, first
    action_mask               where the environment has one
    action/<leaf>             what was executed, clipped to the space
    reference_action/<leaf>   the label: what the reference would do, whatever was executed
    reference/logits          its log-probabilities over the flat choices, `NOT_ALLOWED_FLOAT16` where not allowed
    reference/mean, reference/scale   of its continuous slots, in the action space's units
    label_mask                false on the last step of an episode, whose action is ignored, and where the reference, an
                              expert, had no answer: there `reference_action` is any action of the space
"""

from __future__ import annotations

import collections.abc
import typing

import gymnasium
import jax
import numpy as np

from ldm_jax.encoding.actions import Distribution, action_layout
from ldm_jax.spaces import SpaceError, get, leaf_shape_dtype, leaves, unflatten
from ldm_jax.types import Array, PyTree, TimeStep


class Transition(typing.NamedTuple):
    """One stored step, or any number of them; a pytree.

    Attributes:
      timestep: what the agent acted on.
      action: `[..., leaf shape]`, what was executed.
      reference_action: `[..., leaf shape]`, the label.
      distribution: the reference's, a part with no slots left out of the leaves; None where none was stored.
      label_mask: `bool [...]`, where there is a label.
    """

    timestep: TimeStep
    action: PyTree
    reference_action: PyTree
    distribution: Distribution | None
    label_mask: Array


def transition_schema(
    observation_space: gymnasium.Space, action_space: gymnasium.Space, *, masked: bool, distribution: bool = True
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, without leading axes, and dtype of every leaf by name.

    Args:
      observation_space: of one environment.
      action_space: of one environment.
      masked: whether time steps have an action mask.
      distribution: whether the reference's distribution is stored.

    Raises:
      SpaceError: a space that is not supported.
    """
    layout = action_layout(action_space, low=-1.0, high=1.0)  # only counted

    def struct(dtype: typing.Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    schema = {f"observation/{leaf.name}": leaf_shape_dtype(leaf.space) for leaf in leaves(observation_space)}
    schema["reward"] = struct(np.float32)
    schema |= {name: struct(np.bool_) for name in ("terminated", "truncated", "first")}
    if masked:
        schema["action_mask"] = struct(np.bool_, layout.flat_choices)
    for prefix in ("action", "reference_action"):
        schema |= {f"{prefix}/{leaf.name}": leaf_shape_dtype(leaf.space) for leaf in leaves(action_space)}
    if distribution and layout.categorical:
        schema["reference/logits"] = struct(np.float16, layout.flat_choices)
    if distribution and layout.continuous:
        schema |= {f"reference/{name}": struct(np.float32, layout.continuous) for name in ("mean", "scale")}
    schema["label_mask"] = struct(np.bool_)
    return schema


def to_leaves(
    observation_space: gymnasium.Space, action_space: gymnasium.Space, transition: Transition
) -> dict[str, Array]:
    """The leaves of transitions by name, each in the dtype of the schema; `from_leaves` is the inverse."""
    timestep, distribution = transition.timestep, transition.distribution
    found = _named("observation", observation_space, timestep.observation)
    found |= {name: getattr(timestep, name) for name in ("reward", "terminated", "truncated", "first")}
    if timestep.action_mask is not None:
        found["action_mask"] = timestep.action_mask
    found |= _named("action", action_space, transition.action)
    found |= _named("reference_action", action_space, transition.reference_action)
    if distribution is not None:
        found |= {f"reference/{name}": getattr(distribution, name) for name in Distribution._fields}
    found["label_mask"] = transition.label_mask
    schema = transition_schema(
        observation_space,
        action_space,
        masked=timestep.action_mask is not None,
        distribution=distribution is not None,
    )
    return {name: found[name].astype(struct.dtype) for name, struct in schema.items()}


def from_leaves(
    observation_space: gymnasium.Space, action_space: gymnasium.Space, arrays: collections.abc.Mapping[str, Array]
) -> Transition:
    """Transitions from their leaves.

    Args:
      observation_space: that they were written with.
      action_space: that they were written with.
      arrays: by name; all of `reference/*` may be missing, and `action_mask`.

    Raises:
      KeyError: any other leaf is missing; see `check_leaves`.
    """
    mask, distribution = arrays["label_mask"], None
    if any(name.startswith("reference/") for name in arrays):
        acted = [leaf.space for leaf in leaves(action_space) if 0 not in leaf.space.shape]
        boxes = [isinstance(space, gymnasium.spaces.Box) for space in acted]
        stored = {"logits": not all(boxes), "mean": any(boxes), "scale": any(boxes)}
        nothing = np.zeros((*mask.shape, 0), np.float32)
        distribution = Distribution(
            **{name: arrays[f"reference/{name}"] if has else nothing for name, has in stored.items()}
        )
    return Transition(
        timestep=TimeStep(
            observation=_tree("observation", observation_space, arrays),
            reward=arrays["reward"],
            terminated=arrays["terminated"],
            truncated=arrays["truncated"],
            first=arrays["first"],
            action_mask=arrays.get("action_mask"),
        ),
        action=_tree("action", action_space, arrays),
        reference_action=_tree("reference_action", action_space, arrays),
        distribution=distribution,
        label_mask=mask,
    )


def check_leaves(
    observation_space: gymnasium.Space,
    action_space: gymnasium.Space,
    shapes: collections.abc.Mapping[str, tuple[tuple[int, ...], np.dtype]],
    what: str,
) -> None:
    """Checks that leaves are those of the schema.

    Args:
      observation_space: of the environment's card.
      action_space: of the environment's card.
      shapes: shape without leading axes, and dtype, of each leaf that is there.
      what: whose they are, for the error.

    Raises:
      SpaceError: names every leaf that is missing, too many, or of another shape or dtype.
    """
    masked = "action_mask" in shapes
    distribution = any(name.startswith("reference/") for name in shapes)
    schema = transition_schema(observation_space, action_space, masked=masked, distribution=distribution)
    wrong = []
    for name in sorted({*schema, *shapes}):
        expected = f"{schema[name].dtype}{list(schema[name].shape)}" if name in schema else "no such leaf"
        found = f"{np.dtype(shapes[name][1])}{list(shapes[name][0])}" if name in shapes else "nothing"
        if expected != found:
            wrong.append(f"{name} is {found}, expected {expected}")
    if wrong:
        raise SpaceError(f"the leaves of {what} are not those of its spaces: {'; '.join(wrong)}")


def _named(prefix: str, space: gymnasium.Space, tree: PyTree) -> dict[str, Array]:
    return {f"{prefix}/{leaf.name}": get(tree, leaf.path) for leaf in leaves(space)}


def _tree(prefix: str, space: gymnasium.Space, arrays: collections.abc.Mapping[str, Array]) -> PyTree:
    return unflatten(space, [arrays[f"{prefix}/{leaf.name}"] for leaf in leaves(space)])
