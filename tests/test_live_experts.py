"""Experts beside the simulators: their labels, that these change nothing, and misbehaviour of every kind."""

import fnmatch
import functools
import importlib
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from test_isolation import LIBRARY, LIMIT_S, make, play, same, worker_spec

import environments
import ldm_jax
from environments.catalog.experts import LISTS, read_list
from environments.isolation import IsolatedEnvironment, Isolation
from environments.isolation.worker.experts import GeneratorState

FILE = str(LIBRARY / "experts.py")


def with_expert(name):
    return {"expert": name, "expert_file": FILE}


def make_for_the_kit(batch_size, expert, of="Steady", options=(), call_timeout_s=10):
    spec = worker_spec(of, **dict(options), **(with_expert(expert) if expert else {}))
    return IsolatedEnvironment(spec, batch_size, None, Isolation(workers=1, call_timeout_s=call_timeout_s))


def actions(steps, rows=4):
    return np.random.default_rng(0).integers(0, 3, (steps, rows))


def test_an_expert_labels_every_time_step_but_the_last_of_an_episode_whoever_acts():
    with make("Steady", spec_options=with_expert("Follows"), call_timeout_s=10) as environment:
        seen = play(environment, actions(40))
        report = environment.expert_report
    for time_step in seen:
        label, valid = time_step.expert
        np.testing.assert_array_equal(valid, ~time_step.last)
        np.testing.assert_array_equal(label[valid], 1 + time_step.observation["place"][valid, 1] % 2)
    assert report.counts["labels"] == report.counts["asked"] == sum(int(step.expert.valid.sum()) for step in seen)
    assert not report.notes


@pytest.fixture(scope="module")
def plain():
    """A run without an expert, where there is neither an array nor a label."""
    with make("Steady", workers=1) as environment:
        seen = play(environment, actions(8))
        assert environment.expert_report is None
        assert not {"label/0", "label_valid", "expert"} & environment._batch.arrays.keys()
    assert all(time_step.expert is None for time_step in seen)
    return seen


@pytest.mark.parametrize(
    ("name", "of", "options"),
    [
        ("Follows", "Steady", {}),
        ("Keys", "Steady", {}),
        ("SaysThatItDraws", "Steady", {}),
        ("DrawsGlobally", "Shared", {"global_randomness": True}),
        ("Samples", "Everything", {}),
    ],
)
def test_experts_that_keep_the_contract_pass_the_kit(name, of, options):
    made = functools.partial(make_for_the_kit, of=of, options=options)
    assert environments.check_expert(made, name, batch_size=2, steps=10).counts["labels"] > 40


