"""Which positions of a sequence survive: decided once, then applied to any tensor."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from tokencurric.errors import ShapeError


@dataclass(frozen=True, eq=False)
class Selection:
    """The survivors of each row of a batch, text and visual alike, as positions of the full sequence.

    Rows may keep different numbers of tokens. Survivors are right-aligned and ascending; slots to their left, where
    `valid` is False, are fillers: positions that were really dropped, so that no token stands in a row twice.

    Args:
        index: full-sequence position of each slot. valid: which slots hold a survivor. length: of the full sequence.

    Example:
        >>> selection = Selection.from_mask(torch.tensor([[True, False, True], [False, True, False]]))
        >>> selection.index.tolist(), selection.valid.tolist()
        ([[0, 2], [2, 1]], [[True, True], [False, True]])
    """

    index: Int[Tensor, "batch short"]
    valid: Bool[Tensor, "batch short"]
    length: int

    @classmethod
    def from_mask(cls, keep: Bool[Tensor, "batch seq"], *, width: int | None = None) -> "Selection":
        """The selection of the True positions.

        Args:
            keep: survivors. width: the largest number of them in a row, where the caller knows it; None reads it
                from `keep`, which waits for an accelerator.

        Raises:
            ShapeError: `keep` has not two axes, or `width` exceeds the sequence.

        Example:
            >>> Selection.from_mask(torch.ones(1, 4, dtype=torch.bool), width=4).index.tolist()
            [[0, 1, 2, 3]]
        """
        if keep.ndim != 2:
            raise ShapeError(f"Selection needs a mask [batch seq]; got shape {tuple(keep.shape)}. Add the batch axis.")
        length = keep.shape[1]
        if width is None:
            width = int(keep.sum(1).max()) if keep.numel() else 0
        if not 0 <= width <= length:
            raise ShapeError(
                f"Selection needs 0 <= width <= {length}; got width={width}. It is the number of slots of the "
                "short sequence. Leave it out to have it counted."
            )
        order = keep.int().argsort(dim=1, stable=True)  # dropped first, then survivors, both in order
        index = order[:, length - width :]
        return cls(index, keep.gather(1, index), length)

    @property
    def short(self) -> int:
        """Number of slots of the short sequence."""
        return self.index.shape[1]

    @cached_property
    def mask(self) -> Bool[Tensor, "batch seq"]:
        """True at the survivors, on the full sequence."""
        full = torch.zeros(self.index.shape[0], self.length, dtype=torch.bool, device=self.index.device)
        return full.scatter(1, self.index, self.valid)

    @cached_property
    def slot(self) -> Int[Tensor, "batch seq"]:
        """Slot of the nearest survivor at or before each position; of the first survivor where there is none."""
        first = self.short - self.valid.sum(1, keepdim=True)
        before = (self.mask.cumsum(1) - 1).clamp(min=0)
        return (before + first).clamp(max=max(self.short - 1, 0))

    def gather(self, x: Shaped[Tensor, "*any"], axis: int = 1, *, batch_axis: int = 0) -> Shaped[Tensor, "*taken"]:
        """The slots of `x` along `axis`. A batch axis of size 1 is broadcast.

        Raises:
            ShapeError: `x` is not as long as the sequence along `axis`, or has another batch.

        Example:
            >>> Selection.from_mask(torch.tensor([[True, False, True]])).gather(torch.tensor([[5, 6, 7]])).tolist()
            [[5, 7]]
        """
        axis, batch_axis = axis % x.ndim, batch_axis % x.ndim
        if x.shape[axis] != self.length:
            raise ShapeError(
                f"Selection.gather needs {self.length} positions along axis {axis}; got shape {tuple(x.shape)}. "
                "The selection was made for another sequence. Make it anew for this one."
            )
        return take(x, self.index, axis, batch_axis=batch_axis)

    def expand(self, x: Shaped[Tensor, "*any"], axis: int = 1) -> Shaped[Tensor, "*taken"]:
        """Back to full length: a dropped position takes the value of the nearest survivor before it.

        Raises:
            ShapeError: `x` is not as long as the short sequence along `axis`.

        Example:
            >>> selection = Selection.from_mask(torch.tensor([[True, False, True]]))
            >>> selection.expand(torch.tensor([[5, 7]])).tolist()
            [[5, 5, 7]]
        """
        axis = axis % x.ndim
        if x.shape[axis] != self.short:
            raise ShapeError(
                f"Selection.expand needs {self.short} slots along axis {axis}; got shape {tuple(x.shape)}. "
                "It undoes gather(...): pass what gather returned, or what was computed from it."
            )
        return take(x, self.slot, axis)

    def then(self, other: "Selection") -> "Selection":
        """What is left of the full sequence when `other` selects from the slots of this one.

        Args:
            other: of the short sequence; it keeps no filler.

        Raises:
            ShapeError: `other` is of a sequence of another length.

        Example:
            >>> first = Selection.from_mask(torch.tensor([[True, False, True, True]]))
            >>> first.then(Selection.from_mask(torch.tensor([[False, True, True]]))).index.tolist()
            [[2, 3]]
        """
        if other.length != self.short or len(other.index) != len(self.index):
            raise ShapeError(
                f"Selection.then needs a selection of {len(self.index)} rows of {self.short} slots; got one of "
                f"{len(other.index)} rows of {other.length}. It goes on from the short sequence. Make it for that."
            )
        return Selection(self.index.gather(1, other.index), other.valid, self.length)

    def contains(self, other: "Selection") -> Bool[Tensor, " batch"]:
        """Whether every survivor of `other` survives here too, a row.

        Raises:
            ShapeError: the selections are of different sequences.

        Example:
            >>> big = Selection.from_mask(torch.tensor([[True, True, False]]))
            >>> small = Selection.from_mask(torch.tensor([[False, True, False]]))
            >>> big.contains(small).tolist(), small.contains(big).tolist()
            ([True], [False])
        """
        if self.mask.shape != other.mask.shape:
            raise ShapeError(
                f"Selection.contains needs two selections of one sequence; got {tuple(self.mask.shape)} and "
                f"{tuple(other.mask.shape)}. Compare selections of the same batch."
            )
        return (self.mask | ~other.mask).all(1)


def take(
    x: Shaped[Tensor, "*any"], index: Int[Tensor, "batch slot"], axis: int, *, batch_axis: int = 0
) -> Shaped[Tensor, "*taken"]:
    """`x` at `index` along `axis`, a row of `index` for each entry of `batch_axis`; size 1 there is broadcast.

    Raises:
        ShapeError: the batch of `x` is neither that of `index` nor 1.

    Example:
        >>> take(torch.arange(6).view(1, 3, 2), torch.tensor([[2, 0]]), 1).tolist()
        [[[4, 5], [0, 1]]]
    """
    batch, slots = index.shape
    if x.shape[batch_axis] not in (1, batch):
        raise ShapeError(
            f"take needs {batch} rows (or 1) along axis {batch_axis}; got shape {tuple(x.shape)}. "
            "Each row of the index picks from its own row."
        )
    sizes, view = list(x.shape), [1] * x.ndim
    sizes[batch_axis] = view[batch_axis] = batch
    wide = x.expand(sizes)
    sizes[axis] = view[axis] = slots
    ordered = index if batch_axis < axis else index.t()
    return wide.gather(axis, ordered.to(x.device).reshape(view).expand(sizes))
