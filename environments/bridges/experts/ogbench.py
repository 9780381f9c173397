"""ogbench's oracles: the next cell on the shortest way through a point maze, and the hand that puts cubes in place."""

import typing

import numpy as np

_PLACED = 0.02


class OracleSubgoal:
    """The way to the goal of the moment, which the observation does not show but where the task is a single one."""

    def __init__(self, seed):
        pass

    def reset(self, env, obs, info):
        pass

    def label(self, env, obs, info):
        maze = env.unwrapped
        place = np.asarray(maze.get_xy(), float)
        subgoal, _ = maze.get_oracle_subgoal(place, maze.cur_goal_xy)
        way = np.asarray(subgoal, float) - place
        length = np.linalg.norm(way)
        return (way / max(length, 1e-6)).clip(-1, 1).astype(env.action_space.dtype)

    def observe(self, action, obs, reward, end, info):
        pass


class Cubes:
    """The library's oracle for a cube, which is told of one after the other: the lowest that is out of place first."""

    def __init__(self, seed):
        self._oracle: typing.Any = None
        self._cube = None

    def reset(self, env, obs, info):
        from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle

        self._oracle, self._cube = CubeMarkovOracle(env=env), None
        # It would draw where the hand goes in the end, and stop after some steps.
        self._oracle._final_pos, self._oracle._final_yaw = env.unwrapped._arm_sampling_bounds.mean(0), 0.0
        self._oracle._step, self._oracle._max_step = 0, np.inf

    def label(self, env, obs, info):
        scene = env.unwrapped
        wanted = np.array([scene._data.mocap_pos[place] for place in scene._cube_target_mocap_ids])
        found = np.array([info[f"privileged/block_{i}_pos"] for i in range(len(wanted))])
        away = np.linalg.norm(wanted - found, axis=1) > _PLACED
        is_free = info["proprio/gripper_contact"][0] < 0.1 and info["proprio/effector_pos"][2] > 0.16
        if self._cube is None or (is_free and not away[self._cube]):
            self._cube = min(range(len(wanted)), key=lambda i: (not away[i], wanted[i, 2], -found[i, 2], i))
        told = {
            **info,
            "privileged/target_block": self._cube,
            "privileged/target_block_pos": wanted[self._cube],
            "privileged/target_block_yaw": np.zeros(1),
        }
        return np.asarray(self._oracle.select_action(obs, told), env.action_space.dtype)

    def observe(self, action, obs, reward, end, info):
        pass


EXPERTS = {"oracle-subgoal": OracleSubgoal, "oracle-cube": Cubes}
