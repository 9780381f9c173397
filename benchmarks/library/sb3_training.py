"""Times the training of CartPole by Stable-Baselines3's PPO; run by an interpreter that has it.

Its only argument is JSON: `environments`, gymnasium or envpool, and the settings that both sides share. It prints the
environment steps of training and the seconds that they took.
"""

import json
import sys
import time

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecMonitor


class Pool(VecEnv):
    """A vector environment of envpool's, which resets a row one step after its episode has ended."""

    def __init__(self, pool, rows):
        super().__init__(rows, pool.observation_space, pool.action_space)
        self.pool = pool

    def reset(self):
        return self.pool.reset()[0]

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        observation, reward, terminated, truncated, _ = self.pool.step(self.actions)
        done = terminated | truncated
        infos = [{} for _ in range(self.num_envs)]
        ended = np.flatnonzero(done)
        for row in ended:
            infos[row] |= {"terminal_observation": observation[row], "TimeLimit.truncated": bool(truncated[row])}
        if ended.size:
            observation = np.array(observation)
            observation[ended] = self.pool.reset(ended)[0]
        return observation, reward, done, infos

    def close(self):
        self.pool.close()

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [False] * self.num_envs

    def env_method(self, *arguments, **keywords):
        raise NotImplementedError

    def get_attr(self, attr_name, indices=None):
        return [getattr(self.pool, attr_name, None)] * self.num_envs

    def set_attr(self, attr_name, value, indices=None):
        raise NotImplementedError


def make(environments, rows):
    if environments == "gymnasium":
        return make_vec_env("CartPole-v1", n_envs=rows)
    import envpool

    return VecMonitor(Pool(envpool.make("CartPole-v1", env_type="gymnasium", num_envs=rows), rows))


def main(environments, num_envs, rollout_length, epochs, minibatches, learning_rate, hidden, steps):
    """Trains a little and then again from there, which is timed."""
    model = PPO(
        "MlpPolicy",
        make(environments, num_envs),
        n_steps=rollout_length,
        batch_size=num_envs * rollout_length // minibatches,
        n_epochs=epochs,
        learning_rate=learning_rate,
        policy_kwargs={"net_arch": list(hidden), "activation_fn": torch.nn.Tanh},
        device="cpu",
        seed=0,
    )
    model.learn(1)  # one rollout and its update: what is done once is apart
    began = time.perf_counter()
    model.learn(steps)
    print(json.dumps({"steps": model.num_timesteps, "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
