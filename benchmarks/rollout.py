"""What the one interface costs with a policy in the loop: `ldm_jax.rollout` against each library's own loop.

Both sides act by the same jitted network and keep the same of every step: observation, action, its log-probability,
reward, terminated, truncated (ours keeps `first` too, clips actions to their space, and checks what the simulator
returns). The libraries' own loops, each with the library's own resets:

  gymnax: `jax.vmap` of its `step`, which resets by itself, in one compiled `jax.lax.scan`;
  envpool: `step` of its Gymnasium pool in a Python loop, into buffers made beforehand, as many threads as ours;
  gymnasium: the same loop around `SyncVectorEnv` in this process, where ours has worker processes.

    python -m benchmarks.rollout

What is counted is slots: rows times steps, those included that reset. Its last line is one JSON object:
`gymnax_to_raw`, `envpool_to_raw` and `worker_to_raw` are our rate at the batch size named in `headline`, 1 being the
library's own; `table` has all the others.
"""

from __future__ import annotations

import argparse
import collections.abc
import contextlib
import functools
import itertools
import json
import sys
import typing

import envpool
import gymnasium
import gymnax
import jax
import jax.numpy as jnp
import numpy as np

import environments
import ldm_jax
from environments.cores import available_cores
from environments.isolation import IsolatedEnvironment, Isolation, WorkerSpec
from ldm_jax import rollout
from ldm_jax.types import Agent, EnvironmentSpec

from .timing import compare

STEPS = 64
"""Of one portion, T."""

CASES = {
    "gymnax/CartPole-v1": (16, 256, 1024),
    "gymnax/Breakout-MinAtar": (16, 256),
    "envpool/CartPole-v1": (8, 64, 256),
    "envpool/LunarLander-v3": (64, 256),
    "envpool/Ant-v5": (64,),
    "gymnasium/CartPole-v1": (8, 64, 256),
}
"""Batch sizes, B, by environment."""

HEADLINE = {
    "gymnax_to_raw": "gymnax/CartPole-v1 at 256",
    "envpool_to_raw": "envpool/CartPole-v1 at 64",
    "worker_to_raw": "gymnasium/CartPole-v1 at 64",
}

Portion = collections.abc.Callable[[], object]


class Policy(typing.NamedTuple):
    """A network of two hidden layers that samples actions.

    Attributes:
      weights: of its layers.
      act: `act(weights, observation [B, ...], key) -> (action [B, ...], log-probability [B])`.
    """

    weights: typing.Any
    act: collections.abc.Callable


def make_policy(spec: EnvironmentSpec, width: int) -> Policy:
    """A policy for the spaces of an environment, Box or Discrete, with hidden layers of a width."""
    space = typing.cast(typing.Any, spec.action_space)
    discrete = isinstance(space, gymnasium.spaces.Discrete)
    observation_size = int(np.prod(typing.cast(tuple, spec.observation_space.shape)))
    sizes = [observation_size, width, width, int(space.n) if discrete else space.shape[0]]
    rng = np.random.default_rng(0)
    weights = [rng.normal(0, a**-0.5, (a, b)).astype(np.float32) for a, b in itertools.pairwise(sizes)]

    def act(weights, observation, key):
        x = observation.reshape(len(observation), -1).astype(jnp.float32)
        for weight in weights[:-1]:
            x = jnp.tanh(x @ weight)
        x = x @ weights[-1]
        if discrete:
            action = jax.random.categorical(key, x)
            return action, jnp.take_along_axis(jax.nn.log_softmax(x), action[:, None], 1)[:, 0]
        noise = jax.random.normal(key, x.shape)
        return jnp.clip(x + noise, space.low, space.high), (-0.5 * noise**2).sum(-1)

    return Policy(jax.device_put(weights), act)


@contextlib.contextmanager
def ours(environment: ldm_jax.Environment, width: int) -> collections.abc.Iterator[Portion]:
    """T steps of our loop."""
    policy = make_policy(environment.spec, width)

    def step(weights, carry, timestep, key):
        return carry, *policy.act(weights, timestep.observation, key)

    agent = Agent(lambda batch_size: (), step)
    with contextlib.closing(environment):
        loop = rollout.start(environment, agent, jax.random.key(0))

        def portion():
            nonlocal loop
            loop, trajectory = rollout.rollout(environment, agent, policy.weights, loop, jax.random.key(1), STEPS)
            jax.block_until_ready(trajectory)

        yield portion


@contextlib.contextmanager
def gymnax_alone(spec: EnvironmentSpec, width: int) -> collections.abc.Iterator[Portion]:
    """T steps of gymnax in a scan."""
    inner, params = gymnax.make(spec.id.partition("/")[2])
    policy, rows = make_policy(spec, width), spec.batch_size

    @jax.jit
    def run(weights, loop):
        def body(loop, _):
            key, observation, state = loop
            key, act_key, step_key = jax.random.split(key, 3)
            action, log_probability = policy.act(weights, observation, act_key)
            step = jax.vmap(inner.step, (0, 0, 0, None))
            seen, state, *ended, _ = step(jax.random.split(step_key, rows), state, action, params)
            return (key, seen, state), (observation, action, log_probability, *ended)

        return jax.lax.scan(body, loop, length=STEPS)

    keys = jax.random.split(jax.random.key(0), rows)
    # Compiled, so that its numbers have the types that `step` returns.
    loop = (jax.random.key(1), *jax.jit(jax.vmap(inner.reset, (0, None)))(keys, params))

    def portion():
        nonlocal loop
        loop, trajectory = run(policy.weights, loop)
        jax.block_until_ready(trajectory)

    yield portion