# What the worker counts, and what it says of the first.
LEFT_OUT = {
    "Raises": ("raised", r"RuntimeError: no idea \(experts.py, line \d+, in label\)"),
    "Exits": ("raised", r"SystemExit: 3"),
    "Slow": ("slow", "more than 0.01 s"),
    "Outside": ("nonsense", r"\[4\], which is not allowed in Discrete\(4\)"),
    "Halves": ("nonsense", "is 1.5, expected whole numbers of int32"),
    "NotANumber": ("nonsense", "nan is not finite"),
    "Words": ("nonsense", "is left, expected numbers"),
    "TooMany": ("nonsense", r"is \[1, 2\], expected numbers of shape \[\]"),
    "WrongKeys": ("nonsense", "it says that its labels follow from"),
    "Tires": ("none", ""),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_an_expert_gets_wrong_has_no_label_is_counted_and_told_of_once(name, plain, caplog):
    count, text = LEFT_OUT[name]
    limits = {"label_limit_s": 0.01, "call_timeout_s": 10, "workers": 1}
    with make("Steady", spec_options=with_expert(name), **limits) as environment:
        seen = play(environment, actions(8))
        report = environment.expert_report
        assert not environment.faults
    assert all(same(one._replace(expert=None), other) for one, other in zip(seen, plain, strict=True))
    valid = sum(int(step.expert.valid.sum()) for step in seen)
    assert report.counts[count] > 0
    assert report.counts["labels"] == valid < report.counts["asked"] == 36
    assert len(report.notes) <= 2
    assert not text or any(re.search(text, note) for note in report.notes), report.notes
    assert not text or "its expert: row" in caplog.text


@pytest.mark.parametrize("name", ["Raises", "Outside", "Draws", "WrongKeys", "Meddles", "CannotBeMade"])
def test_the_kit_finds_an_expert_that_misbehaves(name):
    law = "labelling" if name == "Meddles" else "labels"
    with pytest.raises(environments.ConformanceError, match=f"breaks the law of {law}"):
        environments.check_expert(make_for_the_kit, name, batch_size=2, steps=10)


def test_the_kit_says_of_an_expert_that_hangs_what_it_did():
    slow = functools.partial(make_for_the_kit, call_timeout_s=LIMIT_S)
    with pytest.raises(environments.ConformanceError, match=r"law of labels.* had \d faults: .*had not answered"):
        environments.check_expert(slow, "Hangs", batch_size=2, steps=10)


def test_an_expert_that_draws_from_the_environment_s_generator_changes_nothing_and_is_told_of(plain):
    with make("Steady", spec_options=with_expert("Draws"), workers=1) as environment:
        seen = play(environment, actions(8))
        report = environment.expert_report
    assert all(same(one._replace(expert=None), other) for one, other in zip(seen, plain, strict=True))
    assert report.counts["drew"] and "drew from the environment's own generator" in report.notes[0]


DRAWS = {
    "nothing": lambda generator: None,
    "a double": lambda generator: generator.random(),
    "half a number": lambda generator: generator.random(dtype=np.float32),
    "a whole number": lambda generator: generator.integers(7),
    "normal": lambda generator: generator.normal(size=3),
    "an order": lambda generator: generator.permutation(5),
}


@hypothesis.given(st.integers(0, 2**128), st.lists(st.sampled_from(sorted(DRAWS)), max_size=6), st.booleans())
def test_a_generator_s_state_is_seen_to_change_as_numpy_says_and_put_back(seed, draws, by_memory):
    generator = np.random.default_rng(seed)
    state = GeneratorState(generator)
    assert state._parts  # as this numpy keeps it
    if not by_memory:
        state._parts = []
    first, told = state.read(), generator.bit_generator.state
    for draw in draws:
        before, told_before = state.read(), generator.bit_generator.state
        DRAWS[draw](generator)
        assert (state.read() == before) == (generator.bit_generator.state == told_before)
    expected = np.random.default_rng(seed).random(dtype=np.float32)
    state.write(first)
    assert state.read() == first and generator.bit_generator.state == told
    assert generator.random(dtype=np.float32) == expected


def test_an_expert_that_hangs_costs_the_worker_which_says_so():
    with make("Steady", spec_options=with_expert("Hangs")) as environment:
        seen = play(environment, actions(5))
        assert environment.faults == {"hang": 2}
        assert "its expert had been asked for a label and had not answered" in environment.reports[0].text
    assert seen[3].truncated.all() and not seen[3].expert.valid.any()
    assert seen[4].first.all() and seen[4].expert.valid.all()


def test_an_expert_that_is_not_there_is_refused_by_name():
    with pytest.raises(environments.ExpertError, match=r"no expert 'x': it has babyai-bot"):
        environments.make("minigrid/BabyAI-GoToLocal-v0", expert="x")
    with pytest.raises(environments.ExpertError, match="it has none"):
        environments.make("gymnasium/CartPole-v1", expert="x")
    with (
        pytest.raises(ldm_jax.EnvironmentFaultError, match="KeyError: 'Missing'"),
        make("Steady", spec_options=with_expert("Missing")),
    ):
        pass


def test_an_expert_is_told_what_was_executed_where_a_bridge_does_something_else():
    with make("Replaces", spec_options=with_expert("Follows"), workers=1, call_timeout_s=10) as environment:
        seen = play(environment, actions(8))
        assert environment.expert_report.counts["raised"] == 0
    assert all(time_step.expert.valid.all() for time_step in seen)


def test_every_live_expert_on_the_list_has_a_program_and_each_of_its_patterns_an_id():
    verified = environments.list_ids()
    for expert in read_list(LISTS / "live.jsonl"):
        assert expert.kind == "live"
        program = importlib.import_module(f"environments.bridges.experts.{expert.module}").EXPERTS[expert.name]
        assert all(callable(getattr(program, call)) for call in ("reset", "label", "observe"))
        for pattern in expert.ids:
            assert fnmatch.filter(verified, pattern), f"{expert.name}: no id of the catalog is like {pattern}"
    for id in verified:
        names = [expert.name for expert in environments.experts(id)]
        assert len(set(names)) == len(names), f"{id} has two experts of one name"


@pytest.mark.builds
@pytest.mark.parametrize(
    ("id", "name"),
    [
        ("minigrid/BabyAI-GoToLocal-v0", "babyai-bot"),
        ("antibiosim/antibiosim/DoseOptimization-v0", "rule"),
        ("controlgym/toy", "lqr"),
        ("controlgym/toy", "lqg"),
        ("simglucose/simglucose-adult-001-v0", "basal-bolus"),
        ("metaworld/reach-v3", "scripted-policy"),
        ("open_spiel/kuhn_poker", "best-response"),
        ("open_spiel/connect_four", "mcts"),
        ("ogbench/pointmaze-medium-singletask-v0", "oracle-subgoal"),
        ("nasim/Tiny-v0", "search"),
        ("bsuite/catch/0", "rule"),
        ("gym-classics/WindyGridworld-v0", "value-iteration"),
        ("gymnasium-robotics/PointMaze_UMaze-v3", "shortest-path"),
        ("ogbench/cube-single-singletask-task1-v0", "oracle-cube"),
        ("or-gymnasium/InvManagement-v0", "base-stock"),
        ("or-gym-inventory/or_gym_inventory/Newsvendor-v0", "newsvendor"),
        ("procedural-frozenlake/Procedural-FrozenLake-v1", "value-iteration"),
        ("gym-electric-motor/Cont-CC-PMSM-v0", "cascade"),
        ("gym-anm/ANM6Easy-v0", "mpc"),
    ],
)
def test_experts_of_the_libraries_pass_the_kit(id, name):
    assert environments.check_expert(id, name, batch_size=2, steps=20).counts["labels"]
