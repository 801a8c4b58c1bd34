"""Rows that `generate` repeats: beams, and several answers to one prompt."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokencurric.adapters.record import Request
from tokencurric.adapters.seam import Call
from tokencurric.token_budget import Count, Cut


def for_rows_of(call: Call, request: Request) -> Request:
    """A request whose tensors have an entry for each row of a call.

    Where `generate` repeats each row, what the caller gave per row is repeated likewise. Only rows that are really
    repeated are: tensors of another batch stay as they are, and are refused where they are used.

    Args:
        call: call of the decoder.
        request: what the caller asked for.

    Example:
        >>> from tokencurric import Uniform
        >>> one = Request(Uniform(), (Cut(2, Count(4)),), visual=torch.tensor([[True, False]]))
        >>> rows = Call(content=torch.tensor([[7, 8], [7, 8]]))
        >>> for_rows_of(rows, one).visual.tolist()
        [[True, False], [True, False]]
    """
    given: list[Any] = [request.visual, request.query, request.groups, request.row_key]
    given += [cut.amount.keep for cut in request.cuts if isinstance(cut.amount, Count)]
    rows = {len(each) for each in given if isinstance(each, Tensor) and each.ndim}
    content = call.content
    if content is None or len(rows) != 1 or (times := _times(content, rows.pop())) == 1:
        return request
    again = partial(_repeated, times=times)
    cuts = tuple(
        Cut(cut.layer, Count(again(cut.amount.keep)) if isinstance(cut.amount, Count) else cut.amount)
        for cut in request.cuts
    )
    return replace(
        request,
        cuts=cuts,
        visual=again(request.visual),
        query=again(request.query),
        groups=again(request.groups),
        row_key=again(request.row_key),
    )


def _times(content: Tensor, rows: int) -> int:
    """How often each of `rows` rows stands in `content`, one after the other; 1 if it does not."""
    if rows == 0 or len(content) % rows or len(content) == rows:
        return 1
    each = content.view(rows, -1, *content.shape[1:])
    return each.shape[1] if torch.equal(each, each[:, :1].expand_as(each)) else 1


def _repeated(value: Any, times: int) -> Any:
    return value.repeat_interleave(times, 0) if isinstance(value, Tensor) and value.ndim else value
