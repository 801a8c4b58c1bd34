"""Keeping ranks together when one of them has a batch without pictures."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from tokencurric.adapters.discovery import ModelParts


def ghost_features(parts: ModelParts, inputs: dict[str, Any]) -> Callable[[], Tensor] | None:
    """For a text-only batch in distributed training: a picture's features times zero.

    Ranks wait for each other's gradients (DDP) or weights (FSDP, ZeRO) of the vision tower, so one that skips it would
    hang the others. None where nobody waits.

    Args:
        parts: of the model. inputs: what it is called with.
    """
    alone = not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)
    if alone or inputs.get("pixel_values") is not None or not hasattr(parts.base, "get_image_features"):
        return None
    vision = getattr(parts.base.config, "vision_config", None)
    size = getattr(vision, "image_size", None)
    if not isinstance(size, int):
        return None

    def features() -> Tensor:
        embeddings = parts.base.get_input_embeddings().weight
        picture = torch.zeros(1, getattr(vision, "num_channels", 3), size, size, device=inputs["input_ids"].device)
        output = parts.base.get_image_features(pixel_values=picture.to(embeddings.dtype), return_dict=True)
        return sum((each.sum() for each in output.pooler_output), start=torch.zeros((), device=picture.device)) * 0.0

    return features
