"""Forward passes that leave no trace: modes, random states, gradients, compiled code and sharding as before."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def evaluating(modules: nn.Module) -> Iterator[None]:
    """Evaluation mode for `modules` and all below, each restored to what it was.

    Example:
        >>> layer = nn.Dropout()
        >>> with evaluating(layer):
        ...     layer.training
        False
        >>> layer.training
        True
    """
    training = [module for module in modules.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """For a forward of `model` beside its use: in evaluation mode, without gradient, and never compiled.

    Random states are restored, and weights that FSDP2 leaves whole after a forward are sharded again.

    Args:
        model: it and all below are called within.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with untouched(layer):
        ...     layer(torch.ones(1, 2)).requires_grad
        False
    """
    devices = {each.device for each in model.parameters() if each.device.type not in ("cpu", "meta")}
    kinds = {each.type for each in devices} or {"cuda"}
    indices = [each.index for each in devices if each.type == min(kinds) and each.index is not None]
    try:
        with (
            evaluating(model),
            torch.no_grad(),
            torch.random.fork_rng(indices, device_type=min(kinds)),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
