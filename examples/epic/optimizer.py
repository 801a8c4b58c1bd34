"""Muon for the matrices inside the blocks, AdamW for the rest, as one optimizer that Trainer can hold."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class MuonAndAdamW(torch.optim.Optimizer):
    """Steps both; rates, states and checkpoints are those of a single optimizer with up to two groups.

    Args:
        model: whose trainable parameters are stepped. lr: for both; Muon's updates are scaled to AdamW's size.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (matrices if ".layers." in name and parameter.ndim == 2 else rest).append(parameter)
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        if rest:  # adapters are all matrices
            self.parts.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0))
        super().__init__([dict(part.param_groups[0]) for part in self.parts], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter."""
        loss = None if closure is None else closure()
        for part, group in zip(self.parts, self.param_groups, strict=True):
            # Looked up at every step: schedulers write into our groups, and loading a checkpoint replaces them.
            part.param_groups, part.state = [group], self.state
            part.step()
        return loss
