"""A blank picture, as a model's vision tower takes pictures: for ranks that have none and must not skip the tower."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tokencurric.adapters.discovery import ModelParts
from tokencurric.errors import UnsupportedModelError


def blank_picture(parts: ModelParts) -> dict[str, Tensor]:
    """What `get_image_features` is called with for one blank picture, as small as the model's config allows.

    Args:
        parts: of the model.

    Raises:
        UnsupportedModelError: how the model takes a picture is not known.
    """
    base = parts.base
    vision: Any = getattr(base.config, "vision_config", None)
    takes = inspect.signature(base.get_image_features).parameters if hasattr(base, "get_image_features") else {}
    patch: Any = getattr(vision, "patch_size", None)
    if "image_grid_thw" in takes and hasattr(vision, "spatial_merge_size"):
        # Patches come one a row, flattened, and as many as are merged make one visual token.
        merge, width = vision.spatial_merge_size, vision.in_channels * vision.temporal_patch_size * patch**2
        grid = torch.tensor([[1, merge, merge]], device=_like(parts).device)
        return {"pixel_values": _ones(parts, merge**2, width), "image_grid_thw": grid}
    size: Any = getattr(vision, "image_size", None)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if not isinstance(height, int) or not isinstance(width, int) or "pixel_values" not in takes:
        raise UnsupportedModelError(
            f"EPIC cannot train a {type(base).__name__} with weights sharded over ranks: a rank whose batch has no "
            "picture needs a blank one, or the others would wait for it for ever, and how this model takes pictures is "
            "not known. Use DDP."
        )
    channels = getattr(vision, "num_channels", 3)
    if "image_sizes" not in takes:
        leading = (1, 1) if "pixel_attention_mask" in takes else (1,)
        return {"pixel_values": _ones(parts, *leading, channels, height, width)}
    tiles: Any = getattr(base.config, "image_grid_pinpoints", None)
    if tiles:
        count = image_size_to_num_patches([height, width], tiles, height)
        pixels = _ones(parts, 1, count, channels, height, width)
    else:  # any size will do, and the configured one is the largest; two tokens, since one loses its axis in Mistral 3
        height = patch * getattr(base.config, "spatial_merge_size", 1)
        width = 2 * height
        pixels = _ones(parts, 1, channels, height, width)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]], device=pixels.device)}


def _like(parts: ModelParts) -> Tensor:
    weight: Tensor = parts.base.get_input_embeddings().weight
    return weight


def _ones(parts: ModelParts, *shape: int) -> Tensor:
    # Not zeros, which some models take for the filling between pictures and leave out.
    weight = _like(parts)
    return torch.ones(shape, device=weight.device, dtype=weight.dtype)
