"""What the hooks have to know about transformers models."""

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from tokencurric.adapters.after_head import refuse_changed_logits
from tokencurric.adapters.compiled import outside_graphs
from tokencurric.adapters.decoding import CachePlan, decode_arguments, plan_of
from tokencurric.adapters.deepstack import Deepstack, take_over
from tokencurric.adapters.discovery import attention_of, find_parts, inner_layer, is_visual
from tokencurric.adapters.door import refuse_at_the_door, refuse_flex
from tokencurric.adapters.last_layer import PositionWise, position_wise
from tokencurric.adapters.layout import Layout
from tokencurric.adapters.masks import ruled_mask, short_mask, widen
from tokencurric.adapters.positions import later_positions, row_positions
from tokencurric.adapters.seam import Call
from tokencurric.adapters.stretch import Shortened
from tokencurric.adapters.tap import AttentionTap
from tokencurric.adapters.vision import VISION, ghost_features
from tokencurric.errors import UnsupportedModelError
from tokencurric.hosts.calls import aligned_shape, named, refuse_unknown_arguments
from tokencurric.hosts.names import CACHE, check_release

# Axis of the sequence in the layers' keyword arguments that are aligned with it. Masks are handled apart.
_ALIGNED = {"position_embeddings": -2, "position_ids": -1, "cache_position": -1}
_SEEN = ("input_ids", "attention_mask", "labels", "position_ids")


