"""Budgets over the depth of a decoder."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokencurric import TokenBudget, keep_count
from tokencurric.errors import RangeError, ShapeError

COUNT = st.integers(0, 700)


@st.composite
def budgets(draw):
    cuts = draw(st.integers(1, 4))
    layers = sorted(draw(st.lists(st.integers(0, 12), min_size=cuts, max_size=cuts, unique=True)))
    if draw(st.booleans()):
        return TokenBudget(keep=sorted(draw(st.lists(COUNT, min_size=cuts, max_size=cuts)), reverse=True), layer=layers)
    return TokenBudget(ratio=sorted(draw(st.lists(st.floats(0, 1), min_size=cuts, max_size=cuts))), layer=layers)


@given(budgets(), COUNT)
def test_layers_see_what_a_walk_through_them_says(budget, visual):
    expected, left, cuts = [], visual, dict(zip(budget.layer, budget.cuts, strict=True))
    for layer in range(12):
        if layer in cuts:
            amount = cuts[layer].amount
            asked = amount.keep if budget.ratio is None else keep_count(visual, amount.ratio)
            left = min(left, asked)
        expected.append(left)
    assert list(budget.per_layer(visual, 12)) == expected
    assert budget.average(visual, 12) == sum(expected) / 12
    assert budget.kept(visual)[-1] <= visual
    if visual > 0 and budget.layer[0] < 12:
        assert TokenBudget(keep=0, layer=0).per_layer(visual, 12) != tuple([visual] * 12), "control"


@given(st.integers(1, 40), st.integers(1, 700), st.floats(0, 1), st.data())
def test_averaging_meets_the_average(depth, visual, share, data):
    layer = data.draw(st.integers(0, depth - 1))
    low = visual * layer / depth
    tokens = min(visual, low + share * (visual - low))
    budget = TokenBudget.averaging(tokens, visual=visual, depth=depth, layer=layer)
    # One token more or less moves the mean by (depth − layer) / depth.
    assert abs(budget.average(visual, depth) - tokens) <= 0.5 * (depth - layer) / depth + 1e-6


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "either keep or ratio; got keep=None"),
        ({"keep": 4, "ratio": 0.5}, "either keep or ratio; got keep=4"),
        ({"keep": 4, "per": "frame"}, "per='row' or per='image'; got per='frame'"),
        ({"keep": [4, 2]}, "a count or ratio for each layer"),
        ({"ratio": 0.5, "layer": [1]}, "a count or ratio for each layer"),
        ({"keep": [4, 2], "layer": [1, 2, 3]}, "as many layers as counts or ratios, at least one; got 3 layers and 2"),
        ({"keep": [], "layer": []}, "at least one; got 0 layers and 0"),
        ({"keep": [2, 4], "layer": [1, 2]}, "counts that never grow"),
        ({"ratio": [0.5, 0.4], "layer": [1, 2]}, "counts that never grow"),
        ({"keep": [4, 2], "layer": [2, 2]}, "ascending layers"),
        ({"keep": [4, torch.tensor([2, 5])], "layer": [1, 2]}, "counts that never grow"),
        ({"keep": [4, 2], "layer": [2, 1]}, "ascending layers"),
        ({"keep": -1}, "A budget needs counts >= 0; got keep=-1"),
        ({"keep": [4, torch.tensor([1, -1])], "layer": [1, 2]}, r"A budget needs counts >= 0; got keep=\[1, -1\]"),
        ({"keep": 4, "layer": -1}, "whole numbers layer >= 0; got layer=-1"),
        ({"keep": 4, "layer": [0, True]}, "got layer="),
        ({"ratio": 1.5}, "0 <= ratio <= 1; got ratio=1.5"),
    ],
)
def test_what_is_no_budget(arguments, text):
    with pytest.raises(RangeError, match=text):
        TokenBudget(**arguments)


def test_counts_a_row_belong_to_the_same_rows():
    with pytest.raises(ShapeError, match="got 2 and 3 of them"):
        TokenBudget(keep=[torch.tensor([4, 4]), torch.tensor([1, 1, 1])], layer=[1, 2])


def test_questions_without_an_answer():
    with pytest.raises(RangeError, match="Rows differ"):
        TokenBudget(keep=torch.tensor([4, 2])).kept(10)
    with pytest.raises(RangeError, match="layers from 0 to 2"):
        TokenBudget(keep=4, layer=3).per_layer(10, 2)
    with pytest.raises(RangeError, match="depth >= 1"):
        TokenBudget(keep=4, layer=0).average(10, 0)
    with pytest.raises(RangeError, match="n >= 0; got n=-1"):
        TokenBudget(keep=4).kept(-1)
    with pytest.raises(RangeError, match="got tokens=4 with layer=-1 of 8"):
        TokenBudget.averaging(4, visual=10, depth=8, layer=-1)
    with pytest.raises(RangeError, match="an average from 0 to 10; got tokens=4 with layer=0 of 0"):
        TokenBudget.averaging(4, visual=10, depth=0, layer=0)
    with pytest.raises(RangeError, match="an average from 10 to 10; got tokens=4 with layer=1 of 1"):
        TokenBudget.averaging(4, visual=10, depth=1, layer=1)
    with pytest.raises(RangeError, match="an average from 36 to 576; got tokens=20"):
        TokenBudget.averaging(20, visual=576, depth=32, layer=2)
