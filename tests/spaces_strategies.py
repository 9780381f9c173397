"""Hypothesis strategies for Gymnasium spaces."""

import numpy as np
from gymnasium import spaces
from hypothesis import strategies as st

_ENDS = st.floats(-50, 50, width=32)


@st.composite
def boxes(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    dtype = draw(st.sampled_from([np.float32, np.float64, np.uint8, np.int32]))
    if not np.issubdtype(dtype, np.floating):
        low = draw(st.integers(0, 100))
        return spaces.Box(low, low + draw(st.integers(1, 100)), shape, dtype)
    low = np.array([draw(st.one_of(_ENDS, st.just(-np.inf))) for _ in range(int(np.prod(shape)))], dtype)
    width = np.array([draw(st.one_of(st.floats(0.5, 50, width=32), st.just(np.inf))) for _ in low], dtype)
    high = np.where(np.isinf(low), width, np.where(np.isinf(low), 0, low) + width)
    return spaces.Box(low.reshape(shape), high.astype(dtype).reshape(shape), shape, dtype)


discretes = st.builds(lambda n, start: spaces.Discrete(n, start=start), st.integers(1, 30), st.integers(-5, 5))
multi_discretes = st.builds(spaces.MultiDiscrete, st.lists(st.integers(1, 9), min_size=1, max_size=4))
multi_binaries = st.builds(spaces.MultiBinary, st.integers(1, 5))
texts = st.builds(spaces.Text, st.integers(1, 8))


def nested(leaf):
    return st.recursive(
        leaf,
        lambda child: st.one_of(
            st.builds(spaces.Dict, st.dictionaries(st.sampled_from("abcd"), child, min_size=1, max_size=3)),
            st.builds(spaces.Tuple, st.lists(child, min_size=1, max_size=3)),
        ),
        max_leaves=5,
    )


action_spaces = nested(st.one_of(boxes(), discretes, multi_discretes, multi_binaries))
any_spaces = nested(st.one_of(boxes(), discretes, multi_discretes, multi_binaries, texts))
