"""Laws of time steps and of the schema of a stored one."""

import ast
import pathlib

import examples
import jax
import numpy as np
import pytest
from gymnasium import spaces as gs
from hypothesis import given, settings
from hypothesis import strategies as st
from spaces_strategies import action_spaces, any_spaces

from ldm_jax import spaces
from ldm_jax.encoding import transition
from ldm_jax.encoding.actions import Distribution, action_layout
from ldm_jax.types import TimeStep

ROOT = pathlib.Path(__file__).parents[1]


def test_time_steps_are_built_by_keywords():
    """Three of their parts are booleans of one shape, which nothing would notice swapped."""
    wrong = []
    for folder in ("ldm_jax", "environments", "data", "experiments", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                called = node.func if isinstance(node, ast.Call) else None
                name = getattr(called, "id", getattr(called, "attr", None))
                if name == "TimeStep" and node.args:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def draw_transition(observation_space, action_space, lead, seed, masked, distribution):
    """A transition of random values in the dtypes of the schema."""
    rng = np.random.default_rng(seed)
    layout = action_layout(action_space, low=-1.0, high=1.0)
    choices, slots = layout.flat_choices, layout.continuous
    return transition.Transition(
        timestep=TimeStep(
            observation=examples.random_tree(observation_space, lead, rng),
            reward=rng.normal(size=lead).astype(np.float32),
            terminated=rng.random(lead) < 0.5,
            truncated=rng.random(lead) < 0.5,
            first=rng.random(lead) < 0.5,
            action_mask=rng.random((*lead, choices)) < 0.5 if masked else None,
        ),
        action=examples.random_tree(action_space, lead, rng),
        reference_action=examples.random_tree(action_space, lead, rng),
        distribution=Distribution(
            logits=rng.normal(size=(*lead, choices)).astype(np.float16),
            mean=rng.normal(size=(*lead, slots)).astype(np.float32),
            scale=rng.random((*lead, slots)).astype(np.float32),
        )
        if distribution
        else None,
        label_mask=rng.random(lead) < 0.5,
    )


@settings(max_examples=60, deadline=None)
@given(any_spaces, action_spaces, st.booleans(), st.booleans(), st.integers(0, 1000))
def test_transitions_survive_their_leaves_and_leaves_follow_the_schema(seen, acted, masked, distribution, seed):
    for lead in ((4,), (3, 2)):
        before = draw_transition(seen, acted, lead, seed, masked, distribution)
        leaves = transition.to_leaves(seen, acted, before)
        schema = transition.transition_schema(seen, acted, masked=masked, distribution=distribution)
        assert list(leaves) == list(schema)
        for name, struct in schema.items():
            assert leaves[name].dtype == struct.dtype and leaves[name].shape == (*lead, *struct.shape)
        after = transition.from_leaves(seen, acted, leaves)
        assert jax.tree.structure(after) == jax.tree.structure(before)
        jax.tree.map(np.testing.assert_array_equal, after, before)
        assert transition.to_leaves(seen, acted, after).keys() == leaves.keys()


@settings(max_examples=40, deadline=None)
@given(any_spaces, action_spaces, st.booleans(), st.data())
def test_every_leaf_that_is_not_as_the_schema_says_is_named(seen, acted, masked, data):
    schema = transition.transition_schema(seen, acted, masked=masked)
    shapes = {name: (struct.shape, np.dtype(struct.dtype)) for name, struct in schema.items()}
    transition.check_leaves(seen, acted, shapes, "it")
    required = [name for name in shapes if name != "action_mask" and not name.startswith("reference/")]
    names = data.draw(st.lists(st.sampled_from(required), min_size=3, max_size=3, unique=True))
    missing, misshapen, mistyped = names
    wrong = {name: shape for name, shape in shapes.items() if name != missing}
    wrong[misshapen] = ((*shapes[misshapen][0], 7), shapes[misshapen][1])
    wrong[mistyped] = (shapes[mistyped][0], np.dtype(np.complex64))
    wrong["observation/never seen"] = ((), np.dtype(np.float32))
    with pytest.raises(spaces.SpaceError) as raised:
        transition.check_leaves(seen, acted, wrong, "part-00001 of here/There-v0")
    text = str(raised.value)
    assert text.startswith("the leaves of part-00001 of here/There-v0 are not those of its spaces")
    assert f"{missing} is nothing" in text and f"{mistyped} is complex64" in text and f"{misshapen} is " in text
    assert "observation/never seen is float32[], expected no such leaf" in text
    assert len(text.split("; ")) == 4


def test_half_a_distribution_is_not_taken_for_one():
    seen, acted = gs.Discrete(2), gs.Tuple([gs.Discrete(2), gs.Box(-1, 1, (1,))])
    leaves = transition.to_leaves(seen, acted, draw_transition(seen, acted, (4,), 0, masked=False, distribution=True))
    for name in ("reference/logits", "reference/mean", "reference/scale"):
        part = {key: value for key, value in leaves.items() if key != name}
        with pytest.raises(KeyError, match=name):
            transition.from_leaves(seen, acted, part)
        shapes = {key: (value.shape[1:], value.dtype) for key, value in part.items()}
        with pytest.raises(spaces.SpaceError, match=f"{name} is nothing, expected"):
            transition.check_leaves(seen, acted, shapes, "it")
