"""What the modules of a transformers model are called with."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from tokencurric.errors import UnsupportedModelError
from tokencurric.hosts.lookups import Argument
from tokencurric.hosts.names import CACHE, EMBEDS, MASK


def named(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, also those that come in place.

    Args:
        module: the one that is called.
        args: in place; what its forward takes as `*args` has no name and is left out.
        kwargs: by name.

    Example:
        >>> named(nn.Linear(1, 1), (7,), {})
        {'input': 7}
    """
    if not args:
        return kwargs
    takes = inspect.signature(module.forward).parameters.values()
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [each.name for each in takes if each.kind in places]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def aligned_shape(value: Any, length: int) -> tuple[int, ...] | None:
    """Shape of the first tensor that looks aligned with a sequence, in a tensor or in a collection of them.

    Args:
        value: of an argument.
        length: of the sequence; a tensor looks aligned if one of its first three axes has it.

    Returns:
        None if there is none.

    Example:
        >>> import torch
        >>> aligned_shape((torch.ones(1, 5, 2), torch.ones(7)), 5), aligned_shape({"a": torch.ones(7)}, 5)
        ((1, 5, 2), None)
    """
    if isinstance(value, Tensor):
        return tuple(value.shape) if length in value.shape[:3] else None
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((shape for each in inside if (shape := aligned_shape(each, length)) is not None), None)


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
