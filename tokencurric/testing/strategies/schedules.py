"""Schedules of every exported class, and curricula made of them."""

import dataclasses
import inspect
import typing
from typing import Any

from hypothesis import strategies as st

import tokencurric.schedules
from tokencurric.curriculum import Curriculum, DeepToShallow
from tokencurric.schedules import Clipped, Schedule
from tokencurric.testing.strategies.budgets import Draw


def progress() -> st.SearchStrategy[float]:
    """β in [0, 1], both ends included.

    Example:
        >>> from hypothesis import given
        >>> @given(progress())
        ... def test_it(beta):
        ...     assert 0 <= beta <= 1
        >>> test_it()
    """
    return st.floats(0.0, 1.0) | st.sampled_from((0.0, 1.0, 0.5))


def classes() -> tuple[type[Any], ...]:
    """The schedules that `tokencurric.schedules` exports: a new one is found by itself.

    Example:
        >>> from tokencurric import Linear
        >>> Linear in classes(), Schedule in classes()
        (True, False)
    """
    found = [value for value in vars(tokencurric.schedules).values() if inspect.isclass(value)]
    return tuple(value for value in found if dataclasses.is_dataclass(value))


def schedules(kind: type[Any] | None = None, *, nested: bool = True) -> st.SearchStrategy[Any]:
    """A schedule with values in [0, 1], of one class or of any.

    Args:
        kind: the class. nested: whether schedules may hold others.

    Example:
        >>> from hypothesis import given
        >>> @given(schedules())
        ... def test_it(schedule):
        ...     assert 0 <= schedule(0.5) <= 1
        >>> test_it()
    """
    if kind is not None:
        return arguments(kind).map(lambda chosen: kind(**chosen))
    flat = [one for one in classes() if nested or not _holds_schedules(one)]
    return st.sampled_from(flat).flatmap(schedules)


@st.composite
def arguments(draw: Draw, kind: type[Any]) -> dict[str, Any]:
    """Arguments for the schedule class `kind`, from the types of its fields."""
    types = typing.get_type_hints(kind)
    pieces = draw(st.integers(1, 3))
    chosen: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        chosen[item.name] = draw(_values(item.name, types[item.name], pieces))
    if {"low", "high"} <= chosen.keys():
        chosen["low"], chosen["high"] = sorted((chosen["low"], chosen["high"]))
    return chosen


def _values(name: str, wanted: Any, pieces: int) -> st.SearchStrategy[Any]:
    fractions = st.floats(0.0, 1.0, width=16)
    if name == "boundaries":
        inside = st.floats(0.0, 1.0, width=16, exclude_min=True, exclude_max=True)
        return st.lists(inside, min_size=pieces - 1, max_size=pieces - 1, unique=True).map(sorted).map(tuple)
    if wanted is Schedule:
        return schedules(nested=False)
    if typing.get_origin(wanted) is tuple:
        return st.tuples(*[_values("", typing.get_args(wanted)[0], pieces)] * pieces)
    return fractions


def _holds_schedules(kind: type[Any]) -> bool:
    return any("Schedule" in str(wanted) for wanted in typing.get_type_hints(kind).values())


@st.composite
def curricula(draw: Draw) -> Curriculum:
    """A curriculum whose bounds never cross, with the layer fixed or moving.

    Example:
        >>> from hypothesis import given
        >>> @given(curricula())
        ... def test_it(curriculum):
        ...     assert curriculum.at(1, 2, layers=6).student <= 1
        >>> test_it()
    """
    middle = draw(st.floats(0.0, 1.0, width=16))
    layer = draw(
        st.integers(0, 4).map(tokencurric.schedules.Constant) | st.builds(DeepToShallow, last=st.integers(0, 4))
    )
    return Curriculum(
        low=Clipped(draw(schedules(nested=False)), high=middle),
        high=Clipped(draw(schedules(nested=False)), low=middle),
        margin=draw(schedules(nested=False)),
        layer=layer,
    )
