"""Computing, of the last layer, only what somebody looks at."""

import inspect
import threading
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokencurric.adapters.traces import Traces


class Positions:
    """Some positions of a batch of sequences, to compute there alone.

    Args:
        rows, slots: of each position; one may come twice. shape: of the batch, rows and slots.

    Example:
        >>> some = Positions(torch.tensor([0, 0]), torch.tensor([2, 1]), (1, 3))
        >>> picked = some.pick(torch.tensor([[[1.0], [2.0], [3.0]]]))
        >>> picked.tolist(), some.put_back(10 * picked).tolist()
        ([[[3.0], [2.0]]], [[[0.0], [20.0], [30.0]]])
    """

    def __init__(self, rows: Int[Tensor, " position"], slots: Int[Tensor, " position"], shape: tuple[int, int]) -> None:
        self.rows, self.slots, self.shape = rows, slots, shape
        flat, number = rows * shape[1] + slots, torch.arange(len(rows), device=rows.device)
        # Of a position that comes twice one is put back, or both would get its gradient. The other goes past the end.
        last = torch.empty(shape[0] * shape[1], dtype=number.dtype, device=rows.device).index_copy_(0, flat, number)
        self._place = torch.where(last[flat] == number, flat, shape[0] * shape[1])

    def pick(self, states: Float[Tensor, "batch slot dim"]) -> Float[Tensor, "1 position dim"]:
        """What stands there, as one sequence."""
        return states[self.rows.to(states.device), self.slots.to(states.device)][None]

    def put_back(self, states: Float[Tensor, "1 position dim"]) -> Float[Tensor, "batch slot dim"]:
        """`states` where they stood, and 0 elsewhere."""
        rows, slots = self.shape
        whole = states.new_zeros(rows * slots + 1, states.shape[-1])
        whole = whole.index_copy(0, self._place.to(states.device), states[0])
        return whole[:-1].view(rows, slots, -1)


@dataclass(frozen=True)
class PositionWise:
    """What of a decoder layer treats each position by itself.

    Args:
        attention: called with the layer's own keyword arguments, before all of `modules`.
        modules: projections of queries and of the output, and the MLP.
    """

    attention: nn.Module
    modules: tuple[nn.Module, ...]


def position_wise(layer: nn.Module, attention: nn.Module) -> PositionWise | None:
    """What of `layer` treats each position by itself; None where it is not clear that all but attention does.

    Clear is: keyword arguments are handed on, and what has weights is a linear layer or, as norms do, has vectors only.
    A convolution mixes positions; a mixture of experts tells others what it saw of all.
    Modules on which somebody else has hooks are left out: they would see some positions only.

    Args:
        layer: itself, without wrappers. attention: of the layer, likewise.

    Example:
        >>> layer = nn.Module()
        >>> layer.forward = lambda hidden, **others: hidden
        >>> layer.mlp = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> position_wise(layer, nn.Module()).modules == (layer.mlp,)
        True
    """
    takes = inspect.signature(layer.forward).parameters.values()
    if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in takes):
        return None
    mlp, inside = getattr(layer, "mlp", None), list(layer.modules())
    experts = isinstance(mlp, nn.Module) and any(isinstance(each, nn.ModuleList) for each in mlp.modules())
    if experts or not all(isinstance(each, nn.Linear) or _has_vectors_only(each) for each in inside):
        return None
    if any("ALora" in type(each).__name__ for module in inside for each in _variants(module)):
        return None  # from which position on it acts is found in the whole sequence
    found = (getattr(attention, "q_proj", None), getattr(attention, "o_proj", None), mlp)
    modules = tuple(each for each in found if isinstance(each, nn.Module) and not _is_watched(each))
    return PositionWise(attention, modules)


def _has_vectors_only(module: nn.Module) -> bool:
    return all(each is None or each.ndim < 2 for each in module._parameters.values())


def _variants(module: nn.Module) -> Collection[Any]:
    """Kinds of LoRA, as PEFT notes them."""
    found = getattr(module, "lora_variant", None)
    return found.values() if isinstance(found, dict) else ()


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class LastLayer:
    """Hooks on the last layer, by which it computes some positions only, once it has keys and values of all.

    Which positions is said by a keyword argument of the layer, that goes on to its attention: a layer that is computed
    again in a backward pass gets the arguments it had before, but hooks on the layer may not run then. Modules that
    are called otherwise than with one tensor of all positions run as they are.

    Args:
        key: name of the argument.
        traces: hooks are put on through these.
    """

    def __init__(self, key: str, traces: Traces) -> None:
        self.key = key
        self.attached = False  # whether there are hooks that know what to do with the argument
        self._traces = traces
        self._run = _Run()
        self._final: nn.Module | None = None  # of the modules that run on a part

    def attach(self, layer: PositionWise) -> None:
        """Put hooks on."""
        self.attached = True
        self._final = layer.modules[-1] if layer.modules else None
        self._traces.before(layer.attention, self._arrive, with_kwargs=True)
        for module in layer.modules:
            self._traces.before(module, self._before, with_kwargs=True)
            self._traces.after(module, self._after, prepend=True)

    def leave(self) -> None:
        """The layer is done, or broke off."""
        if self.attached:
            self._run.positions = None
            self._run.short = frozenset()

    def _arrive(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.leave()
        if self.key not in kwargs:
            return None
        if not torch.compiler.is_compiling():  # it would need a graph for every number of positions
            self._run.positions = kwargs[self.key]
        return args, {name: value for name, value in kwargs.items() if name != self.key}

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        positions = None if torch.compiler.is_compiling() else self._run.positions
        if positions is None or kwargs or len(args) != 1:
            return None
        states = args[0]
        if not isinstance(states, Tensor) or states.ndim != 3 or tuple(states.shape[:2]) != positions.shape:
            return None
        self._run.short |= {module}
        return (positions.pick(states),), kwargs

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        positions = self._run.positions
        if module is self._final:
            self._run.positions = None  # hooks on the layer itself need not run at its end
        if module not in self._run.short or positions is None:
            return None
        self._run.short -= {module}
        return positions.put_back(output)


class _Run(threading.local):
    """The layer's run under way in this thread: at which positions, and which modules are running on those alone."""

    positions: Positions | None = None
    short: frozenset[nn.Module] = frozenset()
