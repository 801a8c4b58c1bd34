"""Caches of models that are not from transformers: which one a call has, and what a compressed prompt left in it."""

import copy
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from tokencurric.adapters.adapter import ModelAdapter
from tokencurric.adapters.decoding import CachePlan
from tokencurric.adapters.plans import attributes_of, forget_plan, note_plan, noted_plans, tensors_in
from tokencurric.adapters.seam import Call
from tokencurric.errors import StateError

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_State: TypeAlias = dict[tuple[str, int], tuple[Tensor, int]]
_LEFT = "_tokencurric_left"  # on what a compressed call returned, where the adapter names no cache


class Caches:
    """The caches of one model, as its adapter names them.

    Every call of the model in a compression notes on its cache what was dropped, also where that is nothing. So a
    cache without a note is unknown: nothing tells whether its upper layers lack tokens, and it is refused.

    Args:
        adapter: adapter of the model.
        depth: number of layers.
    """

    def __init__(self, adapter: ModelAdapter, depth: int) -> None:
        self.adapter, self.depth = adapter, depth
        self._named = says(adapter, "cache")
        self._state: _State | None = None  # of the layers' own tensors, before a prompt
        self._kept: str | None = None  # where a layer keeps something of a compressed prompt to itself

    def find(self, inputs: Mapping[str, Any]) -> tuple[Any, int]:
        """The cache of a call, None if it has none, and the number of tokens that its layer 0 holds."""
        cache = self.adapter.cache(inputs)
        past = 0 if cache is None else int(self.adapter.cached(cache, 0))
        if cache is not None and not past:
            forget_plan(cache)  # it was reset, and belongs to another prompt now
        if not self._named and not torch.is_grad_enabled():  # with gradient, nobody goes on
            self._state = _own_tensors(self.adapter.layers)
        return cache, past

    def refuse_hidden(self, visual: Bool[Tensor, "batch seq"] | None) -> None:
        """Raise if a call without images may go on from what layers keep of a compressed prompt.

        Args:
            visual: [batch seq] visual mask of the call.

        Raises:
            StateError: the adapter names no cache, and a layer has changed tensors of its own.
        """
        if self._kept is not None and (visual is None or not bool(visual.any())):
            raise StateError(
                f"{self._kept} changed in a compressed call, and this call has no image: whether it goes on is unknown."
                f"\nHint: if that is a cache, make it an argument; if not, have {type(self.adapter).__name__}.cache "
                "return None."
            )

    def refuse_unnamed(self, arguments: Mapping[str, Any]) -> None:
        """Raise if a layer is given what a compressed call left, though the adapter names no cache in this call.

        Args:
            arguments: arguments of the layer by name.

        Raises:
            StateError: it is; its layers hold different tokens.
        """
        if any(hasattr(each, _LEFT) for each in tensors_in(dict(arguments))):
            raise StateError(
                f"A call goes on from a compressed one, but {type(self.adapter).__name__} names no cache in it.\nHint: "
                "override cache(inputs) and cached(cache, layer); short layers need masks of their own."
            )

    def mark(self, output: Any, short: int) -> None:
        """Mark what a short layer returned beside its hidden states: in a later call it would be a cache.

        Args:
            output: output of the layer.
            short: length of its sequence.
        """
        if isinstance(output, tuple | list):
            for each in tensors_in(output[1:]):
                if short in each.shape[1:]:
                    setattr(each, _LEFT, True)

    def plan(self, cache: Any) -> CachePlan:
        """What a compressed prompt left in `cache`; without cuts where nothing was dropped.

        Raises:
            StateError: nothing is noted on it, or it does not hold what was noted.
        """
        plans = noted_plans(cache)
        name = type(self.adapter).__name__
        if len(plans) != 1:
            raise StateError(
                f"compress cannot tell which tokens the cache of this call lacks; got a {type(cache).__name__} "
                f"{'of several prompts' if plans else 'that no call in the context returned'}.\nHint: if the model "
                f"makes its cache, override {name}.returned_cache; read the prompt in the context, and leave the rows "
                "of a cache as they are."
            )
        plan = plans[0]
        if plan.cuts:
            self._refuse_other(cache, plan)
        return plan

    def leave(self, call: Call, output: Any, plan: CachePlan) -> None:
        """Note on the cache of a call, and on the one that it returned, what their layers hold.

        Args:
            call: the call.
            output: output of the decoder.
            plan: what the layers hold.

        Raises:
            StateError: something was dropped, and there is nothing to note it on.
        """
        caches = [each for each in (call.cache, self.adapter.returned_cache(output)) if each is not None]
        noted = [note_plan(each, plan) for each in caches]
        if plan.cuts and caches and not any(noted):
            raise StateError(
                f"compress needs a cache that holds tensors or takes an attribute; got a {type(caches[0]).__name__} "
                "without either after the call.\nHint: have cache(inputs) return what holds the keys and values."
            )
        before, self._state = self._state, None
        if plan.cuts and before is not None:
            now = _own_tensors(self.adapter.layers)
            changed = (
                where[0] for where, (tensor, written) in now.items() if not _same(before.get(where), tensor, written)
            )
            self._kept = self._kept or next(changed, None)

    def _refuse_other(self, cache: Any, plan: CachePlan) -> None:
        held = [int(self.adapter.cached(cache, layer)) for layer in range(self.depth)]
        lowest = plan.at(0)
        so_far = held[0] if lowest is None else plan.positions_seen(held[0])
        expected = []
        for layer in range(self.depth):
            shortened = plan.at(layer)
            short = 0 if shortened is None else plan.length - shortened.selection.short
            expected.append(so_far - short)
        if held != expected or so_far < plan.length:
            wrong = next((n for n in range(self.depth) if held[n] != expected[n]), 0)
            raise StateError(
                f"Layer {wrong} of the cache holds {held[wrong]} tokens; after the compressed prompt it has to hold "
                f"{expected[wrong]}.\nHint: {type(self.adapter).__name__}.cached counts the tokens of the layer it is "
                "asked for; a cache that was cut, or counts all layers alike, cannot go on."
            )


