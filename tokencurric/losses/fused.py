"""Cross-entropy through an output head in one fused kernel, where a library of such kernels is installed and fits."""

from importlib.util import find_spec

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokencurric.errors import MissingDependencyError, UnsupportedModelError
from tokencurric.losses.head import Head, plain_linear


def fits(hidden: Float[Tensor, "position dim"], head: Head) -> bool:
    """Whether `fused_cross_entropy` can and should be used: on a GPU, with liger-kernel, for a plain linear head.

    Example:
        >>> fits(torch.randn(3, 4), torch.nn.Linear(4, 9))  # on a CPU
        False
    """
    return hidden.is_cuda and find_spec("liger_kernel") is not None and plain_linear(hidden, head)[0] is not None


def fused_cross_entropy(
    hidden: Float[Tensor, "position dim"], targets: Int[Tensor, " position"], head: Head
) -> Float[Tensor, ""]:
    """Cross-entropy summed over positions, in nats, by Liger's fused kernel; the gradient is made in the forward pass.

    Logits exist a chunk of positions at a time and once, so the head costs three matrix products and not four, as when
    chunks are made again in backward. The kernel counts in float32; gradients of weights in half precision are added up
    in float32, too. It reads one number from the device.

    Args:
        hidden: hidden states, after the final norm. targets: the tokens to predict.
        head: a linear layer, or its `forward`.

    Raises:
        MissingDependencyError: liger-kernel is not installed. UnsupportedModelError: the head is not plainly linear.

    Source: Hsu et al. 2024, Liger Kernel (arXiv:2410.10989) §3.2.
    """
    linear, why = plain_linear(hidden, head)
    if linear is None:
        raise UnsupportedModelError(
            f"fused_cross_entropy needs a plain linear head; {why}. The kernel multiplies by the weight itself and "
            "would leave out whatever else the head does. Leave `fused` out to have it used where it fits."
        )
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise MissingDependencyError(
            "fused_cross_entropy needs liger-kernel; it cannot be imported. It holds the kernel. Install "
            "tokencurric[fused], or leave `fused` out."
        ) from error
    weight: Tensor = linear.weight
    bias: Tensor | None = linear.bias
    if torch.is_autocast_enabled(hidden.device.type):  # the kernel's products are not on autocast's list
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()  # else the kernel leaves out the gradient of the weights as well
    loss: Tensor = liger_fused_linear_cross_entropy(
        hidden, weight, targets, bias, reduction="sum", accum_dtype=torch.float32
    )
    return loss
