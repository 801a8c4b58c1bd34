"""Decoding on a cache whose upper layers hold fewer tokens than its lower ones."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from tokencurric.adapters.masks import layer_rule, ruled_mask
from tokencurric.adapters.stretch import Shortened
from tokencurric.errors import UnsupportedModelError
from tokencurric.hosts.names import CACHE
from tokencurric.selection import Selection


@dataclass(frozen=True, eq=False)
class CachePlan:
    """What the first call on a cache dropped; it rides on the cache.

    Slot j of a short layer holds position index[j] of the prompt if j < short, and position length + j − short else.

    Args:
        cuts: layer from which on a selection is in force, and the selection, from the lowest layer up.
        shift: what was subtracted from the positions that the model would have given each row; None means nothing.
    """

    cuts: tuple[tuple[int, Shortened], ...]
    shift: Int[Tensor, " batch"] | None = None

    @property
    def layer(self) -> int:
        """First layer that is short."""
        return self.cuts[0][0]

    @property
    def length(self) -> int:
        """Of the prompt."""
        return self.cuts[0][1].selection.length

    def at(self, layer: int) -> Shortened | None:
        """The selection in force at `layer`; None where everything is held."""
        return next((shortened for first, shortened in reversed(self.cuts) if first <= layer), None)

    def positions_seen(self, held: int) -> int:
        """Positions of the full sequence that stand behind `held` slots of the first short layer."""
        selection = self.cuts[0][1].selection
        return held - selection.short + selection.length


def positions_of(selection: Selection, slots: Tensor) -> Tensor:
    """Positions of the full sequence that `slots` [1 slot] of a short layer hold, a row.

    Example:
        >>> selection = Selection.from_mask(torch.tensor([[True, False, True]]))
        >>> positions_of(selection, torch.tensor([[0, 1, 2, 3]])).tolist()
        [[0, 2, 3, 4]]
    """
    index = selection.index.to(slots.device)
    prompt = index.gather(1, slots.clamp(max=selection.short - 1).expand(index.shape[0], -1))
    return torch.where(slots < selection.short, prompt, slots + selection.length - selection.short)


def held_slots(selection: Selection, key: Tensor, end: int) -> Tensor:
    """Which of the slots `key` [1 slot], up to `end`, hold a token and no filler, a row.

    Example:
        >>> selection = Selection.from_mask(torch.tensor([[True, False, True], [False, True, False]]))
        >>> held_slots(selection, torch.tensor([[0, 1, 2, 3]]), 3).tolist()
        [[True, True, True, False], [False, True, True, False]]
    """
    valid = selection.valid.to(key.device)
    held = valid.gather(1, key.clamp(max=selection.short - 1).expand(len(valid), -1))
    return (held | (key >= selection.short)) & (key < end)


def plan_of(cache: Any) -> CachePlan | None:
    """The plan that rides on a cache.

    Example:
        >>> plan_of(None) is None
        True
    """
    plan = getattr(cache, "_tokencurric", None)
    return plan if isinstance(plan, CachePlan) else None


def decode_arguments(
    plan: CachePlan, config: Any, layer: int, hidden: Tensor, kwargs: dict[str, Any], real: Tensor | None = None
) -> dict[str, Any]:
    """The keyword arguments of one layer, with a mask that fits what its cache holds.

    The model makes its masks for the first layer's cache, so those of the short layers are made anew, by its own rule
    on the positions of the full sequence.

    Args:
        plan: of the cache. config: of the decoder. layer: its number. hidden: of the new tokens. kwargs: the layer's.
        real: which of all positions so far are no padding; None if none after the prompt is.

    Raises:
        UnsupportedModelError: the layer is called without a cache.
    """
    shortened = plan.at(layer)
    if shortened is None:
        return kwargs
    cache, new_tokens, selection = CACHE.read(kwargs), hidden.shape[1], shortened.selection
    if cache is None:
        raise UnsupportedModelError(
            f"Layer {layer} needs the cache that holds the compressed prompt; its call has none.\n"
            f"Hint: Hand the decoder's cache on to each layer, which now gets {', '.join(sorted(kwargs))}."
        )
    entry = cache.layers[layer]
    left_padding = shortened.left_padding.to(hidden.device)
    rule = layer_rule(config, layer, left_padding, sliding=bool(getattr(entry, "is_sliding", False)))
    flash = "flash" in config._attn_implementation
    plain = rule is causal_mask_function and new_tokens == 1 and not cache.is_compileable
    if shortened.dense and real is None and (flash or plain):
        return {**kwargs, "attention_mask": None}
    keys, offset = (int(n) for n in cache.get_mask_sizes(new_tokens, layer))
    have = int(entry.get_seq_length())
    key = torch.arange(keys, device=hidden.device)[None] + offset
    query = torch.arange(new_tokens, device=hidden.device)[None] + have
    visible = held_slots(selection, key, have + new_tokens)
    if real is not None:
        at = positions_of(selection, key)
        visible = visible & (real.to(at.device).gather(1, at.clamp(max=real.shape[1] - 1)) | (at >= real.shape[1]))
    if flash:
        return {**kwargs, "attention_mask": visible}
    mask = ruled_mask(
        positions_of(selection, query),
        positions_of(selection, key),
        visible,
        rule,
        eager="eager" in config._attn_implementation,
        dtype=hidden.dtype,
    )
    return {**kwargs, "attention_mask": mask}
