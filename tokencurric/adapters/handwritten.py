"""What the hooks have to know about a model that is not from transformers, as its `ModelAdapter` says it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokencurric.adapters.adapter import ModelAdapter
from tokencurric.adapters.after_head import refuse_changed_output
from tokencurric.adapters.caches import Caches, as_it_was, says
from tokencurric.adapters.decoding import CachePlan, held_slots, positions_of
from tokencurric.adapters.deepstack import Deepstack
from tokencurric.adapters.discovery import ModelParts, inner_layer, unwrap
from tokencurric.adapters.layer_arguments import checked_masks, gather_aligned, looks_aligned, named_arguments
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
        missing += [name for name in ("mask_arguments",) if not says(self.adapter, name)]
        keeps = says(self.adapter, "cache") or says(self.adapter, "returned_cache")
        missing += [name for name in ("cache", "cached") if keeps and not says(self.adapter, name)]
        if missing or not isinstance(self.adapter.layers, nn.ModuleList):
            raise UnsupportedModelError(
                f"{type(self.adapter).__name__} needs to name the model's parts and hand over masks; got one without "
                f"{missing or 'a ModuleList as layers'}.\nHint: set model, layers, norm and head, override "
                "mask_arguments, and for answers after a prompt cache and cached."
            )
        decoder = self.adapter.model if self.adapter.decoder is None else self.adapter.decoder
        self._refuse_strangers(base, decoder)
        head, layers, norm = self.adapter.head, self.adapter.layers, self.adapter.norm
        self.parts = ModelParts(self.adapter.model, (self.adapter.model,), decoder, layers, norm, head, {})
        self.end: nn.Module = norm
        self.caches = Caches(self.adapter, len(layers))
        self._looked = False

    def seen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name."""
        return named_arguments(module, args, kwargs)

    def read(
        self,
        seen: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        visual: Tensor | None = None,
    ) -> Call:
        """The call, as the adapter reads it from the arguments of the model, and of a decoder that has its own."""
        inputs = {**(named_arguments(self.parts.decoder, args, kwargs) if args or kwargs else {}), **seen}
        found = None
        cache, past = self.caches.find(inputs)
        if visual is None and says(self.adapter, "visual_mask"):
            found = self.adapter.visual_mask(inputs)
        if past:
            later = found is not None and found.shape[1] > 1 and bool(found.any())
            plan = self.caches.plan(cache)
            return Call(
                cache=cache,
                past=past,
                pictures="visual tokens" if later else None,
                plan=plan if plan.cuts else None,
                inputs=inputs,
            )
        self.caches.refuse_hidden(found if visual is None else visual)
        return Call(
            visual=found,
            real=self.adapter.padding_mask(inputs),
            ids=self.adapter.token_ids(inputs),
            labels=seen.get("labels"),
            cache=cache,
            inputs=inputs,
        )

    def leave(self, call: Call, output: Any, plan: CachePlan) -> None:
        """See `Caches.leave`."""
        self.caches.leave(call, output, plan)

    def refuse_left(self, arguments: dict[str, Any]) -> None:
        """See `Caches.refuse_unnamed`."""
        self.caches.refuse_unnamed(arguments)

    def layer_left(self, output: Any, shortened: Shortened) -> None:
        """See `Caches.mark`."""
        self.caches.mark(output, shortened.selection.short)

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
        named = named_arguments(inner_layer(layer), args, kwargs)
        first = next(iter(named))
        return named.pop(first), named

    def shorten(self, number: int, arguments: dict[str, Any], hidden: Tensor, shortened: Shortened) -> dict[str, Any]:
        """A layer's arguments for a short sequence, from those for the full one."""
        selection, new = shortened.selection, dict(arguments)

        def rule(index: Tensor) -> Tensor:
            at = index.to(hidden.device)
            return self._sees(at, at, selection.valid.to(hidden.device))

        sees = shortened.once(selection.index, rule, hidden.device)
        masks = checked_masks(self.adapter, sees, hidden, arguments, shortened)
        for name, value in arguments.items():
            if name in masks:
                continue
            if name in self.adapter.aligned:
                gather = partial(gather_aligned, selection=selection, axis=self.adapter.aligned[name])
                new[name] = shortened.once(value, gather, name)
            elif name not in self.adapter.caches and looks_aligned(value, selection.length):
                raise UnsupportedModelError(
                    f"{type(self.parts.base).__name__} passes {name} to its layers, which looks aligned with the "
                    f"sequence of {selection.length} tokens. Left as it is, it would be wrong. Name it in "
                    f"{type(self.adapter).__name__}.aligned with its axis of tokens, in caches if it is a cache, or "
                    "return it from mask_arguments."
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
        if number == 0:
            self._refuse_unlike(plan.cuts[0][1].selection, hidden, call)
        shortened = plan.at(number)
        if shortened is None:
            return arguments
        selection, new_tokens = shortened.selection, hidden.shape[1]
        have = int(self.adapter.cached(call.cache, number))
        key = torch.arange(have + new_tokens, device=hidden.device)[None]
        query = torch.arange(new_tokens, device=hidden.device)[None] + have
        visible = held_slots(selection, key, have + new_tokens)
        sees = self._sees(positions_of(selection, query), positions_of(selection, key), visible)
        return arguments | checked_masks(self.adapter, sees, hidden, arguments, shortened)

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
        """A layer's arguments as they are before it runs: a model may make a cache in training too."""
        return {name: as_it_was(value) for name, value in arguments.items()}

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
        output = model(**self.adapter.training_inputs(inputs))
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

    def _refuse_unlike(self, selection: Selection, hidden: Tensor, call: Call) -> None:
        """Raise unless new tokens belong to the rows of the prompt and are no padding."""
        batch, new_tokens = hidden.shape[:2]
        if len(selection.index) not in (1, batch):
            raise StateError(
                f"The cache holds a compressed prompt of {len(selection.index)} rows; got {batch} rows of new tokens."
                "\nHint: repeat the rows before the prompt is read, not in the cache."
            )
        padding = self.adapter.padding_mask(call.inputs or {}) if new_tokens > 1 else None
        if padding is not None and not bool(padding[:, -new_tokens:].all()):
            raise StateError(
                f"{type(self.adapter).__name__} cannot go on with padded rows: layers that hold fewer tokens would "
                "take padding after the prompt for tokens. Go on with rows of one length, or each by itself."
            )

    def _refuse_strangers(self, base: nn.Module, decoder: nn.Module) -> None:
        """Raise if hooks on the named modules would not run, or would run twice."""
        name, within = type(self.adapter).__name__, set(base.modules())
        named = {"model": self.adapter.model, "decoder": decoder, "norm": self.adapter.norm}
        strange = next((part for part, module in named.items() if module not in within), None)
        if strange is not None:
            raise UnsupportedModelError(
                f"{name}.{strange} is no module of the {type(base).__name__} that is compressed.\nHint: take the "
                "parts from the model that the adapter is given."
            )
        if len(set(self.adapter.layers)) < len(self.adapter.layers):
            raise UnsupportedModelError(
                f"{name}.layers holds a layer twice, so one call would count as two layers.\nHint: give each layer a "
                "module of its own; modules may share parameters."
            )
