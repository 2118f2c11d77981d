"""Layouts under any sequence of moves: no layer is covered twice, none is lost, and the counts follow the paper."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lor2c.maths.layout import (
    Layout,
    check_spans,
    choose_injection,
    choose_merge,
    layers_needed,
    legal_injections,
    legal_merges,
)

D, R = 64, 8  # of the stream and of the residuals, wherever parameters are counted


def fresh(depth: int) -> Layout:
    return Layout(depth, check_spans(None, depth))


def legal_moves(layout: Layout) -> list[tuple]:
    return [("merge", *pair) for pair in legal_merges(layout)] + [
        ("inject", layer, R // 2, 16) for layer in legal_injections(layout)
    ]


def play(layout: Layout, move: tuple) -> Layout:
    name, *arguments = move
    return getattr(layout, name)(*arguments)


@st.composite
def histories(draw) -> list[tuple[tuple, Layout]]:
    """Every residual of a model, or some; then legal moves until the draw ends or none is left: (move, layout after it)."""
    depth = draw(st.integers(1, 12))
    kept = draw(st.sets(st.integers(0, depth - 1), min_size=1))
    layout = fresh(depth) if draw(st.booleans()) else Layout(depth, [(layer, layer) for layer in kept])
    history = [((), layout)]
    for _ in range(draw(st.integers(0, 2 * depth))):
        if not (moves := legal_moves(layout)):
            break
        history.append((move := draw(st.sampled_from(moves)), layout := play(layout, move)))
    return history


layouts = histories().map(lambda history: history[-1][1])
scores = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.25, 0.5]), min_size=12, max_size=12)


def covered(layout: Layout) -> list[int]:
    """Every layer as often as something covers it."""
    return sorted([t for a, b in layout.spans for t in range(a, b + 1)] + [one.layer for one in layout.injected])


@given(histories())
def test_every_layer_keeps_exactly_what_covers_it(history):
    first = covered(history[0][1])
    assert len(set(first)) == len(first)
    for _, layout in history:
        assert covered(layout) == first  # none twice, none lost, none won
        assert list(layout.spans) == sorted(layout.spans) and all(0 <= a <= b < layout.depth for a, b in layout.spans)
        assert list(layout.injected) == sorted(layout.injected)


@given(histories())
def test_counts_follow_the_paper_step_by_step(history):
    for (_, before), (move, after) in zip(history, history[1:], strict=False):
        won = after.parameters(D, R) - before.parameters(D, R)
        shared = after.parameters(D, R, share=True) - before.parameters(D, R, share=True)
        last = not after.spans  # the shared A goes with the last residual
        if move[0] == "merge":
            assert (won, shared) == (-2 * D * R, -D * R)
        else:
            assert won == 0
            assert shared == 2 * (R // 2) * 2 * D - D * R - last * D * R


@given(histories(), st.tuples(*4 * [st.integers(1, 128)]))
def test_counts_restated_from_shapes(history, sizes):
    """Every matrix by itself: (r, d) and (d, r), and for LoRA (r', i) and (o, r') on q and on v."""
    q, v = sizes[:2], sizes[2:]
    for _, layout in history:
        lora = sum(one.r * i + o * one.r for one in layout.injected for i, o in (q, v))
        ups = sum(D * R for _ in layout.spans)
        assert layout.parameters(D, R, qv=[q, v]) == 2 * ups + lora
        assert layout.parameters(D, R, share=True, qv=[q, v]) == ups + bool(layout.spans) * R * D + lora


@given(layouts)
def test_legal_is_exactly_what_does_not_raise(layout):
    """Every pair and every layer is tried; a refused move leaves the layout as it was."""
    before = (layout.depth, layout.spans, layout.injected)
    tries = range(-1, layout.depth + 1)
    legal = legal_moves(layout)
    for move in [("merge", a, b) for a in tries for b in tries] + [("inject", t, R // 2, 16) for t in tries]:
        if move in legal:
            assert play(layout, move) != layout
        else:
            with pytest.raises(ValueError, match="residual"):
                play(layout, move)
        assert (layout.depth, layout.spans, layout.injected) == before


@given(layouts)
def test_section_iv_b(layout):
    """Injected layers take no part in merges, no merge reaches across one, merged residuals are not replaced."""
    injected = {one.layer for one in layout.injected}
    for first, second in legal_merges(layout):
        a, b = layout.merge(first, second).span_from(first)
        assert not injected & set(range(a, b + 1))
        assert b == layout.span_from(second)[1]
    assert legal_injections(layout) == [a for a, b in layout.spans if a == b]


@given(layouts, scores, st.none() | st.integers(1, 12))
def test_choices_are_legal_and_minimal(layout, values, longest):
    by_layer = dict(enumerate(values))
    pairs = [p for p in legal_merges(layout) if longest is None or width(layout.merge(*p), p[0]) <= longest]
    assert legal_merges(layout, longest) == pairs
    pair = choose_merge(layout, by_layer, longest)
    sums = [by_layer[a] + by_layer[b] for a, b in pairs]
    assert pair == (pairs[sums.index(min(sums))] if pairs else None)  # index: the lowest layer where sums are equal

    layers = legal_injections(layout)
    for which, best in (("lowest", min), ("highest", max)):
        found = choose_injection(layout, by_layer, which)
        assert found == (layers[(of := [by_layer[t] for t in layers]).index(best(of))] if layers else None)


def width(layout: Layout, start: int) -> int:
    a, b = layout.span_from(start)
    return b - a + 1


@given(st.integers(1, 8), scores, st.integers(0, 8))
def test_no_residual_grows_beyond_longest(longest, values, merges):
    layout, by_layer = fresh(9), dict(enumerate(values))
    for _ in range(merges):
        if pair := choose_merge(layout, by_layer, longest):
            layout = layout.merge(*pair)
    assert max(b - a + 1 for a, b in layout.spans) <= longest


@given(st.integers(1, 8), st.integers(0, 8), st.integers(0, 8))
def test_layers_needed_is_enough_and_one_fewer_is_not(depth, merges, injections):
    """Merges chained from below, injections from above, are the thriftiest; with fewer layers the last move is refused."""

    def all_moves() -> None:
        layout = fresh(depth)
        for i in range(merges):
            layout = layout.merge(0, i + 1)
        for i in range(injections):
            layout = layout.inject(depth - 1 - i, 4, 16)

    if layers_needed(merges, injections) <= depth:
        all_moves()
    else:
        with pytest.raises(ValueError, match="residual"):
            all_moves()


@given(histories())
def test_a_layout_is_a_value(history):
    for _, layout in history:
        again = Layout(layout.depth, layout.spans[::-1], [list(one) for one in layout.injected[::-1]])
        assert again == layout and hash(again) == hash(layout) and str(again) == str(layout)
        with pytest.raises(AttributeError):
            layout.depth = 99
    assert len({str(layout) for _, layout in history}) == len(history)  # each move shows


@pytest.mark.parametrize(
    ("spans", "injected", "says"),
    [
        ([(0, 1), (1, 2)], [], "overlap"),
        ([(0, 4)], [], "not in a model of 4 layers"),
        ([(0, 1)], [(1, 4, 16)], "layer 1 cannot have"),
        ([(0, 0)], [(1, 4, 16), (1, 4, 16)], "layer 1 cannot have"),
        ([(0, 0)], [(4, 4, 16)], "injected layer 4 is not in a model"),
        ([(0, 0)], [(-1, 4, 16)], "injected layer -1 is not in a model"),
        ([(0, 0)], [(1, 0, 16)], "whole number of at least 1, found 0"),
        ([], [], "nothing to train"),
    ],
)
def test_what_no_layout_can_be(spans, injected, says):
    with pytest.raises(ValueError, match=says):
        Layout(4, spans, injected)


ALONE = """
import sys, types
for name, folder in {"lor2c": sys.argv[1], "lor2c.maths": sys.argv[1] + "/maths"}.items():
    sys.modules[name] = types.ModuleType(name)  # an empty one, because the package itself imports its tuners
    sys.modules[name].__path__ = [folder]
sys.modules |= dict.fromkeys(sys.argv[2].split())
"""


def alone(imports: str, absent: str) -> None:
    """Import modules of this floor by themselves, in a process where other packages cannot be imported."""
    folder = Path(inspect.getfile(Layout)).parents[1]
    subprocess.run([sys.executable, "-c", f"{ALONE}\nimport {imports}", folder, absent], check=True)


def test_layouts_need_no_torch():
    alone("lor2c.maths.layout, lor2c.maths.schedule", absent="torch")


def test_maths_needs_neither_peft_nor_transformers():
    modules = "checks", "layout", "lowrank", "orthogonality", "schedule", "sfs"
    alone(", ".join(f"lor2c.maths.{name}" for name in modules), absent="peft transformers")


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
