"""FastV: keep what the prompt attends to."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from tokencurric.budget import Budget, row_budget
from tokencurric.compressors.protocol import Tags
from tokencurric.ranking import keep_top
from tokencurric.view import Signal, VisualView


@dataclass(frozen=True)
class FastV:
    """Keeps the visual tokens with the largest attention from the last prompt token, one layer before compressing.

    a_j = mean over heads of softmax(q·K/√d)_j, the softmax over all keys; the paper compresses at layer 2, ratio 0.5.

    Example:
        >>> view = VisualView(tokens=torch.zeros(1, 4, 2), attention=torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
        >>> FastV()(view, keep=2).tolist()
        [[False, True, False, True]]

    Source: Chen et al. 2024, FastV (arXiv:2403.06764), as its code does it: the paper's text averages over queries.
    Differs: the query is the end of the prompt, never a token of the answer or padding.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"attention"})
    tags: ClassVar[Tags] = Tags()

    @torch.no_grad()
    def __call__(self, view: VisualView, keep: Budget, *, seed: int = 0) -> Bool[Tensor, "batch visual"]:
        """The mask of survivors; `seed` changes nothing.

        Raises:
            MissingSignalError: the view has no attention.
        """
        return keep_top(view.signal("attention", who="FastV"), view.mask, row_budget(keep, view.mask))
