"""Dtypes, memory layouts and numbers that are none."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tokencurric.compressors import Compressor
from tokencurric.testing.answers import question, same, with_rows
from tokencurric.testing.cases import Case
from tokencurric.testing.check import Broken
from tokencurric.testing.laws.budget import CLEAR
from tokencurric.testing.laws.claims import compressor_law
from tokencurric.testing.packing import Dtype, Layout

COARSE: tuple[Dtype, ...] = ("bfloat16", "float16", "float64")
_THROUGH: dict[Dtype, Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda x: x.bfloat16().float(),
    "float16": lambda x: x.half().float(),
    "float64": lambda x: x,
}


@compressor_law(
    "The answer depends on numbers, not on the dtype that holds them; scores are compared in float32.",
    kinds=("normal", "close"),
    dtypes=False,
    least=2,
    partial=True,
)
def answers_alike_in_every_dtype(subject: Compressor, case: Case) -> None:
    """Numbers that half precision can hold, in half and in full precision."""
    for coarse in COARSE:
        rounded = [row.content(subject.needs).changed(_THROUGH[coarse], text=True) for row in case.rows]
        laid = replace(case, packing=replace(case.packing, dtype=coarse))
        full, other = (with_rows(subject, one, rounded).survivors(subject) for one in (case, laid))
        told = f"In float32 it keeps {full}; the same numbers in {coarse}: {other}."
        same(subject, case, full, other, told=told, rows=rounded)


@compressor_law("Strides of the memory change nothing.", **CLEAR)
def answers_alike_in_every_layout(subject: Compressor, case: Case) -> None:
    """Strided tensors, and rows that are one row expanded."""
    twins = replace(case, rows=tuple(replace(case.rows[0], key=row.key) for row in case.rows))
    keep = case.keep if isinstance(case.keep, int) else (case.keep[0],) * len(case.rows)
    layouts: tuple[tuple[Layout, Case], ...] = (("strided", case), ("expanded", replace(twins, keep=keep)))
    for layout, one in layouts:
        laid = replace(one, packing=replace(one.packing, layout=layout))
        plain, other = question(subject, one).survivors(subject), question(subject, laid).survivors(subject)
        same(subject, one, plain, other, told=f"Contiguous it keeps {plain}; {layout}, {other}.")


@compressor_law(
    "A token of NaN is dropped before any other, unless no value matters at all.",
    kinds=("normal",),
    dtypes=False,
    least=2,
    partial=True,
)
def ranks_nan_last(subject: Compressor, case: Case) -> None:
    """One token of the first row is NaN in everything that is said of it."""
    before = question(subject, case).survivors(subject)[0]
    count = case.rows[0].count
    for bad in {0, count - 1}:

        def spoilt(x: Tensor, bad: int = bad) -> Tensor:
            return x.index_fill(0, torch.tensor([bad]), float("nan"))

        rows = [row.content(subject.needs) for row in case.rows]
        kept = with_rows(subject, case, [rows[0].changed(spoilt), *rows[1:]]).survivors(subject)[0]
        if kept != before and bad in kept and len(kept) < count:
            raise Broken(f"With token {bad} all NaN, row 0 keeps {kept} of its {count} tokens.")
