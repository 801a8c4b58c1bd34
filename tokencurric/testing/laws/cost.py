"""How work grows, counted in operations and elements: a count is the same on every machine, a time is not."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokencurric.compressors import Compressor
from tokencurric.testing.answers import question
from tokencurric.testing.cases import Case, RowSpec
from tokencurric.testing.check import Broken
from tokencurric.testing.laws.claims import compressor_law

KEEP, TOKENS, ROWS = 8, 512, 2
GROWTH = 2.8  # twice the tokens: 2 for linear work, 2.2 for sorting, 4 for a table of all pairs


@dataclass
class Work(TorchDispatchMode):
    """Counts tensor operations, and the elements that they read and write."""

    operations: int = 0
    elements: int = 0

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        out = func(*args, **(kwargs or {}))
        touched = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        self.operations += 1
        self.elements += sum(x.numel() for x in touched)
        return out


def work(subject: Compressor, *, rows: int, tokens: int) -> Work:
    """What one call costs."""
    case = Case(rows=tuple(RowSpec(tokens, text=4, seed=row) for row in range(rows)), keep=KEEP)
    asked = question(subject, case)
    counted = Work()
    with torch.no_grad(), counted:
        asked.mask(subject)
    return counted


@compressor_law("Twice the tokens cost about twice the work, not four times.", examples=1)
def grows_no_faster_than_its_input(subject: Compressor, _: Case) -> None:
    """At a fixed budget. Elements read and written count, so a table of all pairs of tokens shows."""
    small, large = (work(subject, rows=ROWS, tokens=n).elements for n in (TOKENS, 2 * TOKENS))
    if large > GROWTH * small:
        raise Broken(
            f"{TOKENS} tokens touch {small:,} elements, {2 * TOKENS} touch {large:,}: {large / small:.1f} times as "
            "many. Look for a table of all pairs of tokens."
        )


@compressor_law("More rows take no more tensor operations: the batch is one tensor, not a loop.", examples=1)
def runs_rows_together(subject: Compressor, _: Case) -> None:
    """Operations are what a Python loop over the rows multiplies."""
    few, many = (work(subject, rows=rows, tokens=TOKENS // 8).operations for rows in (ROWS, 4 * ROWS))
    if many - few >= 3 * ROWS:  # one for each row that was added
        raise Broken(
            f"{ROWS} rows take {few} tensor operations, {4 * ROWS} rows take {many}. Look for a loop over rows."
        )
