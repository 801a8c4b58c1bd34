"""Spans across expanded marks, and the tokens that carry them, against counting by hand."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tokencurric.data.spans import shift_spans, tokens_in

MARK = "@"
texts = st.text("ab" + MARK, max_size=12)


@given(
    text=texts, widths=st.lists(st.integers(0, 4), min_size=12, max_size=12), edges=st.tuples(*[st.integers(0, 12)] * 2)
)
def test_a_shifted_span_holds_the_expanded_text(text, widths, edges):
    start, end = sorted(min(edge, len(text)) for edge in edges)
    places = [n for n, char in enumerate(text) if char == MARK]
    fills = {place: MARK * width for place, width in zip(places, widths, strict=False)}

    def expand(piece: str, first: int) -> str:
        return "".join(fills.get(first + n, char) for n, char in enumerate(piece))

    whole = expand(text, 0)
    marks = [(place, place + 1) for place in places]
    grown = [(len(expand(text[:place], 0)), len(expand(text[: place + 1], 0))) for place in places]
    ((first, last),) = shift_spans([(start, end)], marks, grown)
    assert whole[first:last] == expand(text[start:end], start)
    assert whole[:first] == expand(text[:start], 0)


@given(
    widths=st.lists(st.integers(0, 3), max_size=8),
    spans=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=3),
)
def test_tokens_in_a_span_are_those_that_share_a_character_with_it(widths, spans):
    ends = torch.tensor(widths, dtype=torch.long).cumsum(0)
    offsets = torch.stack([ends - torch.tensor(widths, dtype=torch.long), ends], -1)
    wanted = {char for start, end in spans for char in range(start, end)}
    inside = {edge for start, end in spans for edge in range(start + 1, end)}
    naive = [
        bool(wanted & set(range(first, last))) if last > first else first in inside for first, last in offsets.tolist()
    ]
    assert tokens_in(offsets, [(start, end) for start, end in spans if start < end]).tolist() == naive


def test_padding_is_in_no_span():
    assert tokens_in(torch.tensor([[0, 0], [0, 1]]), [(0, 1)]).tolist() == [False, True]
