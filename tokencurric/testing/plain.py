"""Plain callables as compressors."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from tokencurric.budget import Budget, check_budget
from tokencurric.compressors import Compressor, Tags, require_compressor
from tokencurric.errors import ShapeError
from tokencurric.testing.check import name_of
from tokencurric.view import Signal, VisualView

DEFAULT = Tags()


@dataclass(frozen=True)
class Plain:
    """A callable (tokens, keep) -> mask, seen as a compressor.

    Args:
        function: from tokens [batch visual dim] and one count to a mask [batch visual]. It is asked about rows of
            one length only, since it knows no padding. tags: the laws it claims.

    Example:
        >>> import torch
        >>> def first(tokens, keep):
        ...     return (torch.arange(tokens.shape[1]) < keep).expand(tokens.shape[:2])
        >>> Plain(first)(VisualView(tokens=torch.zeros(1, 3, 2)), keep=1).tolist()
        [[True, False, False]]
    """

    function: Callable[[Tensor, int], Tensor]
    tags: Tags = DEFAULT

    needs: frozenset[Signal] = frozenset()

    def __call__(self, view: VisualView, keep: Budget, *, seed: int = 0) -> Bool[Tensor, "batch visual"]:
        """What the function answers; it gets no seed.

        Raises:
            ShapeError: the budget has one count a row, or the view has padding marks.
        """
        check_budget(keep, view.tokens.shape[0])
        if not isinstance(keep, int) or view.valid is not None:
            raise ShapeError(
                "Plain needs one count for all rows, and rows without padding; got "
                f"keep={keep!r}, valid={'None' if view.valid is None else 'a mask'}. A callable (tokens, keep) knows "
                "neither. Write a class with __call__(view, keep, *, seed=0) to have both."
            )
        return self.function(view.tokens, keep)

    def __repr__(self) -> str:
        return name_of(self.function)


def as_compressor(subject: Any) -> Compressor:
    """`subject` itself if it is a compressor, or the plain callable made one.

    Raises:
        NotACompressorError: it is a class, cannot be called, or is nearly a compressor.

    Example:
        >>> from tokencurric import FastV
        >>> as_compressor(FastV())
        FastV()
    """
    if not isinstance(subject, Compressor) and _takes_tokens(subject):
        return Plain(subject, getattr(subject, "tags", DEFAULT))
    return require_compressor(subject, who="A check", name="subject")


def _takes_tokens(subject: Any) -> bool:
    """Whether it is a callable (tokens, keep), and not nearly a compressor."""
    if isinstance(subject, type) or not callable(subject):
        return False
    try:
        names = list(inspect.signature(subject).parameters)
    except ValueError:  # some builtins have no signature
        return True
    return "seed" not in names and "view" not in names
