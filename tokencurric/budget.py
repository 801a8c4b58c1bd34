"""From a compression ratio to a number of kept tokens, and from a budget to a count per row.

The only ratio-to-count arithmetic in the library: compressors take counts alone.
"""

import math
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from tokencurric._transfer import on_device
from tokencurric.errors import RangeError, ShapeError

# A budget is host-known: one count for every row, or one count a row.
Budget: TypeAlias = int | Integer[Tensor, " batch"]


def keep_count(n: int, ratio: float | int) -> int:
    """Number of visual tokens that survive when the fraction `ratio` of `n` is removed.

    kept = n − ⌈n·ratio⌉, with the product rounded to nine decimals first, so that binary floating point never
    removes a token too many (`int(n * (1 - r))` is off by one for hundreds of ordinary pairs).

    Args:
        n: number of visual tokens, at least 0.
        ratio: fraction removed, 0 (keep all) to 1 (keep none).

    Returns:
        The count kept, between 0 and `n`.

    Raises:
        RangeError: `n` is no whole number, or negative, or `ratio` is outside [0, 1] (or NaN).

    Example:
        >>> keep_count(576, 7 / 9), keep_count(576, 0.778), keep_count(10, 0.3)
        (128, 127, 7)

    Source: "compression ratio" as in EPIC (arXiv:2510.00515) §3.
    """
    if type(n) is not int or n < 0:
        raise RangeError(f"keep_count needs a whole number n >= 0; got n={n!r}. It is a number of tokens. Pass an int.")
    if not 0.0 <= ratio <= 1.0:
        raise RangeError(
            f"keep_count needs 0 <= ratio <= 1; got ratio={ratio}. A ratio is the fraction of visual tokens removed. "
            "To ask for a number of tokens, use a count (keep=...)."
        )
    return n - math.ceil(round(n * ratio, 9))


def check_budget(keep: Budget, batch: int) -> None:
    """Raise unless `keep` is a budget for `batch` rows.

    Values of a budget that lives on an accelerator are not read, since that would wait for the device.

    Raises:
        RangeError: a count is negative. ShapeError: one count a row is needed and another number came.

    Example:
        >>> check_budget(16, 2)
    """
    if isinstance(keep, Tensor):
        if keep.is_floating_point() or keep.is_complex() or keep.dtype == torch.bool or keep.shape != (batch,):
            raise ShapeError(
                f"A budget needs one whole number a row, shape ({batch},); got dtype={keep.dtype}, "
                f"shape={tuple(keep.shape)}. Pass an int for all rows, or an integer tensor with one entry a row."
            )
        if keep.device.type == "cpu" and bool((keep < 0).any()):
            raise RangeError(f"A budget needs counts >= 0; got keep={keep.tolist()}. 0 drops every visual token.")
    elif isinstance(keep, bool) or not isinstance(keep, int):
        raise RangeError(
            f"A budget needs a whole number of tokens; got keep={keep!r}. "
            "To remove a fraction, use ratio=..., or keep_count(n, ratio)."
        )
    elif keep < 0:
        raise RangeError(f"A budget needs counts >= 0; got keep={keep}. 0 drops every visual token.")


def row_budget(keep: Budget, valid: Bool[Tensor, "batch visual"]) -> Int[Tensor, " batch"]:
    """Counts a row, no larger than the row's number of tokens, on the device of `valid`.

    Args:
        keep: one count for all rows or one count a row.
        valid: which entries of the padded layout are tokens.

    Returns:
        min(keep, tokens of the row), as int64.

    Raises:
        RangeError, ShapeError: as `check_budget`.

    Example:
        >>> row_budget(2, torch.tensor([[True, True, True], [True, False, False]])).tolist()
        [2, 1]
    """
    check_budget(keep, valid.shape[0])
    counts = valid.sum(1)
    if isinstance(keep, Tensor):
        return torch.minimum(counts, on_device(keep, counts.device).to(counts.dtype))
    return counts.clamp(max=keep)
