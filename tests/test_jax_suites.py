"""Laws of the suites that are written in JAX, each on real environments."""

import importlib.util
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import environments
from ldm_jax import spaces


def installed(library):
    return pytest.mark.skipif(
        importlib.util.find_spec(library) is None,
        reason=f"{library} is not installed: pip install 'ldm_jax[{library}]'",
    )


def ids(*names):
    return [pytest.param(name, marks=installed(name.split("/")[0])) for name in names]


# The quickest of each to compile: masks of several slots, a mission, a game against another player.
@pytest.mark.parametrize(
    "id",
    ids(
        "jumanji/Cleaner-v0",
        "navix/Navix-GoToDoor-5x5-v0",
        "pgx/tic_tac_toe",
        "xminigrid/MiniGrid-Empty-5x5",
    ),
)
def test_suites_pass_the_kit(id):
    environments.check_environment(id, batch_size=4, steps=20)


def random_play(id, batch_size, steps, seed=0):
    """Actions and time steps of random play, `[steps, B, ...]`, the time steps before and after each action."""
    environment = environments.make(id, batch_size)

    @jax.jit
    def play(key):
        def step(carry, key):
            state, time_step = carry
            action = spaces.sample(key, environment.spec.action_space, batch_size, time_step.action_mask)
            after = environment.step(state, action)
            return after, (action, time_step, after[1])

        return jax.lax.scan(step, environment.reset(key), jax.random.split(key, steps))[1]

    return jax.tree.map(np.asarray, play(jax.random.key(seed)))


@installed("pgx")
def test_a_game_is_seen_from_one_seat_and_the_others_answer_with_legal_moves():
    actions, before, after = random_play("pgx/tic_tac_toe", batch_size=64, steps=60)
    going = ~after.first
    mine, theirs = (after.observation[..., i].reshape(60, 64, 9).astype(bool) for i in range(2))
    assert not (mine & theirs).any()
    # A stone of mine lies where I put it, at the end of the game too, and none is ever taken away.
    assert np.take_along_axis(mine, actions[..., None], 2)[going].all()
    was_mine, was_theirs = (before.observation[..., i].reshape(60, 64, 9).astype(bool) for i in range(2))
    assert (mine | ~was_mine)[going].all() and (theirs | ~was_theirs)[going].all()
    # One step is my move and their answer, unless my move was the last.
    answers = (theirs & ~was_theirs).sum(2)
    assert (answers[going & ~after.last] == 1).all() and (answers[going] <= 1).all()
    # Each side begins some games. Nobody loses by an illegal move: three in a row tell who won.
    begun_by_them = theirs.sum(2)[after.first]
    assert set(begun_by_them) == {0, 1}
    lines = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 3, 6], [1, 4, 7], [2, 5, 8], [0, 4, 8], [2, 4, 6]])
    won, lost = (stones[..., lines].all(3).any(2) for stones in (mine, theirs))
    assert (after.reward[going] == (won.astype(int) - lost)[going]).all() and after.terminated[going & won].all()
    assert {-1, 0, 1} == set(after.reward[after.terminated])


@installed("jumanji")
def test_masks_over_combinations_of_slots_rule_out_every_illegal_move():
    _, before, after = random_play("jumanji/Minesweeper-v0", batch_size=32, steps=80)
    going = ~after.first
    revealed, were_revealed = ((time_step.observation["board"] >= 0).sum((2, 3)) for time_step in (after, before))
    assert (before.action_mask.reshape(80, 32, 10, 10) == (before.observation["board"] < 0))[~before.last].all()
    assert (revealed == were_revealed + 1)[going].all()
    assert before.action_mask.any(2).all()


@installed("craftax")
def test_the_map_of_craftax_is_what_its_vector_spells():
    from environments.adapters import craftax

    layout = craftax._layout("Craftax-Symbolic-v1")
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, np.array(layout.parts) + 1, (*layout.size, len(layout.parts)))
    one_hot = [np.eye(size + 1)[numbers[..., i]][..., 1:] for i, size in enumerate(layout.parts)]
    player = rng.random(22)
    vector = np.concatenate([np.concatenate(one_hot, -1).ravel(), player])
    seen = jax.jit(craftax._spelled, static_argnums=1)(vector, layout)
    assert (seen["map"] == numbers).all() and np.allclose(seen["player"], player)


@pytest.mark.parametrize(
    ("id", "text"),
    [
        pytest.param(id, text, marks=installed(id.split("/")[0]))
        for id, text in {
            "brax/fast": "it is no task",
            "craftax/Craftax-Symbolic-AutoReset-v1": "it is Craftax-Symbolic-v1",
            "jumanji/Sokoban-v0": "it downloads its levels",
            "pgx/bridge_bidding": "it needs a table",
            "xminigrid/MiniGrid-Playground": "it has no goal",
            "xminigrid/XLand-MiniGrid-R1-9x9": "it has no goal",
        }.items()
    ],
)
def test_what_is_not_offered_says_why(id, text):
    with pytest.raises(environments.UnknownEnvironmentError, match=f"not offered: {text}"):
        environments.make(id)
    assert id not in environments.list_ids(id.split("/")[0])


# Settings of the process: in 64 bits the libraries would give other numbers, and some could not be compiled at all.

PLAY = """
import hashlib, sys
import jax, numpy as np
import environments
from ldm_jax import spaces

for id in sys.argv[1:]:
    environment = environments.make(id, 3, time_limit=4)
    reset, step = environment.reset, environment.step
    state, time_step = reset(jax.random.key(0))
    seen, space = [time_step], environment.spec.action_space
    actions = [spaces.zeros(space, (3,)) for _ in range(9)]
    for t, action in enumerate(actions):
        if isinstance(action, np.ndarray) and action.dtype == np.int32 and t % 2:
            action = action.astype(np.int64)  # as 64 bits would have it
        state, time_step = step(state, action)
        seen.append(time_step)
    if environment.spec.jittable:  # and in one program
        run = lambda key: jax.lax.scan(lambda state, action: step(state, action), reset(key)[0], np.stack(actions))[1]
        seen.append(jax.jit(run)(jax.random.key(1)))
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(seen)]
    print(id, *sorted({str(leaf.dtype) for leaf in leaves}), hashlib.sha256(b"".join(map(bytes, leaves))).hexdigest())
"""


def play_in_a_process(names, **variables):
    command, environment = [sys.executable, "-c", PLAY, *names], {**os.environ, **variables}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_time_steps_are_the_same_where_the_process_computes_in_64_bits():
    wanted = ("gymnax/Pendulum-v1", "pgx/tic_tac_toe", "envpool/Pendulum-v1", "gymnasium/CartPole-v1")
    names = [name for name in wanted if importlib.util.find_spec(name.split("/")[0]) is not None]
    plain = play_in_a_process(names, JAX_ENABLE_X64="0")
    assert len(plain.splitlines()) == len(names) and "64 " not in plain
    assert play_in_a_process(names, JAX_ENABLE_X64="1") == plain
