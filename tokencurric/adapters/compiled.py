"""Hooks that torch.compile must not overlook.

Its compiler takes for granted that a module's hooks are those of its first compiled call: a graph made before a hook
was put on is used again without it. And of a compiled module within another compiled one it takes what is wrapped, so
that hooks on the wrapper never run. Both would leave tokens in, or hide the wrong ones, and say nothing.
"""

from collections.abc import Callable
from functools import partial, update_wrapper, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from tokencurric.adapters.discovery import ModelParts
from tokencurric.adapters.traces import Traces
from tokencurric.errors import UnsupportedModelError

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, never traced: a graph ends before it and another begins after it.

    What a prompt's hooks do depends on this one prompt, so a graph of it would fit no other. Where nothing is compiled
    this costs next to nothing, other than `torch.compiler.disable` alone.

    Example:
        >>> outside_graphs(len)([1, 2])
        2
    """
    untraced: Callable[P, R] = torch.compiler.disable(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return (untraced if torch.compiler.is_dynamo_compiling() else function)(*args, **kwargs)

    return call


def is_compiled(module: nn.Module) -> bool:
    """Whether `module` is what `torch.compile(module)` returns.

    Example:
        >>> import torch
        >>> is_compiled(torch.nn.Identity()), is_compiled(torch.compile(torch.nn.Identity()))
        (False, True)
    """
    return "_orig_mod" in module._modules


def runs_compiled(module: nn.Module) -> bool:
    """Whether calling `module` runs compiled code: it is wrapped, or was compiled in place.

    Example:
        >>> import torch
        >>> runs_compiled(torch.nn.Identity())
        False
    """
    return is_compiled(module) or module._compiled_call_impl is not None


def refuse_compiled_twice(model: nn.Module, parts: ModelParts) -> None:
    """Raise if layers are compiled by themselves and the model around them too.

    Args:
        model: as it was handed in. parts: of it.

    Raises:
        UnsupportedModelError: the outer compilation would go past the hooks on the layers.
    """
    layer = next((each for each in parts.layers if is_compiled(each)), None)
    if layer is None:
        return  # before a walk over all modules, which would cost more than the prompt's other hooks together
    others = [each for each in model.modules() if each is not layer and runs_compiled(each)]
    if any(layer in other.modules() for other in others):
        raise UnsupportedModelError(
            f"{type(parts.base).__name__} is compiled and so are its layers by themselves; torch.compile goes past the "
            "hooks of a compiled module inside another. Nothing would be dropped. Compile the model or its layers."
        )


def runs_compiled_anywhere(model: nn.Module, parts: ModelParts) -> bool:
    """Whether hooks on the model may run in compiled code.

    Args:
        model: as it was handed in, wrapped or not.
        parts: its parts.
    """
    wrappers = model
    while isinstance(inner := getattr(wrappers, "module", None), nn.Module) and not runs_compiled(wrappers):
        wrappers = inner
    return any(map(runs_compiled, (wrappers, *parts.roots, parts.decoder, *parts.layers)))


def renew(parts: ModelParts, traces: Traces) -> None:
    """Until the traces are removed, graphs from before do not fit: torch.compile looks at the hooks of today.

    What it does look at is whether a module has a `forward` of its own. So each module with a hook gets the one of its
    class for as long as the traces stay. Graphs from before fit again afterwards.

    Args:
        parts: parts of the model.
        traces: what is put on the modules.
    """
    for module in dict.fromkeys((*parts.roots, parts.decoder, *parts.layers)):
        if is_compiled(module):
            continue
        own = vars(module).get("forward")
        traces.put(module, "forward", module.forward if own is None else update_wrapper(partial(own), own))
