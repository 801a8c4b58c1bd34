"""Using a module whose weights are spread over ranks, outside of the forward pass that gathers them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from tokencurric.losses import Head


class _Unhooked(nn.Module):
    """Computes what `module` computes, without its hooks: those gather weights at each call, and ranks differ in it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, hidden: Tensor) -> Any:
        """As the module's own."""
        return self.module.forward(hidden)


@torch.no_grad()
def gathered(head: nn.Module, dtype: torch.dtype) -> Head:
    """`head` with whole weights, however often it will be called; FSDP2's are gathered now, once.

    Args:
        head: of a frozen model. dtype: of what it will be given; gathered weights are cast to it.

    Example:
        >>> head = nn.Linear(2, 3)
        >>> bool((gathered(head, torch.float32)(torch.ones(1, 2)) == head(torch.ones(1, 2))).all())
        True
    """
    weights = dict(head.named_parameters())
    if any(hasattr(each, "ds_id") for each in weights.values()):
        return head  # DeepSpeed gathers in hooks
    whole = {
        f"module.{name}": each.full_tensor().to(dtype) for name, each in weights.items() if isinstance(each, DTensor)
    }
    unhooked = _Unhooked(head)
    return lambda hidden: functional_call(unhooked, whole, (hidden,))
