"""The total order of tokens, against Python's sort."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.reference.rows import best
from tokencurric.ranking import full_precision, keep_largest, keep_top, rank_keys, with_position

SMALLEST = 2.0**-149  # of float32; a decimal near it would be another number to Python and the same to torch
SCORE = st.floats(width=32) | st.sampled_from((0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, SMALLEST, -SMALLEST))
SCORES = st.lists(SCORE, min_size=1, max_size=12)


NEIGHBOURS = [0.0, SMALLEST, 2 * SMALLEST, -SMALLEST, -2 * SMALLEST, 1.0, 1 + 2**-23, -1.0, -1 - 2**-23]


@given(SCORES)
@example(NEIGHBOURS)
@example([*NEIGHBOURS[::-1], math.nan, -math.inf, math.inf])
def test_keys_sort_as_python_does(scores: list[float]):
    keys = rank_keys(torch.tensor(scores, dtype=torch.float32))
    assert keys.unique().numel() == len(scores)
    assert keys.argsort(descending=True).tolist() == best(scores)


@pytest.mark.parametrize("order", [best, lambda scores: sorted(range(len(scores)), key=lambda i: -scores[i])])
def test_the_stated_order_is_not_just_any(order):
    # The control: a plain sort puts NaN elsewhere.
    scores = [math.nan, 1.0, 2.0, 2.0]
    keys = rank_keys(torch.tensor(scores))
    assert (keys.argsort(descending=True).tolist() == order(scores)) == (order is best)


def test_products_stay_in_float32_under_autocast():
    one = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (one @ one).dtype == torch.bfloat16
        with full_precision(one.device):
            assert (one @ one).dtype == torch.float32
        assert (one @ one).dtype == torch.bfloat16
    with full_precision(torch.device("meta")):  # which has no autocast
        pass


def test_scores_are_compared_in_float32():
    close = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert rank_keys(close).argmax() == 0
    assert rank_keys(torch.tensor([1.0, 1.0 + 1e-6], dtype=torch.float64)).argmax() == 1


def test_minus_zero_equals_zero():
    assert rank_keys(torch.tensor([-0.0, 0.0])).argmax() == 0


def test_nan_of_either_sign_is_below_minus_infinity():
    payloads = torch.tensor([0x7FC00000, -0x400000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    keys = rank_keys(torch.cat((payloads, torch.tensor([-math.inf]))))
    assert keys.argmax() == 3
    assert keys.argsort(descending=True).tolist() == [3, 0, 1, 2]


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=8))
@example([5, 6, 5, 4, -(2**31), 2**31 - 1, -1, 0])
def test_whole_numbers_rank_with_the_earlier_position_first(values: list[int]):
    keys = with_position(torch.tensor(values))
    assert keys.argsort(descending=True).tolist() == sorted(range(len(values)), key=lambda i: (-values[i], i))


@given(st.lists(st.tuples(SCORE, st.booleans()), min_size=0, max_size=8), st.data())
def test_the_largest_valid_are_kept(entries: list[tuple[float, bool]], data: st.DataObject):
    scores, valid = [s for s, _ in entries], [v for _, v in entries]
    count = data.draw(st.integers(0, sum(valid)))
    places = [i for i, real in enumerate(valid) if real]
    expected = sorted(places[i] for i in best([scores[i] for i in places])[:count])
    mask = keep_top(
        torch.tensor([scores]).view(1, -1), torch.tensor([valid], dtype=torch.bool).view(1, -1), torch.tensor([count])
    )
    assert mask[0].nonzero().flatten().tolist() == expected


def test_rows_have_counts_of_their_own():
    keys = rank_keys(torch.tensor([[1.0, 2.0, 3.0]] * 3))
    mask = keep_largest(keys, torch.ones(3, 3, dtype=torch.bool), torch.tensor([0, 1, 3]))
    assert mask.int().tolist() == [[0, 0, 0], [0, 0, 1], [1, 1, 1]]
