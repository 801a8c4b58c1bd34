"""An order of rows in which batches need little padding, and hold pictures in every row or in none."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Sampler

from tokencurric.data.sizes import RowSizes
from tokencurric.draws import hash_tensor
from tokencurric.errors import RangeError

_ROWS, _GROUPS = 0, 1  # two draws of an epoch


class GroupedSampler(Sampler[int]):
    """Rows of like length and of one kind, with pictures or without, follow each other; else the order is random.

    A data loader with this sampler and `batch` rows a batch has each row once an epoch, and at most one batch with rows
    of both kinds. Rows are shuffled, sorted by length within pools, and cut into groups; the groups are shuffled. The
    group with the longest row comes first, so that memory that does not suffice is seen at once. What fills no group
    comes last.

    The order is a function of seed and epoch alone: the same on every rank and after a restart. Accelerate shares out
    the batches, as with any sampler; `EpicTrainer(sizes=...)` makes one and tells it the epoch.

    Args:
        sizes: of the rows. batch: rows a batch, of one process. together: batches that are used at one time, on all
            ranks and accumulated; they make up a group.
        pool: groups a pool. More leave less padding and less chance. With `longest` and `shortest` the lengths of the
            rows of one kind, no pool has more than `(batch - 1) * (longest - shortest)` positions of padding.
        seed: of the order.

    Raises:
        RangeError: a number is below 1.

    Example:
        >>> sizes = RowSizes((9, 700, 8, 650), (0, 1, 0, 1))
        >>> sorted(map(sorted, torch.tensor(list(GroupedSampler(sizes, 2))).view(2, 2).tolist()))
        [[0, 2], [1, 3]]
    """

    def __init__(self, sizes: RowSizes, batch: int, *, together: int = 1, pool: int = 50, seed: int = 0) -> None:
        for name, value in (("batch", batch), ("together", together), ("pool", pool)):
            if value < 1:
                raise RangeError(
                    f"GroupedSampler needs {name} >= 1; got {name}={value}. It is a number of rows or "
                    "of groups of rows. Leave out what you don't mean to set."
                )
        self.batch, self.together, self.pool, self.seed, self.epoch = batch, together, pool, seed, 0
        self._tokens, self._text_only = torch.tensor(sizes.tokens), torch.tensor(sizes.text_only, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self._tokens)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's order comes next."""
        self.epoch = epoch

    def order(self) -> Int[Tensor, " row"]:
        """The epoch's rows, in order."""
        size, shuffled = self.batch * self.together, self._draw(_ROWS, len(self))
        groups, rests = [], []
        for kind in (False, True):
            rows = self._pooled(shuffled[self._text_only[shuffled] == kind], size * self.pool)
            whole = len(rows) // size * size
            groups.append(rows[:whole].view(-1, size))
            rests.append(rows[whole:])
        every = torch.cat(groups)
        every = every[self._draw(_GROUPS, len(every))]
        if len(every):
            first = self._tokens[every].amax(1).argmax()
            every = torch.cat((every[first : first + 1], every[:first], every[first + 1 :]))
        full = [len(rest) // self.batch * self.batch for rest in rests]
        heads = [rest[:count] for rest, count in zip(rests, full, strict=True)]
        tails = [rest[count:] for rest, count in zip(rests, full, strict=True)]
        return torch.cat((every.flatten(), *heads, *tails))

    def _draw(self, what: int, count: int) -> Tensor:
        """A permutation."""
        keys = [torch.tensor(key) for key in (self.epoch, what)]
        return hash_tensor(self.seed, *keys, torch.arange(count)).argsort(stable=True)

    def _pooled(self, rows: Tensor, pool: int) -> Tensor:
        """Sorted by falling length within each pool."""
        number = torch.arange(len(rows)) // pool
        falling = self._tokens[rows].argsort(descending=True, stable=True)
        return rows[falling[number[falling].argsort(stable=True)]]


def padding_share(lengths: Sequence[int] | Int[Tensor, " row"], batch: int) -> float:
    """The share of positions that are padding, where rows come in this order and `batch` of them make a batch.

    Args:
        lengths: tokens of the rows, in order. batch: rows a batch; the last may have fewer.

    Raises:
        RangeError: `batch` is below 1.

    Example:
        >>> padding_share([4, 2, 3, 3], 2) == 2 / 14
        True
    """
    if batch < 1:
        raise RangeError(f"padding_share needs batch >= 1; got batch={batch}. It is a number of rows. Pass 1 or more.")
    rows = torch.as_tensor(lengths, dtype=torch.int64)
    whole = len(rows) // batch * batch
    longest = [rows[:whole].view(-1, batch).amax(1).sum() * batch]
    if whole < len(rows):
        longest.append(rows[whole:].amax() * (len(rows) - whole))
    positions = int(torch.stack(longest).sum())
    return (positions - int(rows.sum())) / max(1, positions)
