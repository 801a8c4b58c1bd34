"""Keeping ranks together when one of them has a batch without pictures."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from tokencurric.adapters.discovery import ModelParts
from tokencurric.errors import UnsupportedModelError

VISION = ("pixel_values", "mm_encoder_outputs")  # how the names begin of what brings pictures or videos into a call


def ghost_features(parts: ModelParts, inputs: dict[str, Any]) -> Callable[[], Tensor] | None:
    """For a text-only batch in distributed training: a zero that depends on the weights that read pictures.

    Ranks wait for each other's gradients (DDP) or weights (FSDP2, ZeRO-3) of the vision tower and its projector, so one
    that skips them would hang the others. Whole weights give the zero themselves; sharded ones have to be gathered by
    a forward pass, which a blank picture brings about. None where nobody waits.

    Args:
        parts: of the model. inputs: what it is called with.

    Raises:
        UnsupportedModelError: weights are sharded and what a blank picture looks like is not known.
    """
    alone = not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)
    if alone or any(value is not None and name.startswith(VISION) for name, value in inputs.items()):
        return None
    weights = _vision_weights(parts)
    if any(isinstance(each, DTensor) or hasattr(each, "ds_id") for each in weights):
        return partial(_blank_picture, parts, _picture_size(parts))
    trained = [each for each in weights if each.requires_grad and each.numel()]
    return partial(_zero, trained) if trained else None


def _vision_weights(parts: ModelParts) -> list[nn.Parameter]:
    """All that the model has beside its decoder, token embeddings and head."""
    head = parts.head.parameters() if isinstance(parts.head, nn.Module) else ()
    text = {id(each) for each in (*parts.decoder.parameters(), *parts.base.get_input_embeddings().parameters(), *head)}
    return [each for each in parts.base.parameters() if id(each) not in text]


def _zero(weights: list[nn.Parameter]) -> Tensor:
    # One entry of each: its gradient is a zero for the whole weight, and a sum could overflow in half precision.
    return torch.stack([each.reshape(-1)[0].float() for each in weights]).sum() * 0.0


def _picture_size(parts: ModelParts) -> int:
    vision = getattr(parts.base.config, "vision_config", None)
    size = getattr(vision, "image_size", None)
    if not isinstance(size, int) or hasattr(vision, "temporal_patch_size"):
        raise UnsupportedModelError(
            f"A text-only batch of {type(parts.base).__name__} on one rank, with weights sharded over ranks, needs a "
            "blank picture; its config gives no picture size. The other ranks would wait for this one for ever. Put a "
            "row with a picture into every batch, or train with DDP."
        )
    return size


def _blank_picture(parts: ModelParts, size: int) -> Tensor:
    embeddings = parts.base.get_input_embeddings().weight
    channels = getattr(parts.base.config.vision_config, "num_channels", 3)
    picture = torch.zeros(1, channels, size, size, device=embeddings.device, dtype=embeddings.dtype)
    output = parts.base.get_image_features(pixel_values=picture, return_dict=True)
    return torch.stack([each.float().sum() for each in output.pooler_output]).sum() * 0.0
