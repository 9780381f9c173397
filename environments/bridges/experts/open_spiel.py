"""OpenSpiel's own answers to players that move by chance: the exact best response of small games, and tree search."""

import functools
import itertools

_SIMULATIONS = 100
_EXPLORATION = 2.0
_MEGABYTES = 64


class BestResponse:
    """The best response to uniformly random others: it knows what its player knows, and is exact."""

    def __init__(self, seed):
        self._actions = {}

    def reset(self, env, obs, info):
        if not self._actions:  # the game stays the same
            self._actions = best_response(env.unwrapped._game.get_type().short_name)

    def label(self, env, obs, info):
        state = env.unwrapped._state
        if state.is_simultaneous_node():
            return self._actions
        return self._actions.get(state.information_state_string(env.unwrapped._player))

    def observe(self, action, obs, reward, end, info):
        pass


class Mcts:
    """Monte Carlo tree search with random playouts, as if the others played well; for games without secrets."""

    def __init__(self, seed):
        self._seed = seed & 0x7FFFFFFF

    def reset(self, env, obs, info):
        import pyspiel

        evaluator = pyspiel.RandomRolloutEvaluator(1, self._seed)
        limits = _EXPLORATION, _SIMULATIONS, _MEGABYTES
        self._bot = pyspiel.MCTSBot(env.unwrapped._game, evaluator, *limits, True, self._seed, False)

    def label(self, env, obs, info):
        return self._bot.step(env.unwrapped._state)

    def observe(self, action, obs, reward, end, info):
        pass


@functools.lru_cache(maxsize=4)
def best_response(name):
    """The first player's best actions by what it knows; of a game of one simultaneous move, the action alone."""
    import pyspiel

    game = pyspiel.load_game(name)
    if game.get_type().dynamics == pyspiel.GameType.Dynamics.SIMULTANEOUS:
        return _best_move(game)
    others = pyspiel.UniformRandomPolicy(game)  # the response does not keep it alive
    response = pyspiel.TabularBestResponse(game, 0, others)
    response.value_from_state(game.new_initial_state())
    return dict(response.get_best_response_actions())


def _best_move(game):
    start = game.new_initial_state()
    moves = [start.legal_actions(player) for player in range(game.num_players())]

    def value(move):
        total = 0.0
        for others in itertools.product(*moves[1:]):
            state = start.clone()
            state.apply_actions([move, *others])
            total += state.returns()[0]
        return total

    return max(moves[0], key=value)


EXPERTS = {"best-response": BestResponse, "mcts": Mcts}