class TransformersSeam:
    """A transformers model, wrapped or not.

    Args:
        model: one whose parts can be found by structure.

    Raises:
        UnsupportedModelError: they cannot.
    """

    carries = True

    def __init__(self, model: nn.Module) -> None:
        check_release()
        self.parts = find_parts(model)
        refuse_unknown_arguments(self.parts.decoder, map(inner_layer, self.parts.layers))
        refuse_at_the_door(self.parts)
        self.end: nn.Module = self.parts.decoder

    def seen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What tells tokens, padding, labels and pictures."""
        found = {
            name: value
            for name, value in (named(module, args, kwargs) if len(args) > 1 else kwargs).items()
            if value is not None and (name in _SEEN or name.startswith(VISION))
        }
        if args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
            found.setdefault("input_ids", args[0])
        return found

    def read(
        self,
        seen: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        visual: Tensor | None = None,
    ) -> Call:
        """The call, from what the roots saw and what the decoder is called with."""
        if len(args) > 1:
            args, kwargs = (), named(self.parts.decoder, args, kwargs)
        if args and isinstance(args[0], Tensor):
            kwargs = {("inputs_embeds" if args[0].is_floating_point() else "input_ids"): args[0], **kwargs}
        ids: Any = seen.get("input_ids", kwargs.get("input_ids"))
        cache: Any = CACHE.read(kwargs)
        embeds: Any = kwargs.get("inputs_embeds")
        given = embeds if embeds is not None else ids
        shape = None if given is None else tuple(given.shape[:2])
        pictures = (name for name in seen if name.startswith(VISION) and (isinstance(seen[name], Tensor) or seen[name]))
        past, mask = 0 if cache is None else int(cache.get_seq_length()), _mask_of(seen, kwargs)
        plan = plan_of(cache)
        if plan is not None and not past:
            del cache._tokencurric  # a cache that was reset belongs to another prompt now
        found = None
        if visual is None and ids is not None and not past:
            found = is_visual(ids, self.parts.visual_ids)
        elif ids is not None and ids.shape != shape:
            ids = None  # a model that puts images among the embeddings itself has one id for all tokens of an image
        real = None
        if shape is not None:
            real = _padded_later(mask, shape[1], cache) if past else _two_axes(mask, shape[1])
        return Call(
            visual=found,
            real=real,
            ids=ids,
            labels=seen.get("labels"),
            shape=shape,
            cache=cache,
            past=past,
            pictures=next(pictures, None),
            placed=(seen or kwargs).get("position_ids") is not None,
            plan=plan if past else None,
            content=given,
        )

    def leave(self, call: Call, output: Any, plan: CachePlan) -> None:
        """Nothing: layers get the cache by name, and the plan is noted there as each of them runs."""

    def refuse_left(self, arguments: dict[str, Any]) -> None:
        """Nothing: a cache is found by its name."""

    def layer_left(self, output: Any, shortened: Shortened) -> None:
        """Nothing: a cache is found by its name."""

    def enter(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Deepstack | None]:
        """The decoder's arguments, without features that it would add itself between its layers."""
        refuse_flex(self.parts.decoder)  # it may have been chosen since
        return take_over(self.parts.decoder, kwargs, self.parts.depth)

    @outside_graphs
    def place(
        self, call: Call, kwargs: dict[str, Any], padding: Int[Tensor, " batch"]
    ) -> tuple[dict[str, Any], Int[Tensor, " batch"] | None]:
        """The decoder's arguments with positions of each row alone, and what was subtracted; see `row_positions`."""
        made = kwargs.get("position_ids")
        if call.placed or call.shape is None or not self._takes_positions or (made is not None and made.ndim != 2):
            return kwargs, None  # positions of several axes are made from the mask
        positions, shift = row_positions(made, padding, call.shape[1])
        return {**kwargs, "position_ids": positions}, shift

    def go_on(self, plan: CachePlan, call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments for tokens after a compressed prompt."""
        counted, missing = kwargs.get("position_ids"), 0
        if call.shape is None or (plan.layer > 0 and plan.shift is None):
            return kwargs
        if not call.placed and (counted is None or counted.ndim == 2):
            # Where layer 0 is short, the length that the model counts from is too small.
            missing = plan.positions_seen(int(call.cache.get_seq_length(plan.layer))) - call.past
        if counted is None:
            device = next(iter(self.parts.decoder.parameters())).device
            counted = torch.arange(call.shape[1], device=device)[None] + call.past
        return {**kwargs, "position_ids": later_positions(counted, plan.shift, missing)}

    def arguments(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states that a layer is called with, and its other arguments by name."""
        if len(args) != 1:
            raise UnsupportedModelError(
                f"{type(self.parts.decoder).__name__} calls its layers with {len(args)} positional arguments. Which is "
                "what is not known, and one may be aligned with the sequence. Models that pass all but the hidden "
                "states by name are supported."
            )
        return args[0], kwargs

    def shorten(self, number: int, arguments: dict[str, Any], hidden: Tensor, shortened: Shortened) -> dict[str, Any]:
        """A layer's arguments for a short sequence, from those for the full one."""
        selection, new = shortened.selection, dict(arguments)
        for name, value in arguments.items():
            if name == "attention_mask" or value is None:
                continue
            if name in _ALIGNED:
                new[name] = gather_all(value, shortened, _ALIGNED[name])
            elif (shape := aligned_shape(value, selection.length)) is not None:
                raise UnsupportedModelError(
                    f"{type(self.parts.decoder).__name__} passes {name} of shape {shape} to its layers, which looks "
                    f"aligned with the sequence of {selection.length} tokens. How to shorten it is not "
                    "known, and leaving it would be wrong. Models whose layers take only masks, positions and a cache "
                    "are supported."
                )
        if "flash" in self._implementation:
            new["position_ids"] = None  # gaps between positions would be taken for the borders of packed sequences
        new["attention_mask"] = self._short_mask(number, arguments, hidden, shortened)
        return new

    def decode(
        self, number: int, arguments: dict[str, Any], hidden: Tensor, plan: CachePlan, call: Call
    ) -> dict[str, Any]:
        """A layer's arguments for tokens after a compressed prompt."""
        return decode_arguments(plan, self.parts.decoder.config, number, hidden, arguments, call.real)

    def listen(
        self, layer: nn.Module, hidden: Tensor, arguments: dict[str, Any], layout: Layout, shortened: Shortened | None
    ) -> AttentionTap:
        """A tap that reads while the layer runs."""
        return AttentionTap(attention_of(layer), layout.query, layout.real, arguments)

    def without_cache(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A layer's arguments for a second run that leaves the cache alone."""
        return CACHE.write(arguments, None)

    def answer(self, output: Any) -> Tensor:
        """Hidden states in the decoder's output."""
        hidden: Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        return hidden

    def with_answer(self, output: Any, hidden: Tensor) -> Any:
        """The decoder's output with other hidden states."""
        if not hasattr(output, "last_hidden_state"):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output

    def with_loss(self, output: Any, loss: Tensor) -> Any:
        """The model's output with the loss, which the head's hook put among its logits."""
        if hasattr(output, "loss"):
            output.loss = output.logits.sum()
        return output

    # What EPIC asks

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
        """Call the model for its loss."""
        loss: Tensor | None = model(**inputs, use_cache=False).loss
        return loss

    def ghost(self, inputs: Mapping[str, Any]) -> Any:
        """See `ghost_features`."""
        return ghost_features(self.parts, dict(inputs))

    def position_wise(self, layer: nn.Module) -> PositionWise | None:
        """See `last_layer.position_wise`."""
        return position_wise(inner_layer(layer), inner_layer(attention_of(layer)))

    def refuse_unfit_head(self) -> None:
        """Raise if the model has no head, or changes logits after it: losses are made from what the head gives.

        It calls the model on two text tokens, which ranks with sharded weights have to do together.

        Raises:
            UnsupportedModelError: names what the model does.
        """
        name = type(self.parts.base).__name__
        if self.parts.head is None:
            raise UnsupportedModelError(
                f"EPIC needs a model with an output head; got a {name} without one. Its losses are made from logits. "
                "Pass the ...ForConditionalGeneration that holds it."
            )
        refuse_changed_logits(self.parts)

    def refuse_changed_output(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Nothing: two text tokens have shown what becomes of the logits."""

    @cached_property
    def _takes_positions(self) -> bool:
        """Whether the decoder can be told positions: one without, such as with ALiBi, has none in its keys."""
        return "position_ids" in inspect.signature(self.parts.decoder.forward).parameters

    @property
    def _implementation(self) -> str:
        name: str = self.parts.decoder.config._attn_implementation
        return name

    def _short_mask(
        self, number: int, arguments: dict[str, Any], hidden: Tensor, shortened: Shortened
    ) -> Tensor | None:
        selection, cache = shortened.selection, CACHE.read(arguments)
        mask: Tensor | None = arguments.get("attention_mask")
        width = selection.short if cache is None else int(cache.get_mask_sizes(selection.short, number)[0])
        if mask is not None:
            return shortened.once(mask, lambda full: short_mask(full, selection, width), width)
        if shortened.dense and width == selection.short:
            return None  # plain causal attention on the short sequence
        if "flash" in self._implementation:
            return selection.valid.to(hidden.device)

        def build(index: Tensor) -> Tensor:
            at, valid = index.to(hidden.device), selection.valid.to(hidden.device)
            eager = "eager" in self._implementation
            full = ruled_mask(at, at, valid, causal_mask_function, eager=eager, dtype=hidden.dtype)
            return widen(full, width)

        return shortened.once(selection.index, build, width, hidden.device)


def gather_all(value: Any, shortened: Shortened, axis: int) -> Any:
    """Gather a tensor, or each of a tuple of them. The batch axis is the one before the sequence, if there is one."""
    if isinstance(value, tuple):
        return shortened.once(value, lambda each: _each(each, shortened, axis))
    if not isinstance(value, Tensor):
        return _each(value, shortened, axis) if isinstance(value, Sequence) else value

    def gather(full: Tensor) -> Tensor:
        if full.ndim == 1:
            return shortened.selection.gather(full[None], 1)
        at = axis % full.ndim
        return shortened.selection.gather(full, at, batch_axis=at - 1)

    return shortened.once(value, gather)


def _each(values: Any, shortened: Shortened, axis: int) -> Any:
    return type(values)(gather_all(value, shortened, axis) for value in values)


def _mask_of(seen: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Any:
    """The attention mask: the decoder's own if it has two axes, since that one is as long as what it is given."""
    own = kwargs.get("attention_mask")
    return own if isinstance(own, Tensor) and own.ndim == 2 else seen.get("attention_mask", own)


def _two_axes(mask: Any, length: int) -> Tensor | None:
    """Which positions are no padding, from any attention mask that a model may be called with."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2:
        return mask[:, -length:].bool()
    sees = mask if mask.dtype == torch.bool else mask == 0
    return sees[:, 0, :, :length].any(1)  # a key that no query sees is padding


def _padded_later(mask: Any, length: int, cache: Any) -> Tensor | None:
    """Which of all positions so far are no padding, if some after a compressed prompt are; None if none is.

    To look at each new token of a generation would mean to wait for an accelerator, or to leave a graph, so there a
    call of one token is taken to bring no padding.
    """
    plan = plan_of(cache)
    if plan is None or not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    if length == 1 and (mask.device.type != "cpu" or torch.compiler.is_dynamo_compiling()):
        return None
    real = mask.bool()
    return None if bool(real[:, plan.length :].all()) else real