@contextlib.contextmanager
def vector_alone(spec: EnvironmentSpec, width: int, vector: typing.Any) -> collections.abc.Iterator[Portion]:
    """T steps of a vector environment of Gymnasium's interface in a Python loop."""
    policy, rows = make_policy(spec, width), spec.batch_size

    @jax.jit
    def act(weights, key, observation):
        key, act_key = jax.random.split(key)
        return key, *policy.act(weights, observation, act_key)

    with contextlib.closing(vector):
        key, (observation, _) = jax.random.key(1), vector.reset()

        def portion():
            nonlocal key, observation
            observations = np.empty((STEPS, *observation.shape), observation.dtype)
            actions = np.empty((STEPS, rows, *spec.action_space.shape), spec.action_space.dtype)
            log_probabilities, rewards = np.empty((2, STEPS, rows), np.float32)
            terminateds, truncateds = np.empty((2, STEPS, rows), bool)
            for t in range(STEPS):
                key, action, log_probability = act(policy.weights, key, observation)
                actions[t] = action = np.asarray(action)
                observations[t], log_probabilities[t] = observation, log_probability
                observation, rewards[t], terminateds[t], truncateds[t], _ = vector.step(action)
            return observations, actions, log_probabilities, rewards, terminateds, truncateds

        yield portion


def envpool_alone(spec: EnvironmentSpec, width: int) -> contextlib.AbstractContextManager[Portion]:
    """T steps of envpool."""
    rows = spec.batch_size
    threads = min(rows, available_cores())
    pool = envpool.make_gymnasium(spec.id.partition("/")[2], num_envs=rows, num_threads=threads, seed=0)
    return vector_alone(spec, width, pool)


def gymnasium_alone(spec: EnvironmentSpec, width: int) -> contextlib.AbstractContextManager[Portion]:
    """T steps of Gymnasium in this process."""
    make = functools.partial(gymnasium.make, spec.id.partition("/")[2], disable_env_checker=True)
    return vector_alone(spec, width, gymnasium.vector.SyncVectorEnv([make] * spec.batch_size))


ALONE = {"gymnax": gymnax_alone, "envpool": envpool_alone, "gymnasium": gymnasium_alone}


def make(name: str, rows: int, workers: int = 0) -> ldm_jax.Environment:
    """B environments behind our interface; those of Gymnasium in worker processes of this interpreter."""
    library, _, own = name.partition("/")
    if library != "gymnasium":
        return environments.make(name, rows)
    spec = WorkerSpec(sys.executable, library, own, library, (library,), library, "classic control")
    return IsolatedEnvironment(spec, rows, None, Isolation(workers=workers))


def measure(name: str, rows: int, width: int, repetitions: int, seconds: float) -> dict[str, typing.Any]:
    """One line of the table: slots a second, ours and the library's own, and the ratio."""
    environment, library = make(name, rows), name.partition("/")[0]
    with ours(environment, width) as our_loop, ALONE[library](environment.spec, width) as own_loop:
        times = compare({"ours": our_loop, "raw": own_loop}, repetitions, seconds)
    rates = {side: rows * STEPS / times.median(side) for side in ("ours", "raw")}
    return {"environment": name, "rows": rows, **rates, "ratio": times.speed("ours", "raw")}


def spread(name: str, rows: int, counts: list[int], width: int, repetitions: int, seconds: float) -> dict[str, float]:
    """Slots a second with each number of workers."""
    with contextlib.ExitStack() as stack:
        loops = {str(count): stack.enter_context(ours(make(name, rows, count), width)) for count in counts}
        times = compare(loops, repetitions, seconds)
    return {count: rows * STEPS / times.median(count) for count in loops}


def main(arguments: collections.abc.Sequence[str] | None = None) -> None:
    """Prints tables, and one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description="Rates of acting.")
    parser.add_argument("--repetitions", type=int, default=9, help="rounds that medians are taken over")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each contender in each round")
    parser.add_argument("--width", type=int, default=64, help="of the network's two hidden layers")
    parser.add_argument("--headline-only", action="store_true", help="only what the headline needs")
    options = parser.parse_args(arguments)
    effort = (options.width, options.repetitions, options.seconds)

    print(f"slots a second, acting by a network {options.width} wide (medians of {options.repetitions} rounds)\n")
    print(f"{'environment':>24} {'rows':>5} {'ours':>10} {'library':>10} {'ratio':>6}")
    table = {}
    for name, batch_sizes in CASES.items():
        for rows in batch_sizes:
            place = f"{name} at {rows}"
            if options.headline_only and place not in HEADLINE.values():
                continue
            table[place] = line = measure(name, rows, *effort)
            print(
                f"{name:>24} {rows:>5} {line['ours']:>10,.0f} {line['raw']:>10,.0f} {line['ratio']:>6.2f}", flush=True
            )

    name, rows, cores = "gymnasium/CartPole-v1", 64, available_cores()
    workers = spread(name, rows, sorted({1, 2, cores}), *effort)
    print(f"\n{name} at {rows} by the number of workers, on {cores} cores\n")
    for count, rate in workers.items():
        print(f"{count:>24} {rate:>16,.0f}")

    result = {key: table[place]["ratio"] for key, place in HEADLINE.items()}
    result |= {"headline": HEADLINE, "table": table, "workers": workers, "cores": cores, "width": options.width}
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
