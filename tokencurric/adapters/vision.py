"""Keeping ranks together when one of them has a batch without pictures."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from tokencurric.adapters.blank import blank_picture
from tokencurric.adapters.discovery import ModelParts
from tokencurric.errors import UnsupportedModelError

VISION = ("pixel_values", "mm_encoder_outputs")  # how the names begin of what brings pictures or videos into a call


def ghost_features(parts: ModelParts, inputs: dict[str, Any]) -> Callable[[], Tensor] | None:
    """For a text-only batch in distributed training: a zero that depends on the weights that read pictures.

    Ranks wait for each other's gradients (DDP) or weights (FSDP2, ZeRO-3) of the vision tower and its projector, so one
    that skips them would hang the others. Whole weights give the zero themselves; sharded ones have to be gathered by
    a forward pass, which a blank picture brings about. ZeRO-1 and 2 need that too: they sum gradients in the order in
    which each rank makes them, so all ranks must make them in the same. None where nobody waits.

    Args:
        parts: of the model. inputs: what it is called with.

    Raises:
        UnsupportedModelError: weights are sharded and how the model takes a picture is not known.
    """
    alone = not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)
    if alone or any(value is not None and name.startswith(VISION) for name, value in inputs.items()):
        return None
    weights = _vision_weights(parts)
    sharded = any(isinstance(each, DTensor) or hasattr(each, "ds_id") for each in weights)
    if sharded or any(hasattr(each, "param_idx_in_group") for each in weights):  # ZeRO-3; ZeRO-1 and 2
        return partial(_features_of, parts, blank_picture(parts))
    trained = [each for each in weights if each.requires_grad and each.numel()]
    return partial(_zero, trained) if trained else None


def _vision_weights(parts: ModelParts) -> list[nn.Parameter]:
    """All that the model has beside its decoder, token embeddings and head."""
    head = () if parts.head is None else parts.head.parameters()
    text = {id(each) for each in (*parts.decoder.parameters(), *parts.base.get_input_embeddings().parameters(), *head)}
    return [each for each in parts.base.parameters() if id(each) not in text]


def _zero(weights: list[nn.Parameter]) -> Tensor:
    # One entry of each: its gradient is a zero for the whole weight, and a sum could overflow in half precision.
    return torch.stack([each.reshape(-1)[0].float() for each in weights]).sum() * 0.0


def _features_of(parts: ModelParts, picture: dict[str, Tensor]) -> Tensor:
    output = parts.base.get_image_features(**picture, return_dict=True)
    if output.pooler_output is None:
        raise UnsupportedModelError(
            f"EPIC cannot train a {type(parts.base).__name__} with weights sharded over ranks on a batch without "
            "pictures: its get_image_features does not return what it puts among the tokens, so a blank picture would "
            "not reach all weights that other ranks wait for. Use DDP, or put a row with a picture into every batch."
        )
    # What the model would use and nothing else: a weight that it leaves unused has no gradient on other ranks either.
    features = [*output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
    every = [tensor for each in features for tensor in ([each] if isinstance(each, Tensor) else each)]
    return torch.stack([each.float().sum() for each in every]).sum() * 0.0
