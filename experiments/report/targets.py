"""Public returns for the same tasks: what a reference policy is compared with, beside z.

A weak reference makes z easy, so the raw return is shown against these as well. A later version of a task takes the
target of the version that was published, where its dynamics and rewards are the same.
Sources: RL Baselines3 Zoo, benchmark.md (one trained agent per entry, its name in the comment); for toy text, but for
Taxi, the exact optimum, by value iteration on the transition table of Gymnasium under its time limit.
"""

from __future__ import annotations

import types

_CLASSIC = {
    "CartPole-v1": 500.0,  # ppo and others
    "Acrobot-v1": -73.5,  # ppo
    "MountainCar-v0": -101.0,  # dqn
    "MountainCarContinuous-v0": 94.7,  # sac
    "Pendulum-v1": -152.0,  # ddpg
}
_BOX2D = {
    "LunarLander-v2": 242.0,  # ppo
    "LunarLanderContinuous-v2": 271.0,  # ppo
    "BipedalWalker-v3": 306.0,  # td3
}
_TOY_TEXT = {
    "FrozenLake-v1": 0.74,
    "FrozenLake8x8-v1": 0.91,
    "Taxi-v3": 8.46,  # as reported for trained agents; the optimum over Gymnasium's start states is 7.93
    "CliffWalking-v1": -13.0,
}

PUBLIC_TARGETS = types.MappingProxyType(
    {f"{library}/{name}": target for library in ("gymnax", "envpool") for name, target in _CLASSIC.items()}
    | {f"envpool/{name}": target for name, target in (_BOX2D | _TOY_TEXT).items()}
    | {"envpool/LunarLander-v3": 242.0, "envpool/LunarLanderContinuous-v3": 271.0}
)
"""Mean undiscounted return by environment id."""
