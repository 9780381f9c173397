"""Datasets of random numbers for tests of the store and the mixture, written by the schema of a stored step."""

import uuid

import gymnasium
import numpy as np

from data import store
from ldm_jax.cards import EnvironmentCard, Reference, Returns, Statistics
from ldm_jax.encoding.transition import transition_schema

ID = "gymnax/CartPole-v1"
NUMBERS, CHOICES = gymnasium.spaces.Box(-np.inf, np.inf, (4,)), gymnasium.spaces.Discrete(2)


def card(id=ID, version="1", observation_space=NUMBERS, action_space=CHOICES, time_limit=500):
    returns = Returns.of(np.zeros((2, 3)))
    return EnvironmentCard(
        id=id,
        library=id.split("/")[0],
        version=version,
        domain="classic control",
        observation_space=observation_space,
        action_space=action_space,
        time_limit=time_limit,
        statistics=Statistics((0.0,) * 4, (1.0,) * 4, 1.0, (), (), 10),
        random_returns=returns,
        reference_returns=returns,
        reference=Reference("ppo", "greedy", 100, 0),
    )


def random_array(rng, shape, dtype):
    """All values of the dtype but those that are not finite."""
    if dtype == np.bool_:
        return rng.random(shape) < 0.5
    value = np.frombuffer(rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)
    return np.where(np.isfinite(value), value, np.zeros((), dtype))


def leaves(card, steps=70, streams=3, seed=0, masked=False, distribution=True, **known):
    """Random leaves of a part by the card's spaces; `known` are given without `[T, B]`, or whole."""
    schema = transition_schema(card.observation_space, card.action_space, masked=masked, distribution=distribution)
    rng = np.random.default_rng(seed)
    arrays = {name: random_array(rng, (steps, streams, *struct.shape), struct.dtype) for name, struct in schema.items()}
    known = {
        name: np.broadcast_to(value, arrays[name].shape).astype(arrays[name].dtype) for name, value in known.items()
    }
    return arrays | known


def episodes(steps: int, streams: int) -> store.EpisodeIndex:
    zeros = np.zeros(streams)
    return store.EpisodeIndex(zeros, zeros + steps, zeros + 0.5, np.arange(streams), zeros + 0.25, np.arange(streams))


def append(dataset, id=ID, steps=70, streams=3, value=0.0):
    """A part whose rewards are all one value."""
    made = card(id)
    return store.append_part(
        dataset, made, leaves(made, steps, streams, int(value), reward=value), episodes(steps, streams)
    )


def memory() -> str:
    return f"memory://{uuid.uuid4()}"
