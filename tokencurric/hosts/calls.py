"""What the modules of a transformers model are called with."""

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from tokencurric.errors import UnsupportedModelError
from tokencurric.hosts.lookups import Argument
from tokencurric.hosts.names import CACHE, EMBEDS, MASK


def refuse_unknown_arguments(decoder: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Raise unless every argument that hooks read is one that the decoder and its layers take by a known name.

    Hooks take the absence of an argument for its being None. That holds only where the name is right.

    Args:
        decoder: the module that owns the layers.
        layers: decoder layers, without wrappers.

    Raises:
        UnsupportedModelError: a signature has none of the names that an argument is known by.
    """
    for argument in (EMBEDS, MASK, CACHE):
        _refuse_unknown(decoder, argument)
    kinds = {(type(layer), vars(layer).get("forward")): layer for layer in layers}
    for layer in kinds.values():
        for argument in (MASK, CACHE):
            _refuse_unknown(layer, argument)


def _refuse_unknown(module: Any, argument: Argument) -> None:
    if argument.name_in(module.forward) is not None:
        return
    takes = inspect.signature(module.forward).parameters
    replaced = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in takes.values())
    if replaced and argument.name_in(type(module).forward) is not None:
        return  # an instance's own forward hands on what the class names
    raise UnsupportedModelError(
        f"model needs a {type(module).__name__} that takes {' or '.join(argument.names)}; its forward takes neither.\n"
        f"Hint: It takes {', '.join(takes)}; an argument that hooks cannot name would be read as None, so rename it."
    )
