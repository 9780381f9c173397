"""An environment that costs as much as it is told to, for measuring what is around it."""

import time

import gymnasium
import numpy as np
from gymnasium import spaces


class Workload(gymnasium.Env):
    """Burns processor time at every step and shows noise; episodes end by themselves.

    Args:
      work_us: processor time of one step. It is counted by the thread's own clock, which stands still while another
        process has the core: two of these on one core take twice as long, on whatever interpreter they run.
      shape: of the observation, bytes.
      length: steps of an episode.
    """

    def __init__(self, work_us=0.0, shape=(8,), length=200):
        self.observation_space = spaces.Box(0, 255, tuple(shape), np.uint8)
        self.action_space = spaces.Discrete(2)
        self.work_ns, self.length = int(1000 * work_us), length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.image = self.np_random.integers(0, 256, self.observation_space.shape, np.uint8)
        return self.image, {}

    def step(self, action):
        end = time.thread_time_ns() + self.work_ns
        while time.thread_time_ns() < end:
            pass
        self.steps += 1
        return self.image, float(action), self.steps == self.length, False, {}


gymnasium.register("Workload-v0", Workload)