def as_it_was(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """A copy of what a layer is given that stays as it is when the layer writes to it; tensors are shared.

    Args:
        value: argument of a layer: a cache of any kind, or anything else.
        memo: copies made so far, by identity of the original.

    Example:
        >>> cache = {"keys": [1]}
        >>> before = as_it_was(cache)
        >>> cache["keys"].append(2)
        >>> before
        {'keys': [1]}
    """
    memo = {} if memo is None else memo
    if isinstance(value, Tensor | nn.Module | type) or callable(value):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if type(value) is tuple:
        return tuple(as_it_was(each, memo) for each in value)
    names = attributes_of(value)
    if not names and not isinstance(value, list | dict):
        return value
    new = memo[id(value)] = copy.copy(value)
    if isinstance(value, dict):
        new.update({name: as_it_was(each, memo) for name, each in value.items()})
    elif isinstance(value, list):
        new[:] = [as_it_was(each, memo) for each in value]
    for name in names:
        object.__setattr__(new, name, as_it_was(getattr(value, name), memo))
    return new


def _own_tensors(layers: nn.ModuleList) -> _State:
    """Tensors that modules of the layers keep beside parameters, by name and place, with their versions."""
    found: _State = {}
    for module in layers.modules():
        own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
        for name, value in {**own, **module._buffers}.items():
            if isinstance(value, Tensor | list | tuple | dict):
                for each in tensors_in(value):
                    found[f"{type(module).__name__}.{name}", len(found)] = each, _version(each)
    return found


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _same(before: tuple[Tensor, int] | None, tensor: Tensor, version: int) -> bool:
    return before is not None and before[0] is tensor and before[1] == version


def says(adapter: ModelAdapter, name: str) -> bool:
    """Whether `adapter` has a method of its own.

    Example:
        >>> class Mine(ModelAdapter):
        ...     def cache(self, inputs):
        ...         return inputs["cache"]
        >>> says(Mine(), "cache"), says(Mine(), "cached")
        (True, False)
    """
    return getattr(type(adapter), name, None) not in (None, getattr(ModelAdapter, name))
