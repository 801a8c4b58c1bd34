"""Attention masks of a short sequence, from those of the full one or from the model's own rule."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from tokencurric.selection import Selection, take

Rule: TypeAlias = Callable[..., Any]  # (batch, head, query, key) -> whether it sees; broadcasts over tensors


def short_mask(mask: Tensor, selection: Selection, width: int) -> Tensor:
    """The mask that a model made for its full sequence, for the selected slots.

    Whatever pattern the model has (causal, sliding, packed) is gathered with its rows and columns. Fillers are hidden
    from all and see themselves, so that no row of the softmax is empty.

    Args:
        mask: [batch seq] (FlashAttention), or [batch 1 seq keys], boolean (True sees) or additive.
        selection: the slots. width: keys the attention will get; more than slots for a static cache.

    Example:
        >>> causal = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
        >>> short_mask(causal, Selection.from_mask(torch.tensor([[True, False, True]])), 2).int().tolist()
        [[[[1, 0], [1, 1]]]]
    """
    index, valid = selection.index.to(mask.device), selection.valid.to(mask.device)
    if mask.ndim == 2:
        return (take(mask, index, 1) * valid).to(mask.dtype)
    rows = take(mask, index, 2)
    gathered = take(rows[..., : selection.length], index, 3)
    own = torch.eye(selection.short, dtype=torch.bool, device=mask.device)
    visible = valid[:, None, None, :]
    lonely = own & ~valid[:, None, :, None]
    if gathered.dtype == torch.bool:
        return widen((gathered & visible) | lonely, width)
    lowest = torch.finfo(gathered.dtype).min
    return widen(gathered.masked_fill(~visible, lowest).masked_fill(lonely, 0.0), width)


def ruled_mask(
    query: Int[Tensor, "batch query"],
    key: Int[Tensor, "batch key"],
    visible: Bool[Tensor, "batch key"],
    rule: Rule,
    *,
    eager: bool,
    dtype: torch.dtype,
) -> Tensor:
    """[batch 1 query key] mask from a rule on original positions; each query sees itself.

    Args:
        query, key: original positions. visible: keys that exist. rule: (batch, head, query, key) -> sees.
        eager: whether attention takes additive masks of `dtype` rather than booleans.

    Example:
        >>> at = torch.tensor([[0, 5]])
        >>> ruled_mask(at, at, at >= 0, causal_mask_function, eager=False, dtype=torch.float32).int().tolist()
        [[[[1, 0], [1, 1]]]]
    """
    batch = torch.arange(len(query), device=query.device)[:, None, None, None]
    head = torch.zeros_like(batch)
    q, k = query[:, None, :, None], key[:, None, None, :]
    sees: Tensor = (rule(batch, head, q, k) & visible[:, None, None, :]) | (q == k)
    if not eager:
        return sees
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)


def layer_rule(config: Any, layer: int, left_padding: Tensor, *, sliding: bool) -> Rule:
    """Transformers' own mask rule of one layer, on original positions.

    Args:
        config: of the decoder. layer: its number. left_padding: a row. sliding: whether the cache's layer slides, for
            configs that do not list kinds of layers.

    Example:
        >>> layer_rule(type("Config", (), {}), 0, torch.zeros(1), sliding=False) is causal_mask_function
        True
    """
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else ("sliding_attention" if sliding else "full_attention")
    if kind == "chunked_attention":
        return chunked_causal_mask_function(config.attention_chunk_size, left_padding)
    if kind == "sliding_attention":
        return sliding_window_causal_mask_function(config.sliding_window)
    return causal_mask_function


def widen(mask: Tensor, width: int) -> Tensor:
    """Append hidden keys up to `width`: the unused tail of a static cache.

    Example:
        >>> widen(torch.ones(1, 1, 1, 2, dtype=torch.bool), 3).tolist()
        [[[[True, True, False]]]]
    """
    if mask.shape[-1] >= width:
        return mask
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return torch.nn.functional.pad(mask, (0, width - mask.shape[-1]), value=hidden)
