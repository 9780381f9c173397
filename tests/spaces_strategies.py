"""Hypothesis strategies for Gymnasium spaces."""

import numpy as np
from gymnasium import spaces
from hypothesis import strategies as st

_ENDS = st.floats(-50, 50, width=32)
WHOLE = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.bool_)


def _whole_box(draw, dtype, shape):
    limits = (0, 1) if dtype == np.bool_ else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    reach = draw(st.sampled_from([100, 2**16, 2**33, 2**64]))
    ends = st.integers(max(limits[0], -reach), min(limits[1], reach))
    low, high = sorted((draw(ends), draw(ends)))
    return spaces.Box(np.full(shape, low, dtype), np.full(shape, high, dtype), shape, dtype)


@st.composite
def boxes(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    dtype = draw(st.sampled_from([np.float32, np.float64, np.uint8, np.int32, draw(st.sampled_from(WHOLE))]))
    if not np.issubdtype(dtype, np.floating):
        return _whole_box(draw, dtype, shape)
    low = np.array([draw(st.one_of(_ENDS, st.just(-np.inf))) for _ in range(int(np.prod(shape)))], dtype)
    width = np.array([draw(st.one_of(st.floats(0.5, 50, width=32), st.just(np.inf))) for _ in low], dtype)
    high = np.where(np.isinf(low), width, np.where(np.isinf(low), 0, low) + width)
    return spaces.Box(low.reshape(shape), high.astype(dtype).reshape(shape), shape, dtype)


def _any_end(width):
    return st.floats(allow_nan=False, width=width, allow_subnormal=False)


@st.composite
def any_boxes(draw):
    """Boxes with any bounds that a library can declare."""
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    shape = draw(st.sampled_from([(), (1,), (3,)]))
    ends = _any_end(np.dtype(dtype).itemsize * 8)
    pairs = [sorted((draw(ends), draw(ends))) for _ in range(int(np.prod(shape)))]
    low, high = (np.array(side, dtype).reshape(shape) for side in zip(*pairs, strict=True))
    low, high = np.where(low == np.inf, 0, low).astype(dtype), np.where(high == -np.inf, 0, high).astype(dtype)
    return spaces.Box(np.minimum(low, high), np.maximum(low, high), shape, dtype)


discretes = st.builds(lambda n, start: spaces.Discrete(n, start=start), st.integers(1, 30), st.integers(-5, 5))
multi_discretes = st.builds(spaces.MultiDiscrete, st.lists(st.integers(1, 9), min_size=1, max_size=4))
multi_binaries = st.builds(spaces.MultiBinary, st.integers(1, 5))
texts = st.builds(spaces.Text, st.integers(1, 8))
keys = st.one_of(st.sampled_from("abcd"), st.sampled_from(["", ".", "a/b", "a%2Fb", "%", "value", "é漢"]))


def nested(leaf, keys=keys):
    return st.recursive(
        leaf,
        lambda child: st.one_of(
            st.builds(spaces.Dict, st.dictionaries(keys, child, min_size=1, max_size=3)),
            st.builds(spaces.Tuple, st.lists(child, min_size=1, max_size=3)),
        ),
        max_leaves=5,
    )


def _chosen(box):
    """Whole numbers that the slots of a policy can tell apart."""
    return np.issubdtype(box.dtype, np.floating) or bool((box.high.astype(float) - box.low < 2**16).all())


action_spaces = nested(st.one_of(boxes().filter(_chosen), discretes, multi_discretes, multi_binaries))
any_spaces = nested(st.one_of(boxes(), discretes, multi_discretes, multi_binaries, texts))


def library_sample(space):
    """What the space's own `sample` gives; but the bound of whole numbers to the largest, which it cannot draw."""
    if isinstance(space, spaces.Dict):
        return {key: library_sample(child) for key, child in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(library_sample(child) for child in space.spaces)
    if isinstance(space, spaces.Box) and space.dtype.kind in "iu" and space.high.max(initial=0) >= 2**63 - 1:
        return space.high[()]
    return space.sample()
