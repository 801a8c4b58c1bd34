"""What a compressor is asked in one example: rows of tokens, how they are packed, a budget and a seed.

A case is a short description, not a tensor: `Case(...)` as printed in a failure makes the same view again, and
Hypothesis shrinks it to few tokens.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from tokencurric.budget import Budget
from tokencurric.draws import hash_ints
from tokencurric.testing.described import Described
from tokencurric.testing.packing import SIGNALS, TEXT, Packed, Packing, Row, pack
from tokencurric.view import VisualView

Counted: TypeAlias = Literal["int64", "int32", "int16", "int8", "uint8"]
Kind: TypeAlias = Literal["normal", "close", "duplicates", "zeros", "ties", "huge", "tiny", "nan", "inf", "distinct"]
# "distinct", of which no two are equal in rows of any length, is for real sizes alone.
KINDS: tuple[Kind, ...] = ("normal", "close", "duplicates", "zeros", "ties", "huge", "tiny", "nan", "inf")

DIM, KV_HEADS, HEAD_DIM = 3, 2, 2
_SHAPES: dict[str, tuple[int, ...]] = {
    "tokens": (DIM,),
    "normed_tokens": (DIM,),
    "keys": (KV_HEADS, HEAD_DIM),
    "attention": (),
    "cls_attention": (),
    "text_tokens": (DIM,),
    "normed_text_tokens": (DIM,),
    "text_keys": (KV_HEADS, HEAD_DIM),
}


@dataclass(frozen=True, repr=False)
class RowSpec(Described):
    """One sample: `count` visual tokens and `text` prompt tokens with values of one kind.

    Args:
        count: visual tokens. text: prompt tokens. kind: of values. seed: of values. key: the sample's `row_key`.

    Example:
        >>> RowSpec(2, kind="zeros").content({"attention"}).signals["attention"].tolist()
        [0.0, 0.0]
    """

    count: int = 1
    text: int = 1
    kind: Kind = "normal"
    seed: int = 0
    key: int = 0

    def content(self, names: Collection[str]) -> Row:
        """The values of `tokens` and of the signals in `names`."""
        made = {name: self._values(name) for name in SIGNALS if name in names and name in _SHAPES}
        return Row(tokens=self._values("tokens"), signals=made, text=self.text, key=self.key)

    def _values(self, name: str) -> Tensor:
        # What a row holds depends on its description alone: never on the batch, nor on which signals are asked for.
        spread = hash_ints(self.seed, list(_SHAPES).index(name)) >> 1
        g = torch.Generator().manual_seed(spread)
        attention, shape = name.endswith("attention"), _SHAPES[name]
        count = self.text if name in TEXT else self.count
        if self.kind == "distinct":
            drawn = torch.randperm(count, generator=g).add(1).div(count + 1)
            return drawn if attention else torch.randn(count, *shape, generator=g)
        if attention:
            values = torch.rand(count, *shape, generator=g).mul(1e4).round().div(1e4)
        else:
            values = torch.randn(count, *shape, generator=g).mul(100).round().div(100)
        return _of_kind(self.kind, values, self._marks(count))

    def _marks(self, count: int) -> Tensor:
        """One number in 0..2 a token, the same for all signals: which token is a twin of which, which one is bad."""
        g = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, 3, (count,), generator=g)


def _of_kind(kind: Kind, values: Tensor, marks: Tensor) -> Tensor:
    bad = (marks == 0).view(-1, *[1] * (values.ndim - 1))
    if kind == "duplicates":  # of two or three different tokens; quarters make every product exact in float32
        return values.mul(4).round().div(4)[marks.clamp(max=max(len(values) - 1, 0))]
    if kind == "close":  # by more than rounding in float32, by less in half precision
        return 1 + values.mul(100).round().div(1e4)
    if kind == "ties":
        return values.mul(2).round().div(2).clamp(-1, 1)
    scales = {"zeros": 0.0, "huge": 1e30, "tiny": 1e-40}
    if kind in scales:
        return values * scales[kind]
    if kind == "nan":
        return values.masked_fill(bad, float("nan"))
    if kind == "inf":
        return torch.where(bad, values.sign() * float("inf"), values).nan_to_num(
            nan=0.0, posinf=float("inf"), neginf=float("-inf")
        )
    return values


SIMPLE = Packing()


@dataclass(frozen=True, repr=False)
class Case(Described):
    """A question to a compressor.

    Args:
        rows: the samples of the batch. packing: how they lie in the padded layout.
        keep: one budget for all rows, or one a row. seed: passed to the compressor.
        counted: dtype of the tensor that holds one budget a row.

    Example:
        >>> case = Case(rows=(RowSpec(2), RowSpec(1)), keep=1)
        >>> case.view().counts.tolist(), case.budget()
        ([2, 1], 1)
    """

    rows: tuple[RowSpec, ...] = (RowSpec(),)
    packing: Packing = SIMPLE
    keep: int | tuple[int, ...] = 1
    seed: int = 0
    counted: Counted = "int64"

    def pack(self, names: Collection[str] = frozenset(SIGNALS)) -> Packed:
        """The batch with the signals in `names`, and where its tokens stand."""
        return pack([row.content(names) for row in self.rows], self.packing, names)

    def view(self, names: Collection[str] = frozenset(SIGNALS)) -> VisualView:
        """The view alone, to try a counterexample by hand."""
        return self.pack(names).view

    def budget(self) -> Budget:
        """`keep` as a compressor gets it."""
        if isinstance(self.keep, int):
            return self.keep
        return torch.tensor(self.keep, dtype=getattr(torch, self.counted))

    def kept(self, row: int) -> int:
        """How many tokens of `row` an exact compressor keeps."""
        wanted = self.keep[row] if isinstance(self.keep, tuple) else self.keep
        return min(wanted, self.rows[row].count)

    def alone(self, row: int) -> "Case":
        """The question for one row by itself, padded to the width it has in the batch."""
        keep = self.keep[row] if isinstance(self.keep, tuple) else self.keep
        one = self.rows[row]
        wide = replace(
            self.packing,
            extra=self.packing.extra + max(other.count for other in self.rows) - one.count,
            text_extra=self.packing.text_extra + max(other.text for other in self.rows) - one.text,
        )
        return replace(self, rows=(one,), keep=keep, packing=wide)

    def told(self, subject: Any) -> str:
        """The case for a person: the recipe, and the values the subject reads if they are few."""
        lines = [f"case: {self!r}"]
        names = sorted(subject.needs) or ["tokens"]
        if sum(row.count + row.text for row in self.rows) <= 12:
            for number, row in enumerate(self.rows):
                content = row.content(names)
                for name in names:
                    values = content.tokens if name == "tokens" else content.signals.get(name)
                    if values is not None:
                        lines.append(f"row {number}, {name}: {_numbers(values)}")
        return "\n".join(lines)


def _numbers(values: Tensor) -> str:
    flat = [[float(f"{x:.4g}") for x in token] for token in values.flatten(1).tolist()] if values.ndim > 1 else values
    return str(flat.tolist() if isinstance(flat, Tensor) else flat)
