"""Cases for compressors: seeded descriptions of rows and layouts, which draw fast and shrink to a few tokens."""

from collections.abc import Sequence
from functools import cache

from hypothesis import strategies as st

from tokencurric.testing.cases import KINDS, Case, Counted, Kind, RowSpec
from tokencurric.testing.packing import Packing
from tokencurric.testing.strategies.budgets import Draw, counts

SEEDS = st.integers(0, 999)


def rows(*, kinds: Sequence[Kind] = KINDS, least: int = 0, most: int = 8, text: int = 3) -> st.SearchStrategy[RowSpec]:
    """A sample with `least` to `most` visual tokens and up to `text` prompt tokens.

    Example:
        >>> from hypothesis import given
        >>> @given(rows(least=2))
        ... def test_it(row):
        ...     assert row.count >= 2
        >>> test_it()
    """
    return st.builds(
        RowSpec,
        count=st.integers(least, most),
        text=st.integers(0, text),
        kind=st.sampled_from(kinds),
        seed=SEEDS,
        key=st.integers(0, 99),
    )


def packings(*, dtypes: bool = True, padded: bool = True, keyed: bool = False) -> st.SearchStrategy[Packing]:
    """A layout.

    Args:
        dtypes: also other dtypes than float32, memory layouts and gradients.
        padded: also padding. keyed: always with `row_key`.

    Example:
        >>> from hypothesis import given
        >>> @given(packings(dtypes=False))
        ... def test_it(packing):
        ...     assert packing.dtype == "float32"
        >>> test_it()
    """
    extras = st.integers(0, 2) if padded else st.just(0)
    return st.builds(
        Packing,
        place=st.sampled_from(("right", "left", "scattered") if padded else ("right",)),
        extra=extras,
        text_extra=extras,
        fill=st.sampled_from(("zeros", "huge", "nan")),
        dtype=st.sampled_from(("float32", "float64", "bfloat16", "float16") if dtypes else ("float32",)),
        layout=st.sampled_from(("plain", "strided") if dtypes else ("plain",)),
        requires_grad=st.booleans() if dtypes else st.just(False),
        keyed=st.just(True) if keyed else st.booleans().map(lambda absent: not absent),
        located=st.booleans(),
    )


@st.composite
def cases(
    draw: Draw,
    *,
    kinds: Sequence[Kind] = KINDS,
    first: Sequence[Kind] | None = None,
    least: int = 0,
    most: int = 8,
    batch: int = 3,
    neighbours: int = 0,
    partial: bool = False,
    dense: bool = False,
    dtypes: bool = True,
    keyed: bool = False,
    per_row: bool = True,
    counted: Sequence[Counted] = (),
    seeds: Sequence[int] = (),
) -> Case:
    """A question to a compressor.

    Args:
        kinds: of values. first: of the first row, if it shall have other kinds than its neighbours.
        least, most: visual tokens a row. batch: most rows.
        neighbours: least number of rows beside the first. partial: the first row keeps some tokens, but not all.
        dense: rows of one length and no padding. dtypes, keyed: as in `packings`.
        per_row: also budgets with one count a row.
        counted: dtypes of the tensor with one count a row; if some are given, no budget is a single count.
        seeds: what the compressor may get instead of small numbers.

    Example:
        >>> from hypothesis import given
        >>> @given(cases(least=2))
        ... def test_it(case):
        ...     assert case.view().counts[0] >= 2
        >>> test_it()
    """
    one = draw(_rows(tuple(first or kinds), least, most))
    fewest, longest = (one.count, one.count) if dense else (0, most)
    more = draw(st.lists(_rows(tuple(kinds), fewest, longest), min_size=neighbours, max_size=batch - 1))
    batch_rows = (one, *more)
    packing = draw(_packings(dtypes, not dense, keyed))
    some = st.integers(1, max(1, one.count - 1))
    keep: st.SearchStrategy[int | tuple[int, ...]]
    keep = some if partial else counts(max(row.count for row in batch_rows))
    if per_row and not dense:
        each = st.tuples(some if partial else counts(one.count), *(counts(row.count) for row in more))
        keep = each if counted else keep | each
    return Case(
        rows=batch_rows,
        packing=packing,
        keep=draw(keep),
        seed=draw(st.sampled_from(seeds) if seeds else st.integers(0, 99)),
        counted=draw(st.sampled_from(counted)) if counted else "int64",
    )


# Hypothesis looks a strategy over when it is first drawn from; made once, that is done once.
@cache
def _rows(kinds: tuple[Kind, ...], least: int, most: int) -> st.SearchStrategy[RowSpec]:
    return rows(kinds=kinds, least=least, most=most)


@cache
def _packings(dtypes: bool, padded: bool, keyed: bool) -> st.SearchStrategy[Packing]:
    return packings(dtypes=dtypes, padded=padded, keyed=keyed)
