"""Ranking tokens: one total order, the same on every device and in every batch.

`torch.topk` leaves ties to the kernel and lets NaN win. Here a score becomes a whole number that sorts like it, with
the position in its low bits, so that no two tokens are equal and any sort gives the same answer.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_INDEX_BITS = 28  # visual tokens a row: far more than any sequence, and 32 + 28 bits fit an int64
_NAN = -(2**31)  # below minus infinity, whose image is -2139095041
_ABSENT = torch.iinfo(torch.int64).min


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off on `device`: it would bring products of float32 scores back to half precision.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    if not torch.amp.autocast_mode.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def rank_keys(scores: Float[Tensor, "*batch visual"]) -> Int[Tensor, "*batch visual"]:
    """Whole numbers that sort like `scores`, without ties: of equal scores the lower position is the larger.

    Args:
        scores: compared in float32. NaN ranks below everything, -0.0 equals 0.0.

    Returns:
        int64 keys, unique along the last axis.

    Example:
        >>> rank_keys(torch.tensor([0.5, float("nan"), 2.0, 0.5])).argsort(descending=True).tolist()
        [2, 0, 3, 1]
    """
    bits = (scores.float() + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 positive
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # IEEE order as signed integers
    return with_position(ordered.masked_fill(scores.isnan(), _NAN))


def with_position(values: Int[Tensor, "*batch visual"]) -> Int[Tensor, "*batch visual"]:
    """Append the position to signed 32-bit `values`, lower positions being larger.

    Example:
        >>> with_position(torch.tensor([7, 7])).diff().sign().tolist()
        [-1]
    """
    last = values.shape[-1] - 1
    return (values << _INDEX_BITS) + torch.arange(last, -1, -1, device=values.device)


def keep_largest(
    keys: Int[Tensor, "batch visual"], valid: Bool[Tensor, "batch visual"], count: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch visual"]:
    """Mask of the `count` largest keys of each row among its valid entries.

    Args:
        keys: unique within a row, as from `rank_keys`.
        valid: entries that may be kept.
        count: how many, a row; at most the row's number of valid entries.

    Returns:
        True for the survivors.

    Example:
        >>> keys = rank_keys(torch.tensor([[0.1, 0.9, 0.5]]))
        >>> keep_largest(keys, torch.ones(1, 3, dtype=torch.bool), torch.tensor([2])).tolist()
        [[False, True, True]]
    """
    if keys.shape[1] == 0:
        return valid
    keys = keys.masked_fill(~valid, _ABSENT)
    descending = keys.sort(dim=1, descending=True).values
    threshold = descending.gather(1, (count - 1).clamp(min=0)[:, None])
    return (keys >= threshold) & valid & (count > 0)[:, None]


def keep_top(
    scores: Float[Tensor, "batch visual"], valid: Bool[Tensor, "batch visual"], count: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch visual"]:
    """Mask of the `count` highest scores of each row: float32, ties to the lower position, NaN last.

    Example:
        >>> keep_top(torch.tensor([[1.0, 3.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool), torch.tensor([1])).tolist()
        [[False, True, False]]
    """
    return keep_largest(rank_keys(scores), valid, count)
