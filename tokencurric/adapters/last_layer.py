"""Computing, of the last layer, only what somebody looks at."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


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
        nowhere = torch.full(shape, len(rows), device=rows.device)
        number = torch.arange(len(rows), device=rows.device)
        # Of a position that comes twice one is taken, or the other would get its gradient as well.
        self._number = nowhere.index_put((rows, slots), number)

    def pick(self, states: Float[Tensor, "batch slot dim"]) -> Float[Tensor, "1 position dim"]:
        """What stands there, as one sequence."""
        return states[self.rows.to(states.device), self.slots.to(states.device)][None]

    def put_back(self, states: Float[Tensor, "1 position dim"]) -> Float[Tensor, "batch slot dim"]:
        """`states` where they stood, and 0 elsewhere."""
        padded = torch.cat((states[0], states.new_zeros(1, states.shape[-1])))
        return padded[self._number.to(states.device)]


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
    """What of `layer` treats each position by itself; None where the layer hands on no unknown keyword arguments.

    A mixture of experts is left out: what it returns besides, and how it balances experts, is of all positions.

    Args:
        layer: itself, without wrappers. attention: of the layer.

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
    mlp = getattr(layer, "mlp", None)
    found = [getattr(attention, "q_proj", None), getattr(attention, "o_proj", None)]
    if isinstance(mlp, nn.Module) and _is_plain(mlp):
        found.append(mlp)
    return PositionWise(attention, tuple(each for each in found if isinstance(each, nn.Module)))


def _is_plain(mlp: nn.Module) -> bool:
    """Whether all that it holds are linear layers, one after another or side by side, and none of them a choice."""
    parts = list(mlp.modules())
    return not any(isinstance(each, nn.ModuleList) for each in parts) and all(
        isinstance(each, nn.Linear) for each in parts if each._parameters
    )


class LastLayer:
    """Hooks on the last layer, by which it computes some positions only, once it has keys and values of all.

    Which positions is said by a keyword argument of the layer, that goes on to its attention: a layer that is computed
    again in a backward pass gets the arguments it had before, but hooks on the layer may not run then. Modules that
    are called otherwise than with one tensor of all positions run as they are.

    Args:
        key: name of the argument.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._positions: Positions | None = None  # while the layer runs
        self._short: set[nn.Module] = set()  # modules that are running on a part
        self._final: nn.Module | None = None  # of the modules that run on a part
        self._handles: list[RemovableHandle] = []

    def attach(self, layer: PositionWise) -> None:
        """Put hooks on."""
        self._final = layer.modules[-1] if layer.modules else None
        self._handles.append(layer.attention.register_forward_pre_hook(self._arrive, with_kwargs=True))
        for module in layer.modules:
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after))

    @property
    def attached(self) -> bool:
        """Whether there are hooks that know what to do with the argument."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take the hooks off."""
        self.leave()
        while self._handles:
            self._handles.pop().remove()

    def leave(self) -> None:
        """The layer is done, or broke off."""
        self._positions = None
        self._short.clear()

    def _arrive(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.leave()
        if self.key not in kwargs:
            return None
        self._positions = kwargs[self.key]
        return args, {name: value for name, value in kwargs.items() if name != self.key}

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._positions is None or kwargs or len(args) != 1:
            return None
        states = args[0]
        if not isinstance(states, Tensor) or states.ndim != 3 or tuple(states.shape[:2]) != self._positions.shape:
            return None
        self._short.add(module)
        return (self._positions.pick(states),), kwargs

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        positions = self._positions
        if module is self._final:
            self._positions = None  # hooks on the layer itself need not run at its end
        if module not in self._short or positions is None:
            return None
        self._short.discard(module)
        return positions.put_back(output)
