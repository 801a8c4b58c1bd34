"""Descriptions that read easily."""

from dataclasses import fields
from typing import Any


class Described:
    """A `repr` that leaves out what has its default value: the counterexample shows only what matters."""

    def __repr__(self) -> str:
        items: tuple[Any, ...] = fields(self)  # type: ignore[arg-type]  # those who inherit are dataclasses
        said = [item.name for item in items if getattr(self, item.name) != item.default]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in said)})"
