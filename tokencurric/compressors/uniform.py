"""Uniform: evenly spread over the visual sequence at every budget."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tokencurric.budget import Budget, row_budget
from tokencurric.compressors.protocol import Tags
from tokencurric.ranking import keep_largest, with_position
from tokencurric.view import Signal, VisualView


@dataclass(frozen=True)
class Uniform:
    """Keeps tokens that are evenly spread over the visual sequence: the lowest ranks of the van der Corput order.

    Token i is ranked by the bits of i reversed, so that 0, 1/2, 1/4, 3/4, ... of the sequence come first. Any number
    of lowest ranks is spread evenly, and they are nested. The honest baseline beside `Random`.

    Example:
        >>> Uniform()(VisualView(tokens=torch.zeros(1, 8, 4)), keep=4).int().tolist()
        [[1, 0, 1, 0, 1, 0, 1, 0]]

    Source: van der Corput 1935.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset()
    tags: ClassVar[Tags] = Tags(uses_position=True)

    @torch.no_grad()
    def __call__(self, view: VisualView, keep: Budget, *, seed: int = 0) -> Bool[Tensor, "batch visual"]:
        """The mask of survivors; `seed` changes nothing."""
        count = row_budget(keep, view.mask)
        return keep_largest(with_position(-_reverse_bits(view.rank.clamp(min=0))), view.mask, count)


def _reverse_bits(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The low 32 bits of `x` in reverse, halved to stay within 31."""
    for shift, low in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        x = ((x & low) << shift) | ((x >> shift) & low)
    return x >> 1
