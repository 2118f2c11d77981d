"""Spans, whatever they are: legal ones come back sorted and disjoint, the others are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lor2c.stack import check_spans

DEPTH = 12
cuts = st.lists(st.integers(0, DEPTH), min_size=2, max_size=8, unique=True).map(sorted)
pairs = st.tuples(st.integers(-2, DEPTH + 1), st.integers(-2, DEPTH + 1))


@given(cuts, st.randoms(use_true_random=False))
def test_disjoint_spans_in_any_order(edges, random):
    spans = [[a, b - 1] for a, b in zip(edges, edges[1:], strict=False)]
    shuffled = random.sample(spans, len(spans))
    assert check_spans(shuffled, DEPTH) == [tuple(span) for span in spans]


@given(st.lists(pairs, min_size=1, max_size=5))
def test_accepted_exactly_when_legal(spans):
    """The rule restated by brute force: inside the model, forward, and no layer twice."""
    inside = all(0 <= a <= b < DEPTH for a, b in spans)
    layers = [layer for a, b in spans for layer in range(a, b + 1)]
    if inside and len(layers) == len(set(layers)):
        assert check_spans(spans, DEPTH) == sorted(spans)
    else:
        with pytest.raises(ValueError, match="span"):
            check_spans(spans, DEPTH)
