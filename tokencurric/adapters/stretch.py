"""Decoder layers that run on one sequence, and what that sequence is of the full one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from tokencurric.adapters.layout import Layout
from tokencurric.selection import Selection, take

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Shortened:
    """A selection in force.

    Args:
        selection: the survivors. left_padding: of the full sequence, a row. lengths: tokens that are left, a row.
        memo: tensors that several layers share, gathered once.
    """

    selection: Selection
    left_padding: Int[Tensor, " batch"]
    lengths: tuple[int, ...]
    memo: dict[Any, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def dense(self) -> bool:
        """Whether no row has a filler."""
        return len(set(self.lengths)) <= 1

    def once(self, value: T, gather: Callable[[T], T], *key: Any) -> T:
        """`gather(value)`, computed once for each tensor, or tuple of them."""
        name = (id(value), *key)
        if name not in self.memo:
            self.memo[name] = (value, gather(value))  # holding the value keeps its id from being used again
        gathered: T = self.memo[name][1]
        return gathered


@dataclass(frozen=True, eq=False)
class Stretch:
    """Layers that run on one sequence.

    Args:
        layer: the first of them. layout: of their sequence. shortened: what it is of the full one; None means all.
        slots: where its slots stand in the sequence of the layers below; None where that is the same.
    """

    layer: int
    layout: Layout
    shortened: Shortened | None = None
    slots: Int[Tensor, "batch short"] | None = None

    def enter(self, hidden: Float[Tensor, "batch below dim"]) -> Float[Tensor, "batch short dim"]:
        """Hidden states of the layers below, for these."""
        return hidden if self.slots is None else take(hidden, self.slots, 1)
