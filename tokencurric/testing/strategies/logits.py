"""Logits of a student and a teacher, described by shape, kind and seed."""

from dataclasses import dataclass
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from tokencurric.testing.described import Described

LogitKind = Literal["normal", "peaked", "masked", "flat"]


@dataclass(frozen=True, repr=False)
class LogitsCase(Described):
    """Two sets of logits [positions vocab].

    Args:
        positions, vocab: the shape. kind: "peaked" logits are in the thousands, "masked" ones are −inf at one
            word, "flat" ones are equal. seed: of the values. temperature: τ.

    Example:
        >>> student, teacher = LogitsCase(positions=2, vocab=3).tensors()
        >>> student.shape, bool((student == teacher).all())
        (torch.Size([2, 3]), False)
    """

    positions: int = 1
    vocab: int = 2
    kind: LogitKind = "normal"
    seed: int = 0
    temperature: float = 1.0

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Student and teacher."""
        g = torch.Generator().manual_seed(self.seed)
        both = torch.randn(2, self.positions, self.vocab, generator=g).mul(8).round().div(8)
        if self.kind == "peaked":
            both = both * 1e3
        elif self.kind == "flat":
            both = both * 0
        elif self.kind == "masked":
            both[..., -1] = float("-inf")
        student, teacher = both.to(dtype)
        return student, teacher


def logits(*, kinds: tuple[LogitKind, ...] = ("normal", "peaked", "masked", "flat")) -> st.SearchStrategy[LogitsCase]:
    """Logits of up to four positions and five words.

    Example:
        >>> from hypothesis import given
        >>> @given(logits())
        ... def test_it(case):
        ...     assert case.tensors()[0].shape == (case.positions, case.vocab)
        >>> test_it()
    """
    return st.builds(
        LogitsCase,
        positions=st.integers(1, 4),
        vocab=st.integers(2, 5),
        kind=st.sampled_from(kinds),
        seed=st.integers(0, 999),
        temperature=st.sampled_from((1.0, 2.0, 0.5)),
    )
