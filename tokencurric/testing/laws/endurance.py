"""Many calls: what a training of some thousand steps makes of a compressor."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokencurric.compressors import Compressor
from tokencurric.testing.answers import question, unchecked
from tokencurric.testing.cases import Case
from tokencurric.testing.check import Broken
from tokencurric.testing.laws.claims import compressor_law
from tokencurric.testing.laws.purity import MANY
from tokencurric.testing.plain import Plain

CALLS = 1000
_DEEP = 6


@compressor_law("The thousandth call is answered as the first, and calls leave no trace.", examples=1, **MANY)
def never_tires(subject: Compressor, case: Case) -> None:
    """One question, asked again and again. What is stored at the first calls may stay; a count of calls may not."""
    asked = question(subject, case)
    with unchecked(), torch.no_grad():
        first = asked.mask(subject)
        asked.mask(subject)
        before = _state(subject)
        for number in range(3, CALLS + 1):
            if not torch.equal(asked.mask(subject), first):
                raise Broken(f"Asked the same {number} times, it gives another answer at the last.")
            if number == 5:
                _compare(before, _state(subject))


def _compare(before: Mapping[str, object], after: Mapping[str, object]) -> None:
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise Broken(f"Asked the same again, it changes its {', '.join(changed)}. A call may not count or collect.")


def _state(subject: Any) -> dict[str, object]:
    """Attributes of the instance and of its classes, as values that can be compared."""
    subject = subject.function if isinstance(subject, Plain) else subject
    kinds = [kind for kind in reversed(type(subject).__mro__) if kind.__module__ != "builtins"]
    found: dict[str, Any] = {}
    for owner in (*kinds, subject):
        found |= {name: value for name, value in getattr(owner, "__dict__", {}).items() if not name.startswith("__")}
    return {name: _plain(value, _DEEP) for name, value in found.items() if not callable(value)}


def _plain(value: Any, depth: int) -> object:
    """`value` as nested tuples that are equal if the values are."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), repr(value.detach().cpu().tolist())
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if depth == 0 or isinstance(value, str | bytes | int | float | complex | type(None) | type):
        return repr(value)
    if isinstance(value, Mapping):
        return tuple((repr(key), _plain(each, depth - 1)) for key, each in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_plain(each, depth - 1) for each in value)
    inner = getattr(value, "__dict__", None)
    if inner:
        return type(value).__name__, _plain(inner, depth - 1)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
