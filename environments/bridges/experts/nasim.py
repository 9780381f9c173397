"""The cheapest attack on nasim's networks, by uniform-cost search over its own model as if every attack succeeded.

An attack that may fail counts as often as it is expected to be tried. Scans of a host, which only tell, are not needed
by a search that reads the state. Where that is larger than what can be searched in time, there is no answer.
"""

import copy
import heapq
import itertools
import typing

import numpy as np

_MAX_TRIED = 60_000
"""Attacks that a search may try before it gives up."""
_MAX_FAILED = 2
"""Searches that may find nothing before no other is begun in the network."""
_PLANS: typing.Any = {}
_MAX_PLANS = 4096


class Search:
    """The search of one network; what is best in a state it has planned through is known from then on."""

    def __init__(self, seed):
        self._network: typing.Any = None
        self._best: typing.Any = {}

    def reset(self, env, obs, info):
        inner = env.unwrapped
        if self._network is not inner.network:
            self._network, self._best, self._failed = inner.network, {}, 0
            # Rows of a network that is the same find the plan of a state once.
            self._name = env.spec.id, inner.current_state.tensor.tobytes(), str(inner.network.firewall)
            self._sensitive = list(inner.network.sensitive_addresses)
            self._moves = _useful(inner)
            last = {
                host: [m.cost for m in self._moves if m.target == host and m.gives == 2] for host in self._sensitive
            }
            self._last = {host: min(costs, default=0.0) for host, costs in last.items()}

    def label(self, env, obs, info):
        state = env.unwrapped.current_state
        key = state.tensor.tobytes()
        if key not in self._best:
            if self._failed >= _MAX_FAILED:
                return None
            if (self._name, key) not in _PLANS:
                if len(_PLANS) >= _MAX_PLANS:
                    _PLANS.clear()
                _PLANS[self._name, key] = self._plan(state)
            plan = _PLANS[self._name, key]
            self._best.update({key: None, **plan})
            self._failed += not plan
        move = self._best[key]
        return None if move is None else _number(env.unwrapped.action_space, move)

    def observe(self, action, obs, reward, end, info):
        pass

    def _plan(self, start):
        """The moves of the cheapest way to the goal, by the states that they are made in; none where none is found."""
        tie, tried = itertools.count(), 0
        line: typing.Any = [(0.0, 0.0, next(tie), start, start.tensor.tobytes(), None)]
        done: typing.Any = set()
        while line and tried < _MAX_TRIED:
            _, cost, _, state, key, way = heapq.heappop(line)
            if key in done:
                continue
            done.add(key)
            if self._network.all_sensitive_hosts_compromised(state):
                plan = {}
                while way is not None:
                    way, before, move = way
                    plan[before] = move
                return plan
            for move in self._moves:
                if not move.is_open(state):
                    continue
                tried += 1
                after, result = self._network.perform_action(state, move.certain)
                new = after.tensor.tobytes()
                if result.success and new not in done:
                    price = cost + move.cost + max(0.0, -float(result.value))
                    link = (way, key, move)
                    heapq.heappush(line, (price + self._least(after), price, next(tie), after, new, link))
        return {}

    def _least(self, state):
        """What is to be paid at least from a state on: the cheapest last attack on each host that is to fall."""
        return sum(cost for host, cost in self._last.items() if not state.host_has_access(host, 2))


class _Move:
    """An attack or a scan of subnets: what it is expected to cost, and how it goes when it succeeds."""

    def __init__(self, action, index):
        self.action, self.index, self.target = action, index, action.target
        self.certain = copy.copy(action)
        self.certain.prob = 1.0
        self.cost = float(action.cost) / max(float(action.prob), 1e-6)
        self.gives = 0 if action.is_subnet_scan() else int(action.access)

    def is_open(self, state):
        """Whether it may change anything in a state."""
        if not (state.host_discovered(self.target) and state.host_reachable(self.target)):
            return False
        return (
            state.host_compromised(self.target)
            if not self.gives
            else not state.host_has_access(self.target, self.gives)
        )


def _useful(inner):
    """The moves that a cheapest plan may have: of the exploits that work on a host, the cheapest of each kind."""
    best: typing.Any = {}
    state, sensitive, moves = inner.current_state, inner.network.sensitive_addresses, []
    for i, action in enumerate(inner.action_space.actions):
        move = _Move(action, i) if action.is_exploit() or action.is_privilege_escalation() else None
        if action.is_subnet_scan():
            moves.append(_Move(action, i))
        elif move is not None and action.is_exploit():
            _, result = state.get_host(action.target).perform_action(move.certain)
            place = action.target, move.gives, action.service  # firewalls let some services through
            if result.success and (place not in best or move.cost < best[place].cost):
                best[place] = move
        elif move is not None and action.target in sensitive:
            moves.append(move)
    return [*moves, *best.values()]


def _number(space, move):
    """A move as the space of actions has it: its number, or its kind, target and means."""
    if hasattr(space, "n"):
        return move.index
    action, scenario = move.action, space.scenario
    system = getattr(action, "os", None)
    vector = [
        next(i for i, kind in enumerate(space.action_types) if isinstance(action, kind)),
        action.target[0] - 1,
        action.target[1],
        0 if system is None else scenario.os.index(system) + 1,
        scenario.services.index(action.service) if action.is_exploit() else 0,
        scenario.processes.index(action.process) if getattr(action, "process", None) is not None else 0,
    ]
    return np.array(vector, np.int64)


EXPERTS = {"search": Search}
