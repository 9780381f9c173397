"""Craftax and Craftax-Classic: open-ended survival in JAX, by symbols or by pixels.

The symbols come as one vector of thousands of zeros and ones. Here the map is what that vector spells: for each cell
the number of its block, of its item, of the creature of each class, and whether it is lit; 0 where there is none or
nothing can be seen. What is carried and felt stays a vector. Pixels are bytes. Nothing is lost by either.

The first use of a pixel environment after installing draws its textures, for a minute, into the library's own folder.
"""

from __future__ import annotations

import itertools
import types
import typing

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.types import Array, PyTree

from ..jittable import JittableEnvironment, Outcome, box, check_installed, in_32_bits, make_spec, quiet

LIBRARY = "craftax"

_IDS = ("Craftax-Symbolic-v1", "Craftax-Pixels-v1", "Craftax-Classic-Symbolic-v1", "Craftax-Classic-Pixels-v1")
_REFUSED = types.MappingProxyType(
    {name.replace("-v1", "-AutoReset-v1"): f"it is {name}, and resets are made here" for name in _IDS}
)


class _Layout(typing.NamedTuple):
    """How the vector of symbols spells the map.

    Attributes:
      size: rows and columns.
      parts: the lengths of the one-hot parts of each cell.
    """

    size: tuple[int, int]
    parts: tuple[int, ...]


def candidates() -> dict[str, str]:
    """Craftax's own ids, each with the reason why it is not offered, empty where it is."""
    check_installed(LIBRARY)
    return dict.fromkeys(_IDS, "") | _REFUSED


def domain(name: str) -> str:
    """What the task of an id is about."""
    return "games"


@in_32_bits()
def make(name: str, batch_size: int, time_limit: int | None) -> JittableEnvironment:
    """Makes B environments by craftax's own id; None keeps its time limit (10,000 steps, 100,000 where not classic)."""
    from craftax import craftax_env

    with quiet():
        inner = craftax_env.make_craftax_env_from_name(name, auto_reset=False)
    limit = time_limit or int(inner.default_params.max_timesteps)
    # The library calls its time limit a terminal end: its own lies one step behind the one that is kept here.
    params = inner.default_params.replace(max_timesteps=limit + 1)
    layout = _layout(name)

    def shown(observation: Array) -> PyTree:
        return jnp.round(observation * 255).astype(jnp.uint8) if layout is None else _spelled(observation, layout)

    def reset(key: Array) -> Outcome:
        observation, state = inner.reset_env(key, params)
        return Outcome(state, shown(observation))

    def step(key: Array, state: PyTree, action: PyTree) -> Outcome:
        observation, state, reward, terminated, _ = inner.step_env(key, state, action, params)
        return Outcome(state, shown(observation), reward, terminated)

    struct = jax.eval_shape(reset, jax.random.key(0)).observation
    space: gymnasium.Space = (
        box(struct)
        if layout is None
        else gymnasium.spaces.Dict(
            {
                "map": gymnasium.spaces.Box(
                    0, np.broadcast_to(np.array(layout.parts, np.uint8), struct["map"].shape), dtype=np.uint8
                ),
                "player": box(struct["player"]),
            }
        )
    )
    spec = make_spec(
        LIBRARY,
        name,
        observation_space=space,
        action_space=gymnasium.spaces.Discrete(int(inner.action_space(params).n)),
        batch_size=batch_size,
        time_limit=limit,
        domain=domain(name),
    )
    return JittableEnvironment(spec, reset, step)


def _layout(name: str) -> _Layout | None:
    """None for pixels."""
    if "Pixels" in name:
        return None
    if "Classic" in name:
        from craftax.craftax_classic import constants

        return _Layout(constants.OBS_DIM, (len(constants.BlockType), 1, 1, 1, 1))
    from craftax.craftax import constants

    creatures = (8,) * 5  # eight kinds in each of five classes
    return _Layout(constants.OBS_DIM, (len(constants.BlockType), len(constants.ItemType), *creatures, 1))


def _spelled(vector: Array, layout: _Layout) -> dict[str, Array]:
    rows, columns = layout.size
    length = rows * columns * sum(layout.parts)
    cells = vector[:length].reshape(rows, columns, -1)
    parts = jnp.split(cells, list(itertools.accumulate(layout.parts))[:-1], -1)
    numbers = [jnp.where(part.any(-1), part.argmax(-1) + 1, 0) for part in parts]
    return {"map": jnp.stack(numbers, -1).astype(jnp.uint8), "player": vector[length:]}
