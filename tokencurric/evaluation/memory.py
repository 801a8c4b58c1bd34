"""Bytes of the key-value cache: measured, in closed form, and as papers count them. And the peak of all tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tokencurric.adapters import find_parts
from tokencurric.adapters.discovery import attention_of
from tokencurric.errors import StateError
from tokencurric.evaluation.tokens import PromptShape, tokens_per_layer


def cache_bytes(cache: Any) -> int:
    """True bytes of the keys and values that a transformers cache holds.

    Raises:
        StateError: a layer of the cache holds nothing yet.

    Example:
        >>> cache_bytes(model.generate(**inputs, return_dict_in_generate=True).past_key_values)  # doctest: +SKIP
        322961408
    """
    if any(getattr(layer, "keys", None) is None for layer in cache.layers):
        raise StateError("cache_bytes needs a filled cache; got one with empty layers. Run the prompt first.")
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def kv_bytes(
    model: Any,
    shape: PromptShape,
    *,
    keep: int | Sequence[int],
    layer: int | Sequence[int],
    batch: int = 1,
    dtype: torch.dtype | None = None,
) -> int:
    """True bytes of the cache after a prompt, in closed form.

    Σ over layers of 2 · key-value heads · head width · (text + visual tokens of that layer) · bytes a number. Layers
    below the cut hold every token: this is what `cache_bytes` measures.

    Args:
        model: a model that can be compressed. shape: of the prompt. keep, layer: as for `tokens_per_layer`.
        batch: rows. dtype: of the cache; None means the model's.

    Raises:
        UnsupportedModelError: the model's parts are not found. RangeError: the cuts make no sense.

    Example:
        >>> kv_bytes(llava_7b, PromptShape(576, 40), keep=64, layer=2)  # doctest: +SKIP
        71303168
    """
    parts = find_parts(model)
    visual = tokens_per_layer(parts.depth, shape.visual, keep=keep, layer=layer)
    each = _bytes_a_token(parts.layers, dtype or model.dtype)
    return batch * sum(width * (shape.text + count) for width, count in zip(each, visual, strict=True))


def paper_kv_bytes(model: Any, *, keep: int, dtype: torch.dtype | None = None) -> int:
    """Bytes as papers report them: visual tokens alone, counted as dropped in every layer.

    Not what a cache holds when tokens are dropped inside the language model: layers below the cut keep all of them,
    and text is in the cache too. See `kv_bytes` for that.

    Args:
        model: a model that can be compressed. keep: visual tokens that stay. dtype: None means the model's.

    Example:
        >>> paper_kv_bytes(llava_7b, keep=64)  # doctest: +SKIP
        33554432
    """
    return sum(_bytes_a_token(find_parts(model).layers, dtype or model.dtype)) * keep


def peak_memory(run: Callable[[], object], device: torch.device | str) -> int | None:
    """Bytes of all tensors that a CUDA device held at most while `run` ran: weights, activations and cache.

    The allocator's own peak, which is exact for tensors and leaves out what the process holds besides: the context,
    and memory that is reserved but not handed out. It is counted from anew, so a peak that was asked of torch before
    is forgotten.

    Args:
        run: what is watched. device: of the model; of one that is spread over several devices, the one to look at.

    Returns:
        Bytes; None on a device that is not CUDA, where torch keeps no such count. `run` is called there too.

    Example:
        >>> peak_memory(lambda: torch.zeros(1000), "cpu") is None
        True
        >>> peak_memory(lambda: model.generate(**inputs), model.device)  # doctest: +SKIP
        14523012608
    """
    device = torch.device(device)
    if device.type != "cuda":
        run()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device)


def _bytes_a_token(layers: Any, dtype: torch.dtype) -> list[int]:
    each = []
    for layer in layers:
        attention = attention_of(layer)
        heads = getattr(attention, "num_key_value_heads", None) or attention.config.num_key_value_heads
        each.append(2 * heads * attention.head_dim * dtype.itemsize)
    return each
