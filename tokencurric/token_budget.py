"""How many visual tokens each decoder layer sees: said once, answered before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from tokencurric.budget import Budget, check_budget, keep_count
from tokencurric.errors import RangeError, ShapeError


@dataclass(frozen=True, eq=False)
class Count:
    """`keep` tokens of every row, or as many as `keep` says a row.

    Example:
        >>> Count(128)((576, 576))
        128
    """

    keep: Budget

    def __call__(self, counts: tuple[int, ...]) -> Budget:
        """The budget of rows that have `counts` tokens."""
        return self.keep


@dataclass(frozen=True)
class Ratio:
    """The fraction `ratio` of each row's tokens removed.

    Example:
        >>> Ratio(7 / 9)((576, 0, 1152)).tolist()
        [128, 0, 256]
    """

    ratio: float | int

    def __call__(self, counts: tuple[int, ...]) -> Budget:
        """The budget of rows that have `counts` tokens, a row."""
        return torch.tensor([keep_count(n, self.ratio) for n in counts], dtype=torch.int64)


Amount: TypeAlias = Count | Ratio


@dataclass(frozen=True)
class Cut:
    """From decoder layer `layer` on, `amount` of the original visual tokens stay."""

    layer: int
    amount: Amount


@dataclass(frozen=True, eq=False)
class TokenBudget:
    """Visual tokens over the depth of a decoder: one cut, or several.

    Args:
        keep: visual tokens that stay: one count, or one a row; for several cuts a list of these.
        ratio: the fraction removed, instead of `keep`; for several cuts a list. Counts and fractions are of the
            original tokens at every cut, so fractions grow and counts fall.
        layer: first decoder layer that runs on what stays; for several cuts a list, ascending.
        per: what the budget is of: all visual tokens of a "row" together, or each "image" by itself: what the model
            takes as one (a picture or a video; a tile or a frame where it gets those).

    Raises:
        RangeError, ShapeError: not exactly one of keep and ratio is given, their numbers do not match, or one is out
            of range.

    Example:
        >>> budget = TokenBudget(ratio=[0.5, 0.75, 1.0], layer=[8, 16, 24])
        >>> budget.kept(576), budget.average(576, depth=32)
        ((288, 144, 0), 252.0)
        >>> TokenBudget(keep=64, layer=2).per_layer(576, depth=4)
        (576, 576, 64, 64)
    """

    keep: Budget | Sequence[Budget] | None = None
    ratio: float | int | Sequence[float | int] | None = None
    layer: int | Sequence[int] = 2
    per: Literal["row", "image"] = "row"

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.ratio is None):
            raise RangeError(
                f"TokenBudget needs either keep or ratio; got keep={self.keep}, ratio={self.ratio}. keep is the number "
                "of visual tokens that stay, ratio the fraction removed. Give one of them."
            )
        if self.per not in ("row", "image"):
            raise RangeError(
                f"TokenBudget needs per='row' or per='image'; got per={self.per!r}. It is what the budget is of: all "
                "visual tokens of a row, or those of each picture. Choose one."
            )
        amounts, layers = self._amounts(), self._layers()
        given = self.keep if self.ratio is None else self.ratio
        if isinstance(self.layer, Sequence) != isinstance(given, Sequence):
            raise RangeError(
                f"TokenBudget needs a count or ratio for each layer; got layer={self.layer}, keep={self.keep}, "
                f"ratio={self.ratio}. Several cuts are lists of one length, one cut is plain numbers. Make them alike."
            )
        if len(amounts) != len(layers) or not layers:
            raise RangeError(
                f"TokenBudget needs as many layers as counts or ratios, at least one; got {len(layers)} layers and "
                f"{len(amounts)}. Each cut is a layer and what stays from there on. Make the lists equally long."
            )
        if any(a >= b for a, b in pairwise(layers)) or any(_grows(a, b) for a, b in pairwise(amounts)):
            raise RangeError(
                f"TokenBudget needs ascending layers and counts that never grow; got layer={self.layer}, "
                f"keep={self.keep}, ratio={self.ratio}. Dropped tokens do not come back, and every count or ratio is "
                "of the original tokens. Mend the cuts."
            )

    @cached_property
    def cuts(self) -> tuple[Cut, ...]:
        """The cuts, from the lowest layer up."""
        return tuple(Cut(layer, amount) for layer, amount in zip(self._layers(), self._amounts(), strict=True))

    def kept(self, visual: int) -> tuple[int, ...]:
        """Of `visual` tokens of a row (or image), those that stay after each cut.

        Raises:
            RangeError: `visual` is no count, or the budget names counts a row.
        """
        return tuple(min(visual, self._plain(cut.amount, visual)) for cut in self.cuts)

    def per_layer(self, visual: int, depth: int) -> tuple[int, ...]:
        """Of `visual` tokens of a row (or image), those that each of `depth` decoder layers runs on.

        Raises:
            RangeError: as `kept`; or a cut lies above the decoder.
        """
        if any(cut.layer > depth for cut in self.cuts):
            raise RangeError(
                f"TokenBudget needs layers from 0 to {depth}, the depth of the decoder; got layer={self.layer}. "
                f"{depth} compresses nothing. Choose lower layers."
            )
        counts = [visual] * depth
        for cut, count in zip(self.cuts, self.kept(visual), strict=True):
            counts[cut.layer :] = [count] * (depth - cut.layer)
        return tuple(counts)

    def average(self, visual: int, depth: int) -> float:
        """Mean of `per_layer`: what some papers mean by "64 tokens".

        Raises:
            RangeError: as `per_layer`, or `depth` is 0.
        """
        if depth < 1:
            raise RangeError(f"TokenBudget needs depth >= 1; got depth={depth}. It is the number of decoder layers.")
        return sum(self.per_layer(visual, depth)) / depth

    @classmethod
    def averaging(cls, tokens: float | int, *, visual: int, depth: int, layer: int = 2) -> "TokenBudget":
        """The one cut at `layer` whose mean over all layers is `tokens`, or as near as whole tokens allow.

        Args:
            tokens: the layer average wanted. visual: tokens of a row. depth: number of decoder layers.
            layer: where the cut is made; layers below it see everything, which bounds the average from below.

        Raises:
            RangeError: no count gives this average.

        Example:
            >>> budget = TokenBudget.averaging(64, visual=576, depth=32, layer=2)
            >>> budget.keep, budget.average(576, depth=32)
            (30, 64.125)
        """
        if not 0 <= layer < depth or not visual * layer / depth <= tokens <= visual:
            low = visual * layer / max(1, depth)
            raise RangeError(
                f"TokenBudget.averaging needs an average from {low:g} to {visual}; got tokens={tokens} with "
                f"layer={layer} of {depth}. The layers below the cut see all {visual} tokens. Cut at a lower layer, or "
                "ask for more."
            )
        return cls(keep=round((tokens * depth - visual * layer) / (depth - layer)), layer=layer)

    def _layers(self) -> list[int]:
        layers = list(self.layer) if isinstance(self.layer, Sequence) else [self.layer]
        if not all(type(layer) is int and layer >= 0 for layer in layers):
            raise RangeError(
                f"TokenBudget needs whole numbers layer >= 0; got layer={self.layer!r}. It is the first decoder layer "
                "that runs on what stays. Pass an int, or a list of them."
            )
        return layers

    def _amounts(self) -> list[Amount]:
        # What is no ratio or count is refused now, and not at the first batch.
        if self.ratio is not None:
            ratios = list(self.ratio) if isinstance(self.ratio, Sequence) else [self.ratio]
            for ratio in ratios:
                if not isinstance(ratio, int | float):
                    raise RangeError(
                        f"TokenBudget needs numbers as ratios; got {ratio!r}. A ratio is the fraction of visual tokens "
                        "removed. Pass a float, or a list of them for several cuts."
                    )
                keep_count(0, ratio)
            return [Ratio(ratio) for ratio in ratios]
        counts = list(self.keep) if isinstance(self.keep, Sequence) else [self.keep]
        for count in counts:
            check_budget(count, count.shape[0] if isinstance(count, Tensor) and count.ndim == 1 else 1)  # type: ignore[arg-type]
        return [Count(count) for count in counts if count is not None]

    def _plain(self, amount: Amount, visual: int) -> int:
        if isinstance(amount, Ratio):
            return keep_count(visual, amount.ratio)
        keep_count(visual, 0)  # refuses what is no count
        if isinstance(amount.keep, Tensor):
            raise RangeError(
                f"TokenBudget needs one count for all rows to tell what a row keeps; got keep={amount.keep.tolist()}. "
                "Rows differ. Ask a budget with the count of the row in question."
            )
        return amount.keep


def _grows(low: Amount, high: Amount) -> bool:
    """Whether the cut above keeps more than the one below, in some row, as far as the host knows."""
    if isinstance(low, Ratio) and isinstance(high, Ratio):
        return high.ratio < low.ratio
    if isinstance(low, Count) and isinstance(high, Count):
        if isinstance(low.keep, Tensor) and isinstance(high.keep, Tensor) and low.keep.shape != high.keep.shape:
            raise ShapeError(
                f"TokenBudget needs counts a row for the same rows at every cut; got {low.keep.shape[0]} and "
                f"{high.keep.shape[0]} of them. Rows that are missing have no budget. Make the tensors equally long."
            )
        return bool((torch.as_tensor(high.keep).cpu() > torch.as_tensor(low.keep).cpu()).any())
    return False
