"""Views and attention maps as tensors, for tests that do not go through the checks."""

from collections.abc import Collection

from hypothesis import strategies as st
from torch import Tensor

from tokencurric.testing.cases import Case
from tokencurric.testing.packing import SIGNALS
from tokencurric.testing.strategies.cases import cases
from tokencurric.view import VisualView


def views(
    *, signals: Collection[str] = SIGNALS, least: int = 0, most: int = 8, batch: int = 3
) -> st.SearchStrategy[VisualView]:
    """Views of every sort: ragged, empty and padded rows; duplicates, ties, zeros, extremes, NaN; all dtypes.

    Args:
        signals: which are present. least, most: visual tokens of the first row and of any. batch: most rows.

    Example:
        >>> from hypothesis import given
        >>> @given(views(least=2, signals={"attention"}))
        ... def test_it(view):
        ...     assert view.attention.shape == view.mask.shape
        >>> test_it()
    """
    wanted = frozenset(signals)

    def seen(case: Case) -> VisualView:
        return case.view(wanted)

    return cases(least=least, most=most, batch=batch).map(seen)


def attention_maps(*, most: int = 8, batch: int = 3) -> st.SearchStrategy[Tensor]:
    """The attention signal alone, [batch visual], zeros and ties included, without padding.

    Example:
        >>> from hypothesis import given
        >>> @given(attention_maps())
        ... def test_it(attention):
        ...     assert not attention.isnan().any()
        >>> test_it()
    """

    def attention(case: Case) -> Tensor:
        return case.view({"attention"}).signal("attention", who="attention_maps")

    return cases(kinds=("normal", "ties", "zeros"), least=1, most=most, batch=batch, dense=True, dtypes=False).map(
        attention
    )
