"""The laws of a schedule."""

import math
import pickle
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

import tokencurric.schedules
from tokencurric.errors import RangeError
from tokencurric.schedules import Schedule
from tokencurric.testing.check import Broken, Check
from tokencurric.testing.strategies.schedules import progress


def _itself(subject: Any) -> Any:
    return subject


def _has(*names: str) -> Callable[[Any], bool]:
    """Whether the schedule has all of these attributes, and so makes the claim that goes with them."""

    def found(subject: Any) -> bool:
        return all(hasattr(subject, name) for name in names)

    return found


def _always(_: Any) -> bool:
    return True


def schedule_law(
    law: str, *, applies: Callable[[Any], bool] = _always, cases: st.SearchStrategy[Any] | None = None
) -> Callable[[Callable[[Any, Any], None]], Check]:
    """Make a check of a function (schedule, progress) that raises `Broken`."""

    def made(body: Callable[[Any, Any], None]) -> Check:
        name: str = body.__name__
        drawn = progress() if cases is None else cases
        return Check(name=name, law=law, cases=lambda _: drawn, body=body, applies=applies, prepare=_itself)

    return made


@schedule_law("At every progress the value is a finite number.")
def is_finite(schedule: Schedule, beta: float) -> None:
    """No NaN, no infinity, no tensor."""
    value: Any = schedule(beta)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Broken(f"At {beta} it is {value!r}.")


@schedule_law("It starts at `start` and approaches `end`.", applies=_has("start", "end"))
def meets_its_ends(schedule: Any, _: float) -> None:
    """Exactly, so that a ratio bound of 0 or 1 is one."""
    found = schedule(0.0), schedule(1.0)
    if found != (schedule.start, schedule.end):
        raise Broken(f"It runs from {found[0]!r} to {found[1]!r}.")


@schedule_law(
    "It moves from `start` to `end` without turning back, unless it says `monotone = False`.",
    applies=lambda schedule: _has("start", "end")(schedule) and getattr(schedule, "monotone", True),
    cases=st.lists(progress(), min_size=2, max_size=6).map(sorted),
)
def never_turns_back(schedule: Any, betas: list[float]) -> None:
    """And so stays between the two."""
    rises = schedule.end >= schedule.start
    low, high = sorted((schedule.start, schedule.end))
    values = [schedule(beta) for beta in betas]
    slack = 1e-12 * max(1.0, abs(low), abs(high))
    for a, b in pairwise(values):
        if (b - a if rises else a - b) < -slack:
            raise Broken(f"At {betas} it is {values}: from {a!r} it turns to {b!r}.")
    if not all(low - slack <= value <= high + slack for value in values):
        raise Broken(f"At {betas} it is {values}, outside [{low}, {high}].")


@schedule_law("It stays between `low` and `high`.", applies=_has("low", "high"))
def stays_in_its_range(schedule: Any, beta: float) -> None:
    """What a clipped schedule claims."""
    value = schedule(beta)
    if not schedule.low <= value <= schedule.high:
        raise Broken(f"At {beta} it is {value!r}, outside [{schedule.low}, {schedule.high}].")


@schedule_law("It takes no value but its `values`, the first at 0 and the last at 1.", applies=_has("values"))
def takes_its_values(schedule: Any, beta: float) -> None:
    """What a staircase claims."""
    if schedule(beta) not in schedule.values:
        raise Broken(f"At {beta} it is {schedule(beta)!r}, which is none of {schedule.values}.")
    if (schedule(0.0), schedule(1.0)) != (schedule.values[0], schedule.values[-1]):
        raise Broken(f"It runs from {schedule(0.0)!r} to {schedule(1.0)!r}, with the values {schedule.values}.")


@schedule_law(
    "The same progress gets the same value, whatever was asked before.", cases=st.lists(progress(), max_size=4)
)
def keeps_no_count(schedule: Schedule, betas: list[float]) -> None:
    """Pure: a resumed training asks from the middle."""
    before = schedule(0.5)
    for beta in betas:
        schedule(beta)
        if schedule(0.5) != before:
            raise Broken(f"At 0.5 it is {before!r}, and {schedule(0.5)!r} after it was asked for {beta}.")


@schedule_law(
    "A progress outside [0, 1], or NaN, is refused with RangeError.",
    cases=st.sampled_from((-1e-9, 1 + 1e-9, 17, -1, math.nan, math.inf)),
)
def refuses_what_is_no_progress(schedule: Schedule, beta: float) -> None:
    """A step that was passed for a fraction would else go unnoticed."""
    try:
        value = schedule(beta)
    except RangeError:
        return
    raise Broken(f"At {beta} it answers {value!r}.")


@schedule_law("What comes back from pickling is equal and answers alike.")
def survives_pickling(schedule: Schedule, beta: float) -> None:
    """As a checkpoint needs it."""
    back = pickle.loads(pickle.dumps(schedule))
    if back != schedule or back(beta) != schedule(beta):
        raise Broken(f"It comes back as {back!r}, equal: {back == schedule}; at {beta}: {back(beta)!r}.")


@schedule_law("Its `repr`, evaluated, is equal to it.")
def is_made_again_by_its_repr(schedule: Schedule, beta: float) -> None:
    """As a log or a configuration needs it."""
    names = {**vars(tokencurric.schedules), **vars(sys.modules[type(schedule).__module__])}
    back = eval(repr(schedule), {**names, "inf": math.inf, "nan": math.nan})
    if back != schedule:
        raise Broken(f"{schedule!r} evaluates to {back!r}.")
