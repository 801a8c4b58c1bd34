"""What the library exports, found by what it is: a new compressor, schedule or divergence needs no entry here."""

import inspect
from collections.abc import Callable
from typing import Any

import tokencurric.compressors
import tokencurric.losses
from tokencurric import Compressor
from tokencurric.testing.strategies.schedules import classes


def compressors() -> list[Compressor]:
    """An instance of every exported class that satisfies the protocol and can be made without arguments."""
    found = [value for value in vars(tokencurric.compressors).values() if inspect.isclass(value)]
    concrete = [kind for kind in found if not getattr(kind, "_is_protocol", False) and _needs_no_argument(kind)]
    return [one for kind in concrete if isinstance(one := kind(), Compressor)]


def divergences() -> list[Callable[..., Any]]:
    """Every exported function of a student, a teacher and a temperature."""
    found = [value for value in vars(tokencurric.losses).values() if inspect.isfunction(value)]
    return [
        value for value in found if list(inspect.signature(value).parameters) == ["student", "teacher", "temperature"]
    ]


def schedules() -> tuple[type[Any], ...]:
    """Every exported class of schedules."""
    return classes()


def _needs_no_argument(kind: type[Any]) -> bool:
    parameters = inspect.signature(kind).parameters.values()
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
