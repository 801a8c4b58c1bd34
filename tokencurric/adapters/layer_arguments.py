"""Arguments of layers whose forward somebody else wrote: by name, on fewer tokens, with a mask that holds."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from tokencurric.adapters.adapter import ModelAdapter
from tokencurric.adapters.caches import says
from tokencurric.adapters.plans import tensors_in
from tokencurric.adapters.stretch import Shortened
from tokencurric.errors import UnsupportedModelError
from tokencurric.selection import Selection


def checked_masks(
    adapter: ModelAdapter,
    sees: Bool[Tensor, "batch 1 query key"],
    hidden: Tensor,
    arguments: dict[str, Any],
    shortened: Shortened,
) -> dict[str, Any]:
    """The mask arguments that an adapter makes, refused where they cannot be right.

    Args:
        adapter: adapter of the model.
        sees: [batch 1 query key] what sees what.
        hidden: [batch query dim] input of the layer.
        arguments: other arguments of the layer by name.
        shortened: what the layer holds of the prompt.

    Raises:
        UnsupportedModelError: there is no mask, or one for all rows, and rows need their own.
    """
    name = f"{type(adapter).__name__}.mask_arguments"
    masks = adapter.mask_arguments(sees, hidden, arguments)
    if not masks and not shortened.dense:
        raise UnsupportedModelError(
            f"{name} returned no mask for rows that keep different numbers of tokens.\nHint: return the argument that "
            "carries a mask, also for a single new token; otherwise fillers are taken for tokens."
        )
    if not masks and says(adapter, "sees") and not bool((sees == causal_by_place(sees)).all()):
        raise UnsupportedModelError(
            f"{name} returned no mask, but `sees` is not causal: the layer would go by places in the short sequence."
            "\nHint: return the argument that carries a mask."
        )
    width = tuple(sees.shape[2:])
    shared = any(tuple(each.shape) == width for value in masks.values() for each in tensors_in(value))
    if shared and (len(sees), width[1]) != width and not bool((sees == sees[:1]).all()):
        raise UnsupportedModelError(
            f"{name} returned one mask [query key] for all rows, but rows keep different tokens.\nHint: return "
            "[batch 1 query key], which scaled_dot_product_attention takes, or compress rows one by one."
        )
    return masks


def causal_by_place(sees: Bool[Tensor, "batch 1 query key"]) -> Bool[Tensor, "query key"]:
    """The mask of a layer that is causal by itself: the last query sees every key.

    Example:
        >>> causal_by_place(torch.ones(1, 1, 2, 3, dtype=torch.bool)).int().tolist()
        [[1, 1, 0], [1, 1, 1]]
    """
    query, key = sees.shape[2:]
    return torch.ones(query, key, dtype=torch.bool, device=sees.device).tril(key - query)


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names that the module's forward gives them."""
    signature = inspect.signature(module.forward)
    named = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and named.get(name):
            raise UnsupportedModelError(
                f"{type(module).__name__}.forward takes *{name}: what these arguments are cannot be told. Give them "
                "names."
            )
    return named


def looks_aligned(value: Any, length: int) -> bool:
    """Whether a tensor, or one in a container, is as long as the sequence."""
    plain = isinstance(value, Tensor | tuple | list | Mapping)
    return plain and any(length in each.shape[:3] for each in tensors_in(value))


def gather_aligned(value: Any, selection: Selection, axis: int) -> Any:
    """An aligned argument at the slots of a selection.

    Args:
        value: tensor, or a container of them; anything else stays as it is.
        selection: the slots.
        axis: axis of tokens.

    Raises:
        UnsupportedModelError: the axis of tokens is the first, so rows cannot keep different ones.
    """
    if isinstance(value, tuple | list):
        return type(value)(gather_aligned(each, selection, axis) for each in value)
    if isinstance(value, dict):
        return {name: gather_aligned(each, selection, axis) for name, each in value.items()}
    if not isinstance(value, Tensor):
        return value
    at = axis % value.ndim
    if at == 0:
        raise UnsupportedModelError(
            f"An aligned argument of a layer needs a batch axis before its axis of tokens; got shape "
            f"{tuple(value.shape)}. Rows keep different tokens. Have the model pass it with an axis of size 1 in front."
        )
    return selection.gather(value, at)
