"""Compressed inference of a LLaVA written out by hand: plain calls of the model's own modules, and nothing in the way.

It is told which tokens stay, so it chooses nothing; it knows that the prompt is one row without padding and where its
picture stands, so it looks at nothing. No compressed run of the same model can do less than this does.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tokencurric.hosts.names import CACHE

_CACHE = CACHE.name_in(LlamaDecoderLayer.forward)  # as the installed release calls it


def read_prompt(
    model: Any, ids: Tensor, pixels: Tensor, *, picture: slice, left: Tensor | None, layer: int
) -> tuple[Tensor, DynamicCache]:
    """Logits after a prompt of one row, [1 vocab], and its cache.

    Args:
        model: a LlavaForConditionalGeneration. ids: [1 seq]. pixels: of one picture.
        picture: where its tokens stand. left: positions that layers from `layer` on see; None means all.
    """
    decoder = model.model.language_model
    seen = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = model.model.multi_modal_projector(seen[model.config.vision_feature_layer][:, 1:])
    hidden = decoder.embed_tokens(ids)
    hidden = torch.cat((hidden[:, : picture.start], features, hidden[:, picture.stop :]), 1)
    rotation = decoder.rotary_emb(hidden, position_ids=torch.arange(ids.shape[1], device=ids.device)[None])
    cache = DynamicCache(config=decoder.config)
    for number, module in enumerate(decoder.layers):
        if number == layer and left is not None:
            hidden, rotation = hidden[:, left], tuple(each[:, left] for each in rotation)
        # Without a mask attention is causal by place, which is right: those that are left stand in their order.
        hidden = module(hidden, attention_mask=None, position_embeddings=rotation, **{_CACHE: cache})
    return model.lm_head(decoder.norm(hidden[:, -1])), cache


def read_token(model: Any, token: Tensor, position: int, cache: DynamicCache) -> Tensor:
    """Logits after one more token [1 1] that stands at `position` of the whole sequence, [1 vocab]."""
    decoder = model.model.language_model
    hidden = decoder.embed_tokens(token)
    rotation = decoder.rotary_emb(hidden, position_ids=torch.full_like(token, position))
    for module in decoder.layers:
        hidden = module(hidden, attention_mask=None, position_embeddings=rotation, **{_CACHE: cache})
    return model.lm_head(decoder.norm(hidden[:, -1]))
