"""What each schedule computes. The laws that all of them obey are tested in tests/testing."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencurric import Constant, Cosine, Linear, Step
from tokencurric.errors import RangeError
from tokencurric.schedules import Clipped, Joined
from tokencurric.testing.strategies import progress, schedules

VALUE = st.floats(-100, 100)


@given(VALUE, VALUE, progress())
def test_linear_and_cosine_are_their_formulas(start: float, end: float, beta: float):
    assert Linear(start, end)(beta) == pytest.approx(start + (end - start) * beta, abs=1e-9)
    assert Cosine(start, end)(beta) == pytest.approx(end + (start - end) * (1 + math.cos(math.pi * beta)) / 2, abs=1e-9)


def test_cosine_is_no_line():
    assert Cosine(0.0, 1.0)(0.25) == pytest.approx(0.1464466)
    assert Linear(0.0, 1.0)(0.25) == 0.25


@given(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300))
def test_ends_are_exact(start: float, end: float):
    for kind in (Linear, Cosine):
        assert (kind(start, end)(0.0), kind(start, end)(1.0)) == (start, end)


@given(VALUE, progress())
def test_constant_stays(value: float, beta: float):
    assert Constant(value)(beta) == value


def test_a_step_takes_the_new_value_at_its_boundary():
    step = Step(values=(1, 2, 3), boundaries=(0.25, 0.5))
    assert [step(beta) for beta in (0, math.nextafter(0.25, 0), 0.25, math.nextafter(0.5, 0), 0.5, 1)] == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]


@pytest.mark.usefixtures("unchecked")
def test_lists_become_tuples():
    assert Step(values=[1, 2], boundaries=[0.5]) == Step(values=(1, 2), boundaries=(0.5,))
    assert hash(Joined(pieces=[Constant(1)], boundaries=[])) == hash(Joined(pieces=(Constant(1),), boundaries=()))


@given(progress())
def test_joined_runs_each_piece_from_its_start_to_its_end(beta: float):
    joined = Joined(pieces=(Linear(0.0, 1.0), Linear(5.0, 7.0)), boundaries=(0.25,))
    expected = beta / 0.25 if beta < 0.25 else 5 + 2 * (beta - 0.25) / 0.75
    assert joined(beta) == pytest.approx(expected)


@given(schedules(), progress(), VALUE, VALUE)
def test_clipped_is_its_schedule_where_that_is_inside(inner, beta: float, a: float, b: float):
    low, high = sorted((a, b))
    value = inner(beta)
    assert Clipped(inner, low, high)(beta) == (low if value < low else high if value > high else value)


def test_clipped_may_have_one_side():
    assert Clipped(Linear(0.0, 1.0), high=0.3)(0.9) == 0.3
    assert Clipped(Linear(-1.0, 1.0), low=0)(0.0) == 0


@pytest.mark.parametrize("kind", ["Linear", "Cosine", "Constant", "Step", "Joined"])
def test_the_one_who_refuses_says_its_name(kind: str):
    one = {
        "Linear": Linear(0.0, 1.0),
        "Cosine": Cosine(0.0, 1.0),
        "Constant": Constant(1),
        "Step": Step(values=(1,), boundaries=()),
        "Joined": Joined(pieces=(Constant(1),), boundaries=()),
    }[kind]
    with pytest.raises(RangeError, match=f"{kind} needs 0 <= progress <= 1; got progress=17. It is step / total"):
        one(17)


def test_a_range_that_is_empty_is_refused():
    with pytest.raises(RangeError, match=r"Clipped needs low <= high; got low=0.5, high=0.3"):
        Clipped(Constant(0), low=0.5, high=0.3)
    with pytest.raises(RangeError, match="Clipped needs low <= high"):
        Clipped(Constant(0), low=math.nan)


@pytest.mark.parametrize(
    "who",
    [lambda b: Step(values=(1, 2), boundaries=b), lambda b: Joined(pieces=(Constant(1), Constant(2)), boundaries=b)],
)
@pytest.mark.parametrize(
    ("boundaries", "words"),
    [
        ((), "needs one boundary fewer than pieces; got 2 pieces"),
        ((0.2, 0.4), "needs one boundary fewer than pieces; got 2 pieces"),
        ((0.0,), "needs boundaries strictly ascending between 0 and 1"),
        ((1.0,), "needs boundaries strictly ascending between 0 and 1"),
        ((math.nan,), "needs boundaries strictly ascending between 0 and 1"),
    ],
)
def test_boundaries_that_do_not_cut_are_refused(who, boundaries: tuple[float, ...], words: str):
    with pytest.raises(RangeError, match=words):
        who(boundaries)


@pytest.mark.parametrize("boundaries", [(0.5, 0.5), (0.6, 0.4)])
def test_boundaries_out_of_order_are_refused(boundaries: tuple[float, float]):
    with pytest.raises(RangeError, match="strictly ascending"):
        Step(values=(1, 2, 3), boundaries=boundaries)
