"""From rows of tokens to the padded layout of a view, and back to the tokens of a row."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from tokencurric.testing.described import Described
from tokencurric.view import VisualView

VISUAL = ("keys", "normed_tokens", "attention", "cls_attention")
TEXT = ("text_tokens", "normed_text_tokens", "text_keys")
SIGNALS = (*VISUAL, *TEXT, "grid")

Dtype: TypeAlias = Literal["float32", "float64", "bfloat16", "float16"]
Layout: TypeAlias = Literal["plain", "strided", "expanded"]

_FILLS = {"zeros": 0.0, "huge": 1e4, "nan": float("nan")}
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Row:
    """What one sample holds, without padding.

    Args:
        tokens: [count dim]. signals: [count ...], or [text ...] for those of the prompt.
        text: number of prompt tokens. key: `row_key`.
    """

    tokens: Tensor
    signals: dict[str, Tensor]
    text: int
    key: int

    def changed(self, change: Callable[[Tensor], Tensor], *, text: bool = False) -> "Row":
        """The row after `change` of everything that is said of its visual tokens, and with `text` of its prompt."""
        signals = {name: change(x) if text or name in VISUAL else x for name, x in self.signals.items()}
        return Row(tokens=change(self.tokens), signals=signals, text=self.text, key=self.key)


@dataclass(frozen=True, repr=False)
class Packing(Described):
    """How rows lie in a batch.

    Args:
        place: where padding stands. extra, text_extra: columns beyond the longest row. fill: what padding holds.
        dtype: of all floating-point fields. layout: of their memory; "expanded" is for equal rows.
        requires_grad: of the same fields. keyed, located: whether the view has `row_key` and `positions`.
    """

    place: Literal["right", "left", "scattered"] = "right"
    extra: int = 0
    text_extra: int = 0
    fill: Literal["zeros", "huge", "nan"] = "zeros"
    dtype: Dtype = "float32"
    layout: Layout = "plain"
    requires_grad: bool = False
    keyed: bool = True
    located: bool = False

    def columns(self, count: int, width: int) -> list[int]:
        """Where the `count` tokens of a row stand among `width` columns."""
        if self.place == "left":
            return list(range(width - count, width))
        if self.place == "scattered":
            g = torch.Generator().manual_seed(1000 * width + count)
            return sorted(torch.randperm(width, generator=g)[:count].tolist())
        return list(range(count))

    def laid(self, pieces: Sequence[Tensor], columns: list[list[int]], width: int) -> Tensor:
        """One padded tensor [row width ...] of what the rows hold."""
        full = torch.full((len(pieces), width, *pieces[0].shape[1:]), _FILLS[self.fill], dtype=pieces[0].dtype)
        for number, piece in enumerate(pieces):
            full[number, columns[number]] = piece
        full = full.to(_DTYPES[self.dtype])
        if self.layout == "strided":
            full = torch.stack((full, full), dim=-1)[..., 0]
        elif self.layout == "expanded":
            full = full[:1].expand_as(full)
        return full.requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Packed:
    """A view and, for each row, the columns in which its tokens stand, in order."""

    view: VisualView
    columns: list[list[int]]

    def survivors(self, mask: Tensor) -> list[list[int]]:
        """Numbers of the tokens that survive, row by row, wherever padding put them."""
        kept = mask.bool().tolist()
        return [
            [number for number, column in enumerate(columns) if kept[row][column]]
            for row, columns in enumerate(self.columns)
        ]


def pack(rows: Sequence[Row], packing: Packing, names: Collection[str]) -> Packed:
    """Lay `rows` out as `packing` says, with the signals in `names`.

    Example:
        >>> row = Row(tokens=torch.ones(2, 3), signals={}, text=0, key=0)
        >>> packed = pack([row], Packing(place="left", extra=1), ())
        >>> packed.columns, packed.view.mask.tolist()
        ([[1, 2]], [[False, True, True]])
    """
    counts = [len(row.tokens) for row in rows]
    width = max(counts) + packing.extra
    columns = [packing.columns(count, width) for count in counts]
    fields: dict[str, Any] = {"tokens": packing.laid([row.tokens for row in rows], columns, width)}
    for name in VISUAL:
        if name in names:
            fields[name] = packing.laid([row.signals[name] for row in rows], columns, width)
    if packing.place != "right" or set(counts) != {width}:
        fields["valid"] = _marked(columns, width)
    if not set(TEXT).isdisjoint(names):
        fields |= _prompt(rows, packing, names)
    if "grid" in names:
        fields["grid"] = torch.tensor([[1, count] for count in counts])
    if packing.keyed:
        fields["row_key"] = torch.tensor([row.key for row in rows])
    if packing.located:
        fields["positions"] = torch.arange(5, 5 + width).expand(len(rows), width)
    return Packed(VisualView(**fields), columns)


def _prompt(rows: Sequence[Row], packing: Packing, names: Collection[str]) -> dict[str, Tensor]:
    width = max(row.text for row in rows) + packing.text_extra
    columns = [packing.columns(row.text, width) for row in rows]
    fields = {name: packing.laid([row.signals[name] for row in rows], columns, width) for name in TEXT if name in names}
    if packing.place != "right" or {row.text for row in rows} != {width}:
        fields["text_valid"] = _marked(columns, width)
    return fields


def _marked(columns: list[list[int]], width: int) -> Tensor:
    mask = torch.zeros(len(columns), width, dtype=torch.bool)
    for number, places in enumerate(columns):
        mask[number, places] = True
    return mask
