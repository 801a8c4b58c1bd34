"""What the hooks have to know about a model that is not from transformers, as its `ModelAdapter` says it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokencurric.adapters.adapter import ModelAdapter
from tokencurric.adapters.after_head import refuse_changed_output
from tokencurric.adapters.decoding import CachePlan, held_slots, positions_of
from tokencurric.adapters.deepstack import Deepstack
from tokencurric.adapters.discovery import ModelParts, inner_layer, unwrap
from tokencurric.adapters.layout import Layout
from tokencurric.adapters.seam import Call
from tokencurric.adapters.stretch import Shortened
from tokencurric.adapters.tap import Tapped, attention_row
from tokencurric.errors import StateError, UnsupportedModelError
from tokencurric.selection import Selection


@dataclass(eq=False)
class _Read:
    """What was read already."""

    tapped: Tapped | None

    def close(self) -> None:
        """There is nothing to stop."""


class HandwrittenSeam:
    """A model with an adapter.

    Args:
        model: wrapped or not. adapter: makes the adapter of the model without wrappers.

    Raises:
        UnsupportedModelError: the adapter leaves something out.
    """

    carries = False

    def __init__(self, model: nn.Module, adapter: Callable[[Any], ModelAdapter]) -> None:
        outer = unwrap(model)
        base = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
        self.adapter = adapter(base)
        missing = [name for name in ("model", "layers", "norm", "head") if not hasattr(self.adapter, name)]
        missing += [name for name in ("visual_mask", "mask_arguments") if not _says(self.adapter, name)]
        if _says(self.adapter, "cache") and not _says(self.adapter, "cached"):
            missing.append("cached")
        if missing or not isinstance(self.adapter.layers, nn.ModuleList):
            raise UnsupportedModelError(
                f"{type(self.adapter).__name__} needs to say what the model's parts are, which tokens are visual and "
                f"how a mask is handed over; got one without {missing or 'a ModuleList as layers'}. Set model, layers, "
                "norm and head, and override visual_mask and mask_arguments, and with cache also cached."
            )
        head = self.adapter.head
        self.parts = ModelParts(base, (base,), base, self.adapter.layers, self.adapter.norm, head, {})
        self.end: nn.Module = self.adapter.norm
        self._looked = False

    def seen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name."""
        return _named(module, args, kwargs)

    def read(self, seen: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call, as the adapter sees it."""
        cache = self.adapter.cache(seen)
        past = 0 if cache is None else int(self.adapter.cached(cache, 0))
        visual = self.adapter.visual_mask(seen)
        if past:
            several = visual.shape[1] > 1
            if several and bool(visual.any()):
                return Call(cache=cache, past=past, pictures="visual tokens")
            padding = self.adapter.padding_mask(seen) if several else None
            if padding is not None and not bool(padding.all()):
                raise StateError(
                    f"{type(self.adapter).__name__} cannot go on with padded rows: layers that hold fewer tokens would "
                    "take padding after the prompt for tokens. Go on with rows of one length, or each by itself."
                )
            return Call(cache=cache, past=past)
        return Call(
            visual=visual,
            real=self.adapter.padding_mask(seen),
            ids=self.adapter.token_ids(seen),
            labels=seen.get("labels"),
            cache=cache,
        )

    def enter(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Deepstack | None]:
        """The decoder's arguments as they are."""
        return kwargs, None

    def place(self, call: Call, kwargs: dict[str, Any], padding: Tensor) -> tuple[dict[str, Any], Tensor | None]:
        """The decoder's arguments as they are: only the model's own code can number its rows."""
        return kwargs, None

    def go_on(self, plan: CachePlan, call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments as they are."""
        if plan.layer == 0:
            raise StateError(
                f"{type(self.adapter).__name__} cannot go on with a prompt that was compressed at layer 0: the model "
                "would count positions from a cache that is shorter than what it stands for. Compress from layer 1 on."
            )
        return kwargs

    def arguments(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states that a layer is called with, and its other arguments by name."""
        named = _named(inner_layer(layer), args, kwargs)
        first = next(iter(named))
        return named.pop(first), named

    def shorten(self, number: int, arguments: dict[str, Any], hidden: Tensor, shortened: Shortened) -> dict[str, Any]:
        """A layer's arguments for a short sequence, from those for the full one."""
        selection, new = shortened.selection, dict(arguments)

        def rule(index: Tensor) -> Tensor:
            at = index.to(hidden.device)
            return self._sees(at, at, selection.valid.to(hidden.device))

        sees = shortened.once(selection.index, rule, hidden.device)
        masks = self.adapter.mask_arguments(sees, hidden, arguments)
        if not masks and not shortened.dense:
            raise UnsupportedModelError(
                f"{type(self.adapter).__name__}.mask_arguments returned no mask for rows that keep different numbers "
                "of tokens. What fills the shorter ones would be taken for tokens. Return the argument that carries a "
                "mask."
            )
        for name, value in arguments.items():
            if name in masks:
                continue
            if name in self.adapter.aligned:
                gather = partial(_gather, selection=selection, axis=self.adapter.aligned[name])
                new[name] = shortened.once(value, gather, name)
            elif any(selection.length in each.shape[:3] for each in _tensors(value)):
                raise UnsupportedModelError(
                    f"{type(self.parts.base).__name__} passes {name} to its layers, which looks aligned with the "
                    f"sequence of {selection.length} tokens. Left as it is, it would be wrong. Name it in "
                    f"{type(self.adapter).__name__}.aligned with its axis of tokens, or return it from mask_arguments."
                )
        unknown = sorted(self.adapter.aligned.keys() - arguments.keys())
        if unknown:
            raise UnsupportedModelError(
                f"{type(self.adapter).__name__}.aligned names {unknown[0]!r}, which no layer is called with; got "
                f"{sorted(arguments)}. It would not be shortened. Give it the name it has in the layers' forward."
            )
        return new | masks

    def decode(
        self, number: int, arguments: dict[str, Any], hidden: Tensor, plan: CachePlan, call: Call
    ) -> dict[str, Any]:
        """A layer's arguments for tokens after a compressed prompt."""
        shortened = plan.at(number)
        if shortened is None:
            return arguments
        selection, new_tokens = shortened.selection, hidden.shape[1]
        have = int(self.adapter.cached(call.cache, number))
        key = torch.arange(have + new_tokens, device=hidden.device)[None]
        query = torch.arange(new_tokens, device=hidden.device)[None] + have
        visible = held_slots(selection, key, have + new_tokens)
        sees = self._sees(positions_of(selection, query), positions_of(selection, key), visible)
        return arguments | self.adapter.mask_arguments(sees, hidden, arguments)

    def listen(
        self, layer: nn.Module, hidden: Tensor, arguments: dict[str, Any], layout: Layout, shortened: Shortened | None
    ) -> _Read:
        """Queries and keys, computed once more beside the layer."""
        with torch.no_grad():
            both = self.adapter.query_and_keys(inner_layer(layer), hidden.detach(), arguments)
        if both is None:
            raise UnsupportedModelError(
                f"{type(self.adapter).__name__} does not say how queries and keys are had; the compressor ranks "
                "tokens by attention or keys. Override query_and_keys, or use a compressor that needs neither, such "
                "as Uniform."
            )
        query, key = both
        slots = torch.arange(layout.length, device=hidden.device)[None]
        at = slots if shortened is None else shortened.selection.index.to(hidden.device)
        here = layout.query.to(hidden.device)
        position = at.expand(len(here), -1).gather(1, here[:, None])
        sees = self.adapter.sees(position[:, None, :, None], at[:, None, None, :])[:, 0, 0]
        sees = sees & layout.real.to(hidden.device) & (slots <= here[:, None])
        return _Read(Tapped(attention_row(query, key, here, sees), key))

    def without_cache(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A layer's arguments as they are: training has no cache."""
        return arguments

    def answer(self, output: Any) -> Tensor:
        """Hidden states after the final norm."""
        hidden: Tensor = output
        return hidden

    def with_answer(self, output: Any, hidden: Tensor) -> Any:
        """Other hidden states after the final norm."""
        return hidden

    def with_loss(self, output: Any, loss: Tensor) -> Any:
        """The loss in place of the model's output: what wraps the model finds it there."""
        return {"loss": loss}

    # What EPIC asks

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
        """Call the model for its loss."""
        output = model(**inputs)
        loss: Tensor | None = output["loss"] if isinstance(output, dict) else None
        return loss

    def ghost(self, inputs: Mapping[str, Any]) -> Any:
        """None: ranks that have no pictures are the author's to keep together."""
        return None

    def position_wise(self, layer: nn.Module) -> None:
        """None: what a module of somebody else's layer does with its positions is not known."""

    def refuse_unfit_head(self) -> None:
        """Raise if there is no head.

        Raises:
            UnsupportedModelError: there is none.
        """
        if self.parts.head is None:
            raise UnsupportedModelError(
                f"EPIC needs a model with an output head; {type(self.adapter).__name__}.head is None. Losses are made "
                "from logits. Set it to what turns hidden states into logits."
            )

    def refuse_changed_output(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Raise if the model returns its head's output in another form; looked at once, in a forward of its own.

        A model that returns nothing of the shape of logits is let in: nothing is known of what it does with them.

        Raises:
            UnsupportedModelError: names what the model does.
        """
        if not self._looked and self.parts.head is not None:
            refuse_changed_output(unwrap(model), self.parts.head, inputs)
            self._looked = True

    def _sees(self, query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
        q, k = query[:, None, :, None], key[:, None, None, :]
        # Fillers see themselves, so that no row of the softmax is empty.
        return (self.adapter.sees(q, k) & visible[:, None, None, :]) | (q == k)


def _says(adapter: ModelAdapter, name: str) -> bool:
    """Whether `adapter` has a method of its own."""
    return getattr(type(adapter), name, None) not in (None, getattr(ModelAdapter, name))


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
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


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, tuple | list):
        return [tensor for each in value for tensor in _tensors(each)]
    return [value] if isinstance(value, Tensor) else []


def _gather(value: Any, selection: Selection, axis: int) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_gather(each, selection, axis) for each in value)
    if not isinstance(value, Tensor):
        return value
    at = axis % value.ndim
    if at == 0:
        raise UnsupportedModelError(
            f"An aligned argument of a layer needs a batch axis before its axis of tokens; got shape "
            f"{tuple(value.shape)}. Rows keep different tokens. Have the model pass it with an axis of size 1 in front."
        )
    return selection.gather(value, at)
