"""Refusals that need no forward pass: what is seen on a transformers model when compression is attached."""

import inspect
from types import CodeType
from typing import Any

from torch import nn

from tokencurric.adapters.deepstack import KNOWN
from tokencurric.adapters.discovery import ModelParts
from tokencurric.errors import UnsupportedModelError


def refuse_at_the_door(parts: ModelParts) -> None:
    """Raise if the first forward of a prompt would certainly be refused.

    Raises:
        UnsupportedModelError: attention runs on masks that are no tensors, or the model hands its decoder something for
            each token that compression does not know.

    Example:
        >>> refuse_at_the_door(parts)  # doctest: +SKIP
    """
    refuse_flex(parts.decoder)
    takes = inspect.signature(type(parts.decoder).forward).parameters.keys() - KNOWN
    given = sorted(name for name in takes for root in parts.roots if _mentions(root, parts.decoder, name))
    if given:
        raise UnsupportedModelError(
            f"{type(parts.base).__name__} hands {given[0]} to its decoder, {type(parts.decoder).__name__}; what for is "
            "not known.\nHint: it may have an entry for each token, and upper layers have fewer; models whose decoder "
            "takes masks, positions and a cache are supported."
        )


def refuse_flex(decoder: Any) -> None:
    """Raise if `decoder` runs flex_attention.

    Raises:
        UnsupportedModelError: it does.

    Example:
        >>> from types import SimpleNamespace
        >>> refuse_flex(SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa")))
    """
    name = decoder.config._attn_implementation
    if "flex_attention" in str(name):
        raise UnsupportedModelError(
            f"{type(decoder).__name__} runs {name}, whose block masks cannot be shortened.\nHint: load the model with "
            'attn_implementation="sdpa", "eager" or a FlashAttention.'
        )


def _mentions(root: nn.Module, decoder: nn.Module, name: str) -> bool:
    """Whether the forward of `root`, which calls `decoder`, names it: a parameter that nobody sets does no harm."""
    if root is decoder:
        return False
    code = getattr(inspect.unwrap(type(root).forward), "__code__", None)
    return code is not None and name in _names(code)


def _names(code: CodeType) -> set[str]:
    found = {*code.co_names, *code.co_varnames}
    for each in code.co_consts:
        if isinstance(each, CodeType):
            found |= _names(each)
        elif isinstance(each, str):
            found.add(each)
        elif isinstance(each, tuple):  # names of keyword arguments in a call
            found |= {one for one in each if isinstance(one, str)}
    return found
