"""Numbers that name samples by what they say."""

from jaxtyping import Bool, Int
from torch import Tensor

from tokencurric.draws import hash_tensor


def content_keys(input_ids: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"]) -> Int[Tensor, " batch"]:
    """A hash of each row's tokens: the same alone and in any batch, with any padding, and for all beams of a prompt.

    Args:
        input_ids: token ids. real: positions that are no padding.

    Example:
        >>> import torch
        >>> ids = torch.tensor([[0, 5, 6], [5, 6, 0]])
        >>> a, b = content_keys(ids, ids > 0)
        >>> bool(a == b)
        True
    """
    number = real.cumsum(1)
    return (hash_tensor(0, input_ids, number) * real.to(input_ids.device)).sum(1)
