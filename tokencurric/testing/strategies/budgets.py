"""Budgets: none, one, some, all, more than there are; for all rows or a row."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor

# What `st.composite` passes; its own protocol for it cannot be checked when shapes and types are.
Draw: TypeAlias = Callable[[st.SearchStrategy[Any]], Any]


@cache
def counts(most: int) -> st.SearchStrategy[int]:
    """A budget for rows of up to `most` tokens; 0, `most` and one more often.

    Example:
        >>> from hypothesis import given
        >>> @given(counts(5))
        ... def test_it(keep):
        ...     assert 0 <= keep <= 6
        >>> test_it()
    """
    return st.integers(0, most + 1) | st.sampled_from((0, 1, most, most + 1))


def budgets(rows: Sequence[int]) -> st.SearchStrategy[int | Tensor]:
    """A budget for rows with these numbers of tokens, as a compressor takes it: an int, or one count a row.

    Example:
        >>> from hypothesis import given
        >>> @given(budgets([4, 2]))
        ... def test_it(keep):
        ...     assert isinstance(keep, int) or keep.shape == (2,)
        >>> test_it()
    """
    each = st.tuples(*(counts(count) for count in rows)).map(torch.tensor)
    return counts(max(rows, default=0)) | each if rows else counts(0)
