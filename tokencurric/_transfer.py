"""Numbers the host knows, for the device, without waiting for it."""

from collections.abc import Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor


def on_device(
    values: Sequence[int] | Sequence[bool] | Shaped[Tensor, " value"], device: torch.device
) -> Shaped[Tensor, " value"]:
    """`values` on `device`; to a GPU they go from pinned memory, or the host would wait for all work it has queued.

    Example:
        >>> on_device((3, 4), torch.device("cpu"))
        tensor([3, 4])
    """
    there = values if isinstance(values, Tensor) else torch.tensor(values, dtype=None if values else torch.int64)
    if device.type == "cuda" and there.device.type == "cpu":
        return there.pin_memory().to(device, non_blocking=True)
    return there.to(device)  # elsewhere a copy that nobody waits for may outlive what it copies
