"""What the references share: rows without padding, a budget a row, and the stated order of scores."""

import math
from collections.abc import Sequence

from torch import Tensor


def tokens_of(values: Tensor, valid: Tensor | None, row: int) -> list:
    """What `values` holds for the tokens of `row`, as Python numbers in double precision."""
    listed = values[row].double().tolist()
    if valid is None:
        return listed
    return [x for x, real in zip(listed, valid[row].tolist(), strict=True) if real]


def budget_of(keep: int | Tensor, row: int) -> int:
    return keep if isinstance(keep, int) else int(keep[row])


def best(scores: Sequence[float]) -> list[int]:
    """Positions from the highest score down: the lower position first among equals, NaN last."""
    return sorted(
        range(len(scores)), key=lambda i: (math.isnan(scores[i]), 0.0 if math.isnan(scores[i]) else -scores[i], i)
    )
