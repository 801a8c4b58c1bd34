"""Random: uniform without replacement."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from tokencurric.budget import Budget, row_budget
from tokencurric.compressors.protocol import Tags
from tokencurric.draws import hash_tensor
from tokencurric.ranking import keep_largest, with_position
from tokencurric.view import Signal, VisualView


@dataclass(frozen=True)
class Random:
    """Keeps a uniform draw without replacement.

    Each token's score is a hash of (seed, row_key, number of the token in its row); the largest survive. So the draw
    is nested, and the same in any batch, on any device and in a replay. Rows with equal keys get equal draws: in
    `compress` the key is, unless `row_key` is given, a hash of the prompt's tokens, whatever the picture shows.

    Example:
        >>> mask = Random()(VisualView(tokens=torch.zeros(2, 16, 4)), keep=4, seed=1)
        >>> mask.sum(1).tolist()
        [4, 4]

    Source: the "random" rows of EPIC (arXiv:2510.00515). Differs: drawn by hash, not from a generator's state.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset()
    tags: ClassVar[Tags] = Tags(deterministic=False, uses_position=True)

    @torch.no_grad()
    def __call__(self, view: VisualView, keep: Budget, *, seed: int = 0) -> Bool[Tensor, "batch visual"]:
        """The mask of survivors."""
        count = row_budget(keep, view.mask)
        score = hash_tensor(seed, view.keys_of_rows[:, None], view.rank) >> 32  # 32 signed bits
        return keep_largest(with_position(score), view.mask, count)
