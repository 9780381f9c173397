"""Shortest ways through topogym's worlds, over the map that its agents do not see, with turns where they are due."""

import collections
import math


class ShortestWay:
    """Distances to the goal over free cells, once for each layout; then the nearest neighbour, turns included."""

    def __init__(self, seed):
        self._layout, self._goal, self._distances = None, None, {}

    def reset(self, env, obs, info):
        inner = env.unwrapped
        goal = inner._goal_cell()
        if self._layout is not inner.layout or self._goal != goal:
            self._layout, self._goal = inner.layout, goal
            self._distances = _measure(inner.layout.base, inner._planning_blocked(), goal)

    def label(self, env, obs, info):
        inner = env.unwrapped
        if inner._state.cell not in self._distances:
            return None
        if inner._motion == "fourway":
            return min(range(4), key=lambda move: self._after(inner, inner._FOURWAY_TURNS[move]))
        left, right, forward = inner.ACTION_LEFT, inner.ACTION_RIGHT, 3 - inner.ACTION_LEFT - inner.ACTION_RIGHT
        ways = ((0, forward, 0), (1, right, 1), (3, left, 1), (2, right, 2))
        return min(ways, key=lambda way: self._after(inner, way[0]) + way[2])[1]

    def observe(self, action, obs, reward, end, info):
        pass

    def _after(self, inner, turns):
        """How far it is to the goal after some turns to the right and a step."""
        state = inner._state
        for _ in range(turns):
            state = inner.layout.base.turn_right(state)
        ahead = inner.layout.base.forward(state)
        return math.inf if ahead is None else self._distances.get(ahead.cell, math.inf)


def _measure(base, blocked, goal):
    """Steps to the goal from each cell that leads there."""
    found = {goal: 0}
    line = collections.deque(found)
    while line:
        cell = line.popleft()
        for near in base.neighbors(cell):
            if near not in found and near not in blocked:
                found[near] = found[cell] + 1
                line.append(near)
    return found


EXPERTS = {"shortest-way": ShortestWay}
