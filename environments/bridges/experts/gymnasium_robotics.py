"""Point mazes of gymnasium-robotics: the shortest way over the map, whose next cell is steered to."""

import collections

import numpy as np

_PULL, _DRAG = 10.0, 1.0


class ShortestPath:
    """Steps from cell to cell, and to the goal itself in the last one."""

    def __init__(self, seed):
        self._distances = {}

    def reset(self, env, obs, info):
        pass

    def label(self, env, obs, info):
        maze = env.unwrapped.maze
        place, goal = np.asarray(obs["achieved_goal"]), np.asarray(obs["desired_goal"])
        cell, end = (tuple(map(int, maze.cell_xy_to_rowcol(where))) for where in (place, goal))
        if end not in self._distances:
            self._distances[end] = _distances(maze.maze_map, end)
        distances = self._distances[end]
        if cell not in distances:
            return None
        near = min([cell, *_neighbours(cell)], key=lambda each: distances.get(each, np.inf))
        target = goal if cell == end else maze.cell_rowcol_to_xy(np.array(near))
        force = _PULL * (target - place) - _DRAG * np.asarray(obs["observation"])[2:4]
        return np.clip(force, -1, 1).astype(env.action_space.dtype)

    def observe(self, action, obs, reward, end, info):
        pass


def _neighbours(cell):
    row, column = cell
    return [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]


def _distances(maze_map, end):
    """Steps from each free cell to one of them."""
    found, line = {end: 0}, collections.deque([end])
    while line:
        cell = line.popleft()
        for row, column in _neighbours(cell):
            inside = 0 <= row < len(maze_map) and 0 <= column < len(maze_map[0])
            if inside and (row, column) not in found and maze_map[row][column] != 1:
                found[row, column] = found[cell] + 1
                line.append((row, column))
    return found


EXPERTS = {"shortest-path": ShortestPath}
