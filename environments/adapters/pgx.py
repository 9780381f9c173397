"""Pgx: board and card games, 2048 and MinAtar in JAX, with masks of the legal moves.

A game of several players is played from the seat of player 0, which pgx deals at random, so that half of the games are
begun by the other side. The others play uniformly random legal moves, drawn from the environment's own key, until it is
player 0's turn again or the game is over: one step is one move of the player and all the answers to it. The reward is
the sum of player 0's rewards over these moves, and the observation is always what player 0 sees. An illegal move loses
the game, as pgx has it; a game that is decided before player 0's first move ends with that move, with reward 0.

Of the eight past positions that chess-like games show, the newest alone is offered: a policy that remembers has seen
the others, and 119 planes are more than it can take.
"""

from __future__ import annotations

import types
import typing
import warnings

import gymnasium
import jax
import jax.numpy as jnp

from ldm_jax.types import Array, PyTree

from ..jittable import JittableEnvironment, Outcome, box, check_installed, in_32_bits, make_spec, old_key

LIBRARY = "pgx"

_DOMAINS = types.MappingProxyType(
    {
        "2048": "games",
        "animal_shogi": "board games",
        "backgammon": "board games",
        "chess": "board games",
        "connect_four": "board games",
        "gardner_chess": "board games",
        "go_19x19": "board games",
        "go_9x9": "board games",
        "hex": "board games",
        "kuhn_poker": "games",
        "leduc_holdem": "games",
        "minatar-asterix": "games",
        "minatar-breakout": "games",
        "minatar-freeway": "games",
        "minatar-seaquest": "games",
        "minatar-space_invaders": "games",
        "othello": "board games",
        "shogi": "board games",
        "sparrow_mahjong": "games",
        "tic_tac_toe": "board games",
    }
)
_REFUSED = types.MappingProxyType({"bridge_bidding": "it needs a table of results that pgx downloads"})

_LIMIT = 1000  # steps; pgx has none, but games between players end by themselves

# Planes per past position, of which eight come before the planes that describe the whole game.
_HISTORY = types.MappingProxyType({"animal_shogi": 24, "chess": 14, "gardner_chess": 14})
_SHOGI_BOARD = 62  # planes of pieces and their attacks; those behind are the same on every field


def candidates() -> dict[str, str]:
    """Pgx's own ids, each with the reason why it is not offered, empty where it is."""
    check_installed(LIBRARY)
    return dict.fromkeys(_DOMAINS, "") | _REFUSED


def domain(name: str) -> str:
    """What the task of an id is about."""
    return _DOMAINS.get(name, "board games")


@in_32_bits()
def make(name: str, batch_size: int, time_limit: int | None) -> JittableEnvironment:
    """Makes B games by pgx's own id; None limits an episode to 1,000 moves of the player."""
    import pgx

    game = pgx.make(typing.cast(typing.Any, name))
    player = jnp.int32(0)

    def outcome(state: PyTree, reward: Array) -> Outcome:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            # The view of another than the player to move is deprecated; at the end of a game there is no other way.
            planes = game.observe(state, player) if game.num_players > 1 else state.observation
        return Outcome(state, _shown(name, planes), reward, state.terminated, state.truncated, state.legal_action_mask)

    def answered(state: PyTree, reward: Array, key: Array) -> tuple[PyTree, Array]:
        """Lets the other players move until it is the player's turn or the game is over."""

        def waits(carry: PyTree) -> Array:
            state, _, _ = carry
            return (state.current_player != player) & ~state.terminated & ~state.truncated

        def move(carry: PyTree) -> PyTree:
            state, reward, key = carry
            key, move_key, chance_key = jax.random.split(key, 3)
            action = jax.random.categorical(move_key, jnp.where(state.legal_action_mask, 0.0, -jnp.inf))
            state = game.step(state, action, old_key(chance_key))
            return state, reward + state.rewards[player], key

        state, reward, _ = jax.lax.while_loop(waits, move, (state, reward, key))
        return state, reward

    def reset(key: Array) -> Outcome:
        key, answer_key = jax.random.split(key)
        state, reward = game.init(old_key(key)), jnp.float32(0)
        if game.num_players > 1:
            state, reward = answered(state, reward, answer_key)
        return outcome(state, reward)

    def step(key: Array, state: PyTree, action: PyTree) -> Outcome:
        key, answer_key = jax.random.split(key)
        state = game.step(state, action, old_key(key))
        reward = state.rewards[player]
        if game.num_players > 1:
            state, reward = answered(state, reward, answer_key)
        return outcome(state, reward)

    said = jax.eval_shape(reset, jax.random.key(0))
    spec = make_spec(
        LIBRARY,
        name,
        observation_space=_space(said.observation),
        action_space=gymnasium.spaces.Discrete(said.action_mask.shape[0]),
        batch_size=batch_size,
        time_limit=time_limit or _LIMIT,
        domain=domain(name),
    )
    return JittableEnvironment(spec, reset, step)


def _space(structs: PyTree) -> gymnasium.Space:
    if isinstance(structs, dict):
        return gymnasium.spaces.Dict({part: box(struct) for part, struct in structs.items()})
    return box(structs)


def _shown(name: str, planes: Array) -> PyTree:
    """What is offered of pgx's observation."""
    if name in _HISTORY:
        newest = _HISTORY[name]
        return jnp.concatenate([planes[..., :newest], planes[..., 8 * newest :]], -1)
    if name == "shogi":
        return {"board": planes[..., :_SHOGI_BOARD], "hands": planes[0, 0, _SHOGI_BOARD:]}
    return planes
