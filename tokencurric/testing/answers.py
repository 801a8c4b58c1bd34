"""Asking a compressor, and comparing what it says."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jaxtyping
import torch
from hypothesis import assume
from torch import Tensor

from tokencurric.budget import Budget
from tokencurric.compressors import Compressor
from tokencurric.testing.cases import Case
from tokencurric.testing.check import Broken
from tokencurric.testing.packing import Packed, Row, pack

Survivors = list[list[int]]

# Of two equal scores one is ahead after each shake, by chance: so many times the same one, once in 65,000 cases.
_SHAKES = 16


@dataclass(frozen=True)
class Question:
    """A packed batch with its budget and seed."""

    packed: Packed
    keep: Budget
    seed: int

    def mask(self, subject: Compressor) -> Tensor:
        """What the subject answers, if it is a mask of the right shape."""
        mask: object = subject(self.packed.view, self.keep, seed=self.seed)
        wanted = tuple(self.packed.view.tokens.shape[:2])
        if not isinstance(mask, Tensor) or tuple(mask.shape) != wanted:
            got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise Broken(f"The answer must have shape [batch visual] = {wanted}; it has {got}.")
        return mask

    def survivors(self, subject: Compressor) -> Survivors:
        """The numbers of the tokens that survive, row by row."""
        return self.packed.survivors(self.mask(subject))


@contextmanager
def unchecked() -> Iterator[None]:
    """Without jaxtyping's checks of shapes, if its import hook put some around the subject: as it is in use."""
    before: Any = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def question(subject: Compressor, case: Case, *, signals: Collection[str] | None = None) -> Question:
    """The case with the signals that the subject declares, or with those in `signals`."""
    return Question(case.pack(subject.needs if signals is None else signals), case.budget(), case.seed)


def with_rows(subject: Compressor, case: Case, rows: list[Row]) -> Question:
    """The case with other contents of its rows."""
    return Question(pack(rows, case.packing, subject.needs), case.budget(), case.seed)


def same(
    subject: Compressor, case: Case, this: object, that: object, *, told: str, rows: list[Row] | None = None
) -> None:
    """Raise `Broken(told)` unless `this == that`, but let off a case that hangs on rounding.

    Laws that compare two ways to compute one score hold for scores that differ by more than rounding. Noise of that
    size, which no law mentions, then leaves the answer as it is.

    Args:
        subject, case: who was asked what. this, that: what must be equal. told: what to say if it is not.
        rows: contents of the rows, if others than those of the case were asked about.

    Raises:
        Broken: the answers differ, and not by rounding.
    """
    if this == that:
        return
    rows = [row.content(subject.needs) for row in case.rows] if rows is None else rows
    before = with_rows(subject, case, rows).survivors(subject)
    for seed in range(_SHAKES):
        noise = torch.Generator().manual_seed(seed)

        def shaken(x: Tensor, noise: torch.Generator = noise) -> Tensor:
            return x * (1 + 1e-6 * torch.randn(x.shape, generator=noise))

        noisy = [row.changed(shaken, text=True) for row in rows]
        assume(with_rows(subject, case, noisy).survivors(subject) == before)
    raise Broken(told)
