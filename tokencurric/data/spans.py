"""From spans of characters to the tokens that carry them, across the expansion of picture marks."""

from bisect import bisect_right
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Span = tuple[int, int]


def shift_spans(spans: Sequence[Span], marks: Sequence[Span], expanded: Sequence[Span]) -> list[Span]:
    """Where spans of a text lie after marks in it were replaced by longer strings.

    Args:
        spans: character spans (start, end) in the text as it was.
        marks: spans of the marks in the same text, ascending, none of them across the edge of a span.
        expanded: the same marks' spans in the text as it became.

    Returns:
        The spans in the text as it became.

    Example:
        >>> shift_spans([(9, 12)], marks=[(0, 7)], expanded=[(0, 28)])
        [(30, 33)]
    """
    ends = [end for _, end in marks]
    gained = [0] + [now - then for (_, then), (_, now) in zip(marks, expanded, strict=True)]

    def moved(char: int) -> int:
        return char + gained[bisect_right(ends, char)]

    return [(moved(start), moved(end)) for start, end in spans]


def tokens_in(offsets: Int[Tensor, "seq 2"], spans: Sequence[Span]) -> Bool[Tensor, " seq"]:
    """Tokens that carry at least one character of a span.

    A token without width counts if it lies strictly inside: some tokenizers report a blank of its own that
        way. Padding
    and tokens that stand for no text are (0, 0) and never count.

    Args:
        offsets: characters (start, end) of each token.
        spans: characters asked for.

    Returns:
        True at tokens that touch a span.

    Example:
        >>> tokens_in(torch.tensor([[0, 0], [0, 4], [4, 6], [6, 6], [6, 9]]), [(5, 8)]).tolist()
        [False, False, True, True, True]
    """
    first, last = offsets.unbind(-1)
    touched = torch.zeros(len(offsets), dtype=torch.bool)
    for start, end in spans:
        touched |= (first < end) & (last > start)
    return touched
