"""Cross-entropy through an output head in one fused kernel, where a library of such kernels is installed and fits."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokencurric.errors import MissingDependencyError, UnsupportedModelError
from tokencurric.losses.head import Head, plain_linear

_DTYPES = (torch.float32, torch.bfloat16)  # gradients are made before a loss scale is known, too large for float16
_NEEDED = ("bias", "reduction", "accum_dtype")


def fits(hidden: Float[Tensor, "position dim"], head: Head) -> bool:
    """Whether `fused_cross_entropy` can and should be used: on a GPU, with liger-kernel, for a plain linear head.

    Example:
        >>> fits(torch.randn(3, 4), torch.nn.Linear(4, 9))  # on a CPU
        False
    """
    return hidden.is_cuda and _linear(hidden, head)[0] is not None and _kernel() is not None


def fused_cross_entropy(
    hidden: Float[Tensor, "position dim"], targets: Int[Tensor, " position"], head: Head
) -> Float[Tensor, ""]:
    """Cross-entropy summed over positions, in nats, by Liger's fused kernel; the gradient is made in the forward pass.

    Logits exist a chunk of positions at a time and once, so the head costs three matrix products and not four, as when
    chunks are made again in backward. The kernel counts in float32, and so it adds up gradients of the weight: while
    activations are still held, that takes the bytes of a float32 weight and of the weight once more. The host waits
    for the device once.

    Args:
        hidden: hidden states, after the final norm. targets: the tokens to predict.
        head: a linear layer, or its `forward`.

    Raises:
        MissingDependencyError: liger-kernel cannot be used.
        UnsupportedModelError: the head is not plainly linear, or in a number format that does not fit.

    Source: Hsu et al. 2024, Liger Kernel (arXiv:2410.10989) §3.2.
    """
    linear, why = _linear(hidden, head)
    if linear is None:
        raise UnsupportedModelError(
            f"fused_cross_entropy needs a plain linear head in float32 or bfloat16; {why}. The kernel multiplies by "
            "the weight itself and would leave out whatever else the head does. Pass fused=None to have it used where "
            "it fits, or False."
        )
    kernel = _kernel()
    if kernel is None:
        raise MissingDependencyError(
            "fused_cross_entropy needs liger-kernel 0.8.5 or newer; it cannot be imported. It holds the kernel. "
            "Install tokencurric[fused], or pass fused=False."
        )
    weight: Tensor = linear.weight
    bias: Tensor | None = linear.bias
    if torch.is_autocast_enabled(hidden.device.type):  # the kernel's products are not on autocast's list
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    apply: Callable[..., Tensor] = _Fused.apply
    return apply(hidden, weight, bias, targets, kernel)


class _Fused(torch.autograd.Function):
    """The kernel's loss and gradients.

    Its own backward scales the gradients it has saved in place, so that a second one over the same graph would find
    them scaled; this one leaves them alone.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kernel: Callable[..., Tensor]
    ) -> Tensor:
        """The loss."""
        needed = [*ctx.needs_input_grad[:3]]
        # The kernel makes no gradient of weights where hidden states need none.
        inputs = [each if each is None else each.detach() for each in (hidden, weight, bias)]
        for each, wanted in zip(inputs, (any(needed), *needed[1:]), strict=True):
            if each is not None:
                each.requires_grad_(wanted)
        with torch.cuda.device_of(hidden), torch.set_grad_enabled(any(needed)):
            loss = kernel(inputs[0], inputs[1], targets, inputs[2], reduction="sum", accum_dtype=torch.float32)
            asked = [each for each, needs in zip(inputs, needed, strict=True) if needs and each is not None]
            found = iter(torch.autograd.grad(loss, asked) if asked else ())
        ctx.save_for_backward(*(next(found) if needs else None for needs in needed))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, times that of the loss."""
        return (*(None if each is None else each * grads[0].to(each.dtype) for each in ctx.saved_tensors), None, None)


def _kernel() -> Callable[..., Tensor] | None:
    """Liger's function; None where it is not installed, is too old, or does not get along with what else is."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except Exception:  # it asks drivers and compilers when imported
        return None
    takes = inspect.signature(liger_fused_linear_cross_entropy).parameters
    return liger_fused_linear_cross_entropy if all(name in takes for name in _NEEDED) else None


def _linear(hidden: Tensor, head: Head) -> tuple[nn.Linear | None, str]:
    """As `plain_linear`, and None for number formats that the kernel does not fit."""
    linear, why = plain_linear(hidden, head)
    device = hidden.device.type
    own = (hidden.dtype,) if linear is None else (hidden.dtype, linear.weight.dtype)
    used = (torch.get_autocast_dtype(device),) if torch.is_autocast_enabled(device) else own
    if linear is not None and any(each not in _DTYPES for each in (*own, *used)):
        return None, f"got {', '.join(sorted({str(each) for each in (*own, *used)}))}"
    return linear, why
