"""What makes logits of hidden states, and what can be said of it without calling it."""

from collections.abc import Callable
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor, nn

Head: TypeAlias = Callable[[Tensor], Tensor]


def plain_linear(hidden: Float[Tensor, "position dim"], head: Head) -> tuple[nn.Linear | None, str]:
    """The linear layer that calling `head` amounts to; None and why, where it is or does anything else.

    Args:
        hidden: what it would be given. head: a module, or a method of one.

    Example:
        >>> import torch
        >>> head = nn.Linear(4, 9)
        >>> plain_linear(torch.randn(3, 4), head.forward)[0] is head
        True
        >>> plain_linear(torch.randn(3, 4), torch.tanh)
        (None, 'got builtin_function_or_method')
    """
    module = getattr(head, "__self__", head)
    if not isinstance(module, nn.Linear):
        return None, f"got {type(module if isinstance(module, nn.Module) else head).__name__}"
    name = type(module).__name__
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return None, f"the forward of {name} is not that of Linear"
    if head is not module and getattr(head, "__func__", None) is not nn.Linear.forward:
        return None, f"got a method of {name} that is not its forward"
    if head is module and (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks):
        return None, f"{name} has hooks, which a kernel passes over"
    if type(module.weight) not in (Tensor, nn.Parameter) or not module.weight.is_floating_point():
        return None, f"the weight of {name} is of type {type(module.weight).__name__}, {module.weight.dtype}"
    if module.weight.device != hidden.device:
        return None, f"hidden states are on {hidden.device}, the weight is on {module.weight.device}"
    return module, ""
