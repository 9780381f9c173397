"""OpenSpiel's games for one player: the others choose among their legal moves by chance.

The one who learns is the first player. Where all players share one return, as in Hanabi, it plays for each of them in
turn, seeing what that player sees. Games whose states have no tensor, and mean field games, are left out.
"""

import typing

import gymnasium
import numpy as np

_ME = 0


class Game(gymnasium.Env):
    """One game against players that move by chance; a move that is not legal is replaced by a legal one.

    Args:
      name: OpenSpiel's own short name of the game.
    """

    def __init__(self, name):
        import pyspiel

        self._pyspiel: typing.Any = pyspiel
        self._game = pyspiel.load_game(name)
        kind = self._game.get_type()
        self._of_information = not kind.provides_observation_tensor
        self._shared = kind.utility == pyspiel.GameType.Utility.IDENTICAL
        # Games whose chance is their own take its seed when they are loaded.
        self._seeded = name if "rng_seed" in kind.parameter_specification else ""
        shape = (
            self._game.information_state_tensor_shape if self._of_information else self._game.observation_tensor_shape
        )
        self._shape = tuple(shape())
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, self._shape, np.float32)
        self._moves = self._game.num_distinct_actions()
        self.action_space = gymnasium.spaces.Discrete(self._moves)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self._seeded:
            parameters = {"rng_seed": int(self.np_random.integers(1 << 31))}
            self._game = self._pyspiel.load_game(self._seeded, parameters)
        self._return, self._player = 0.0, _ME
        while True:  # a game may end before it is our turn
            self._state = self._game.new_initial_state()
            self._go_on()
            if not self._state.is_terminal():
                return self._see(), {"action_mask": self._mask()}

    def step(self, action):
        state, executed = self._state, self._legal(action)
        if state.is_simultaneous_node():
            players = range(self._game.num_players())
            state.apply_actions([executed if player == self._player else self._any(player) for player in players])
        else:
            state.apply_action(executed)
        self._go_on()
        before, self._return = self._return, state.returns()[_ME]
        info = {"action_mask": self._mask(), "action_executed": executed}
        return self._see(), self._return - before, state.is_terminal(), False, info

    def _go_on(self):
        """Lets chance and the others move until it is our turn."""
        state = self._state
        while not state.is_terminal():
            if state.is_chance_node():
                outcomes, probabilities = zip(*state.chance_outcomes())
                weights = np.array(probabilities)
                state.apply_action(int(self.np_random.choice(outcomes, p=weights / weights.sum())))
            elif state.is_simultaneous_node():
                if state.legal_actions(_ME):
                    return
                players = range(self._game.num_players())
                state.apply_actions([self._any(player) for player in players])
            else:
                player = state.current_player()
                if self._shared or player == _ME:
                    self._player = player
                    return
                state.apply_action(self._any(player))

    def _any(self, player):
        legal = self._state.legal_actions(player)
        return int(self.np_random.choice(legal)) if legal else 0

    def _legal(self, action):
        legal = self._state.legal_actions(self._player)
        return int(action) if action in legal else legal[action % len(legal)]

    def _mask(self):
        mask = np.zeros(self._moves, np.int8)
        if not self._state.is_terminal():
            mask[self._state.legal_actions(self._player)] = 1
        return mask

    def _see(self):
        see = self._state.information_state_tensor if self._of_information else self._state.observation_tensor
        return np.asarray(see(self._player), np.float32).reshape(self._shape)


def register():
    """Puts the games into the registry under their short names."""
    import pyspiel

    for kind in pyspiel.registered_games():
        seen = kind.provides_observation_tensor or kind.provides_information_state_tensor
        if kind.default_loadable and seen and kind.dynamics != pyspiel.GameType.Dynamics.MEAN_FIELD:
            gymnasium.register(kind.short_name, entry_point=f"{__name__}:Game", kwargs={"name": kind.short_name})
