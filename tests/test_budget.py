"""Ratio to count, and what a budget may be."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokencurric import keep_count
from tokencurric.budget import check_budget, row_budget
from tokencurric.errors import RangeError, ShapeError

SIZES, PERCENTS = range(1025), range(101)


def exact(n: int, percent: int) -> int:
    return n - math.ceil(Fraction(n * percent, 100))


def test_every_size_and_whole_percent_is_exact():
    assert [(n, p) for n in SIZES for p in PERCENTS if keep_count(n, p / 100) != exact(n, p)] == []


def test_the_usual_formula_would_not_be():
    wrong = [(n, p) for n in SIZES for p in PERCENTS if int(n * (1 - p / 100)) != exact(n, p)]
    assert len(wrong) > 500


@given(st.integers(0, 5000), st.integers(1, 300), st.data())
def test_a_fraction_is_exact(n: int, denominator: int, data: st.DataObject):
    part = data.draw(st.integers(0, denominator))
    assert keep_count(n, part / denominator) == n - math.ceil(Fraction(n * part, denominator))


@given(st.integers(0, 5000), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_ratio_never_keeps_more(n: int, a: float, b: float):
    assert keep_count(n, max(a, b)) <= keep_count(n, min(a, b))


@pytest.mark.parametrize("ratio", [0, 0.0, 1, 1.0])
def test_the_ends(ratio: float):
    assert keep_count(7, ratio) == (0 if ratio else 7)


@pytest.mark.parametrize("ratio", [-1e-9, 1 + 1e-9, math.nan, math.inf, 64])
def test_a_ratio_outside_is_refused(ratio: float):
    with pytest.raises(RangeError, match=r"keep_count needs 0 <= ratio <= 1; got ratio=.*use a count"):
        keep_count(576, ratio)


def test_a_negative_size_is_refused():
    with pytest.raises(RangeError, match="keep_count needs a whole number n >= 0; got n=-1"):
        keep_count(-1, 0.5)


VALID = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.parametrize(
    ("keep", "counts"),
    [(0, [0, 0]), (2, [2, 1]), (9, [3, 1]), (torch.tensor([1, 5]), [1, 1]), (torch.tensor([3, 0]), [3, 0])],
)
def test_a_row_keeps_no_more_than_it_has(keep: int | torch.Tensor, counts: list[int]):
    found = row_budget(keep, VALID)
    assert found.tolist() == counts
    assert found.dtype == torch.int64


@pytest.mark.parametrize("keep", [-1, torch.tensor([2, -1])])
def test_a_negative_budget_is_refused(keep: int | torch.Tensor):
    with pytest.raises(RangeError, match="A budget needs counts >= 0; got keep="):
        check_budget(keep, 2)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("keep", [0.5, True, None, "2"])
def test_what_is_no_count_is_refused(keep: object):
    with pytest.raises(RangeError, match=r"A budget needs a whole number of tokens; got keep=.*ratio="):
        check_budget(keep, 2)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "keep",
    [
        torch.tensor([1.0, 2.0]),
        torch.tensor([True, True]),
        torch.tensor([1, 2, 3]),
        torch.tensor(1),
        torch.tensor([1j, 2]),
    ],
)
def test_a_tensor_that_is_no_budget_is_refused(keep: torch.Tensor):
    with pytest.raises(ShapeError, match=r"A budget needs one whole number a row, shape \(2,\); got dtype="):
        check_budget(keep, 2)


def test_a_budget_without_values_is_not_read():
    check_budget(torch.empty(2, dtype=torch.int64, device="meta"), 2)
