"""Counts a layer, against a walk from layer to layer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencurric.errors import RangeError
from tokencurric.evaluation import PromptShape, tokens_per_layer


@st.composite
def cuts(draw):
    depth = draw(st.integers(1, 12))
    layers = sorted(draw(st.sets(st.integers(0, depth), min_size=1, max_size=4)))
    keeps = sorted((draw(st.integers(0, 40)) for _ in layers), reverse=True)
    return depth, layers, keeps


@given(cuts(), st.integers(0, 30))
def test_counts_equal_those_of_a_walk_through_the_layers(cut, visual):
    depth, layers, keeps = cut
    alive, walked = visual, []
    for number in range(depth):
        if number in layers:
            alive = min(visual, keeps[layers.index(number)])
        walked.append(alive)
    assert tokens_per_layer(depth, visual, keep=keeps, layer=layers) == tuple(walked)


def test_one_cut_may_be_given_without_lists():
    assert tokens_per_layer(6, 9, keep=4, layer=2) == tokens_per_layer(6, 9, keep=[4], layer=[2]) == (9, 9, 4, 4, 4, 4)
    assert tokens_per_layer(2, 9, keep=4, layer=2) == (9, 9)


@pytest.mark.parametrize(
    ("keep", "layer"),
    [([4, 5], [1, 2]), ([5, 4], [2, 1]), ([5, 4], [2, 2]), ([5], [1, 2]), (-1, 2), (4, 7), (4, -1)],
)
def test_cuts_without_a_meaning_are_refused(keep, layer):
    with pytest.raises(RangeError, match=" needs "):
        tokens_per_layer(6, 9, keep=keep, layer=layer)


def test_a_prompt_has_no_negative_tokens():
    assert PromptShape(3, 4).length == 7
    with pytest.raises(RangeError, match="PromptShape needs counts >= 0"):
        PromptShape(visual=-1, text=0)
