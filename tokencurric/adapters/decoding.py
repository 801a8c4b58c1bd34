"""Decoding on a cache whose upper layers hold fewer tokens than its lower ones."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from tokencurric.adapters.masks import layer_rule, ruled_mask
from tokencurric.adapters.record import Shortened


@dataclass(frozen=True, eq=False)
class CachePlan:
    """What the first call on a cache dropped; it rides on the cache.

    Slot j of a short layer holds position index[j] of the prompt if j < short, and position length + j − short else.

    Args:
        shortened: the selection. layer: first layer that is short.
    """

    shortened: Shortened
    layer: int

    def positions_seen(self, cache: Any) -> int:
        """Number of positions of the full sequence that the cache stands for."""
        selection = self.shortened.selection
        return int(cache.get_seq_length(self.layer)) - selection.short + selection.length

    def position(self, slots: Tensor) -> Tensor:
        """Positions of the full sequence that `slots` [1 slot] hold, a row."""
        selection = self.shortened.selection
        index = selection.index.to(slots.device)
        prompt = index.gather(1, slots.clamp(max=selection.short - 1).expand(index.shape[0], -1))
        return torch.where(slots < selection.short, prompt, slots + selection.length - selection.short)


def plan_of(cache: Any) -> CachePlan | None:
    """The plan that rides on a cache.

    Example:
        >>> plan_of(None) is None
        True
    """
    plan = getattr(cache, "_tokencurric", None)
    return plan if isinstance(plan, CachePlan) else None


def decode_arguments(
    plan: CachePlan, config: Any, layer: int, hidden: Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The keyword arguments of one layer, with a mask that fits what its cache holds.

    The model makes its masks for the first layer's cache, so those of the short layers are made anew, by its own rule
    on the positions of the full sequence.
    """
    if layer < plan.layer:
        return kwargs
    cache, new_tokens, selection = kwargs["past_key_values"], hidden.shape[1], plan.shortened.selection
    entry = cache.layers[layer]
    rule = layer_rule(
        config, layer, plan.shortened.left_padding.to(hidden.device), sliding=bool(getattr(entry, "is_sliding", False))
    )
    flash = "flash" in config._attn_implementation
    plain = rule is causal_mask_function and new_tokens == 1 and not cache.is_compileable
    if plan.shortened.dense and (flash or plain):
        return {**kwargs, "attention_mask": None}
    keys, offset = (int(n) for n in cache.get_mask_sizes(new_tokens, layer))
    have = int(entry.get_seq_length())
    key = torch.arange(keys, device=hidden.device)[None] + offset
    query = torch.arange(new_tokens, device=hidden.device)[None] + have
    valid = selection.valid.to(hidden.device)
    held = valid.gather(1, key.clamp(max=selection.short - 1).expand(len(valid), -1))
    visible = (held | (key >= selection.short)) & (key < have + new_tokens)
    if flash:
        return {**kwargs, "attention_mask": visible}
    mask = ruled_mask(
        plan.position(query),
        plan.position(key),
        visible,
        rule,
        eager="eager" in config._attn_implementation,
        dtype=hidden.dtype,
    )
    return {**kwargs, "attention_mask": mask}
