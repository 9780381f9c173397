"""Experts of `Steady` that misbehave in the way that their name says; action 3 would make trouble."""

import copy
import random
import sys
import time

import numpy as np


class Follows:
    """Says 1 where the number of steps is even, else 2; it counts them by what it is told."""

    def __init__(self, seed):
        self.seed = seed

    def reset(self, env, obs, info):
        self.steps, self.executed = 0, []

    def label(self, env, obs, info):
        assert self.steps == obs["place"][1], "it was not told of every step"
        return 1 + self.steps % 2

    def observe(self, action, obs, reward, end, info):
        assert action == reward
        self.steps += 1


class Tires(Follows):
    """Has no answer after the second step."""

    def label(self, env, obs, info):
        return super().label(env, obs, info) if self.steps < 2 else None


class Raises(Follows):
    def label(self, env, obs, info):
        raise RuntimeError("no idea")


class Exits(Follows):
    def observe(self, action, obs, reward, end, info):
        sys.exit(3)


class Hangs(Follows):
    def label(self, env, obs, info):
        if self.steps == 3:
            time.sleep(1000)
        return 1


class Slow(Follows):
    def label(self, env, obs, info):
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass
        return 1


class Outside(Follows):
    def label(self, env, obs, info):
        return 4


class Halves(Follows):
    def label(self, env, obs, info):
        return 1.5


class NotANumber(Follows):
    def label(self, env, obs, info):
        return float("nan")


class Words(Follows):
    def label(self, env, obs, info):
        return "left"


class TooMany(Follows):
    def label(self, env, obs, info):
        return [1, 2]


class Draws(Follows):
    """Draws from the environment's own generator."""

    def label(self, env, obs, info):
        return int(env.unwrapped.np_random.integers(3))


class SaysThatItDraws(Draws):
    draws = True

    def label(self, env, obs, info):
        assert np.random.random() != random.random()
        return int(np.random.randint(3) + super().label(env, obs, info)) % 3


class DrawsGlobally(Follows):
    def label(self, env, obs, info):
        return int(np.random.randint(3))


class Meddles(Follows):
    """Changes the environment."""

    def label(self, env, obs, info):
        env.unwrapped.place += 1
        return 1


class Samples(Follows):
    """Draws from a copy of the action space, of whatever kind that is."""

    def reset(self, env, obs, info):
        self.space = copy.deepcopy(env.action_space)
        self.space.seed(self.seed)

    def label(self, env, obs, info):
        return self.space.sample()

    def observe(self, action, obs, reward, end, info):
        assert self.space.contains(action)


class Keys(Follows):
    """Works each label out some times, and then knows it."""

    def __init__(self, seed):
        self.asked = {}

    def key(self, env, obs, info):
        return self.steps

    def label(self, env, obs, info):
        self.asked[self.steps] = self.asked.get(self.steps, 0) + 1
        assert self.asked[self.steps] <= 4
        return 1 + self.steps % 2


class WrongKeys(Keys):
    """Says that its label follows from nothing, which is not so."""

    def key(self, env, obs, info):
        return ()

    def label(self, env, obs, info):
        return 1 + self.steps % 2


class CannotBeMade(Follows):
    def __init__(self, seed):
        raise RuntimeError("no licence")


EXPERTS = {kind.__name__: kind for kind in list(globals().values()) if isinstance(kind, type)}
