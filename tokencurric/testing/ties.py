"""Tokens between which only their places decide."""

import torch
from torch import Tensor

from tokencurric.compressors import Compressor
from tokencurric.testing.answers import with_rows
from tokencurric.testing.cases import Case

_CHANGES = 4  # of all values, each by some percent: coarse scores tie at one of them, not at all


def tied(subject: Compressor, case: Case, row: int, one: int, other: int) -> bool:
    """Whether `subject` has nothing to tell two tokens apart by, so that the earlier one survives.

    They are put side by side, at the start of the row and at its end. If they tie, it makes no difference which of
    them comes first. Scores that are only coarse, such as those of half precision, would tell them apart after a
    change of all values by some percent, so that is tried as well.

    Args:
        subject: who was asked.
        case: what it was asked.
        row: number of the row.
        one: number of a token in it.
        other: number of another.

    Returns:
        True if the same places survive in either order, whatever the values.
    """
    alone = case.alone(row)
    content = case.rows[row].content(subject.needs)
    rest = [token for token in range(case.rows[row].count) if token not in (one, other)]
    for change in range(_CHANGES + 1):
        noise = torch.Generator().manual_seed(change)

        def changed(x: Tensor, noise: torch.Generator = noise, change: int = change) -> Tensor:
            return x * (1 + 0.05 * torch.randn(x.shape, generator=noise)) if change else x

        values = content.changed(changed, text=True)
        for place in ("start", "end"):
            answers = []
            for pair in ([one, other], [other, one]):
                order = torch.tensor([*pair, *rest] if place == "start" else [*rest, *pair])

                def moved(x: Tensor, order: Tensor = order) -> Tensor:
                    return x[order]

                answers.append(with_rows(subject, alone, [values.changed(moved)]).survivors(subject))
            if answers[0] != answers[1]:
                return False
    return True
