"""Standard errors and differences against their definitions."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokencurric.errors import RangeError, ShapeError
from tokencurric.evaluation import Difference, binomial_error, paired_difference, recovered_share

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


@given(pairs)
def test_paired_difference_equals_its_definition(pairs):
    after, before = (torch.tensor(column) for column in zip(*pairs, strict=True))
    each = [int(a) - int(b) for a, b in pairs]
    found = paired_difference(after, before)
    assert found.mean == pytest.approx(statistics.fmean(each))
    assert found.error == pytest.approx(statistics.stdev(each) / math.sqrt(len(each)))
    back = paired_difference(before, after)
    assert (back.mean, back.error) == (pytest.approx(-found.mean), pytest.approx(found.error))


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_binomial_error_equals_its_definition(answers):
    share = sum(answers) / len(answers)
    assert binomial_error(torch.tensor(answers)) == pytest.approx(math.sqrt(share * (1 - share) / len(answers)))


def test_pairing_is_what_makes_the_error_small():
    right = torch.arange(100) % 2 == 0
    better = right.clone()
    better[1] = True
    paired = paired_difference(better, right)
    unpaired = math.hypot(binomial_error(better), binomial_error(right))
    assert paired.mean == pytest.approx(0.01)
    assert paired.error < unpaired / 5
    shuffled = paired_difference(better.roll(1), right)
    assert shuffled.error > 5 * paired.error, "control: the order of the questions matters"


def test_significance_looks_both_ways():
    assert Difference(0.1, 0.04).significant()
    assert Difference(-0.1, 0.04).significant()
    assert not Difference(0.1, 0.04).significant(3)
    assert not paired_difference(torch.tensor([True]), torch.tensor([False])).significant()


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_recovered_share_solves_for_the_accuracy_after(full, before, after):
    share = recovered_share(full, before, after)
    if full <= before:
        assert share is None
    elif full - before > 1e-6:
        assert before + share * (full - before) == pytest.approx(after)


def test_errors_say_what_is_missing(unchecked):
    with pytest.raises(ShapeError, match="binomial_error needs one truth value a question"):
        binomial_error(torch.tensor([], dtype=torch.bool))
    with pytest.raises(ShapeError, match="same questions"):
        paired_difference(torch.tensor([True, False]), torch.tensor([True, False, True]))
    with pytest.raises(RangeError, match=r"after=1\.5"):
        recovered_share(1.0, 0.5, 1.5)
