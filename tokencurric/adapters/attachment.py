"""Hooks that let the upper layers of a decoder run on a short sequence, and that come off without a trace."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.masking_utils import causal_mask_function

from tokencurric.adapters.decoding import CachePlan, decode_arguments, plan_of
from tokencurric.adapters.deepstack import Deepstack, take_over
from tokencurric.adapters.discovery import ModelParts, attention_of, is_visual
from tokencurric.adapters.layout import lay_out
from tokencurric.adapters.masks import ruled_mask, short_mask, widen
from tokencurric.adapters.record import Record, Request, Shortened
from tokencurric.adapters.row_keys import content_keys
from tokencurric.adapters.tap import AttentionTap
from tokencurric.adapters.vision import VISION
from tokencurric.errors import ShapeError, StateError, UnsupportedModelError

# Axis of the sequence in the layers' keyword arguments that are aligned with it. Masks are handled apart.
_ALIGNED = {"position_embeddings": -2, "position_ids": -1, "cache_position": -1}
_SEEN = ("input_ids", "attention_mask", "labels")


class Attachment:
    """The hooks of one user on one model. While `request` is None they change nothing.

    Args:
        parts: of the model.

    Raises:
        StateError: another attachment is at work on the model.
    """

    def __init__(self, parts: ModelParts) -> None:
        self.parts = parts
        self.request: Request | None = None
        self.record: Record | None = None  # of the latest forward
        self.prompt: int | None = None  # length of the prompt in the next forward, where more than it may come
        self._seen: dict[str, Any] = {}
        self._key = f"tokencurric_{id(self):x}"
        self._handles: list[RemovableHandle] = []
        self.refuse_nesting()
        for root in parts.roots:
            self._handles.append(root.register_forward_pre_hook(self._before_root, with_kwargs=True))
            # First in line, so that wrappers such as FSDP2 see the loss among the root's outputs.
            self._handles.append(root.register_forward_hook(self._after_root, prepend=True))
        self._handles.append(parts.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        self._handles.append(parts.decoder.register_forward_hook(self._after_decoder))
        for number, layer in enumerate(parts.layers):
            self._handles.append(layer.register_forward_pre_hook(partial(self._before_layer, number), with_kwargs=True))
            self._handles.append(layer.register_forward_hook(partial(self._after_layer, number)))

    def refuse_nesting(self) -> None:
        """Raise if another attachment is at work on the model.

        Raises:
            StateError: so that it never depends on the order of hooks which selection holds.
        """
        if any(other is not self and other.request is not None for other in attachments_of(self.parts)):
            raise StateError(
                f"Only one compression can be at work on a {type(self.parts.base).__name__}; got a second one inside "
                "the first. Which of the two selections should hold is unclear. Leave the first context before."
            )

    def remove(self) -> None:
        """Take all hooks off and restore what a broken forward left; it may be called again."""
        self.settle()
        while self._handles:
            self._handles.pop().remove()
        self.request = self.record = None
        self._seen = {}

    def settle(self) -> None:
        """Restore the tapped module if a forward broke off before it fired."""
        if self.record is not None and self.record.tap is not None:
            self.record.tap.close()

    # Hooks on the modules that see token ids

    def _before_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.request is None:
            return
        if module is self.parts.roots[0] or module is self.parts.base:
            self._seen = {}
        seen = {
            name: value
            for name, value in kwargs.items()
            if value is not None and (name in _SEEN or name.startswith(VISION))
        }
        if args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
            seen.setdefault("input_ids", args[0])
        self._seen.update(seen)

    def _after_root(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.request is None or self.record is None or self.record.loss is None:
            return None
        if hasattr(output, "loss"):
            output.loss = self.record.loss
        return output

    # Hooks on the decoder

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.request is None:
            return None
        self.settle()
        seen, self._seen = self._seen, {}
        embeds: Any = kwargs.get("inputs_embeds", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()) > 0:
            return self._continue(seen, embeds, cache, args, kwargs)
        if cache is not None and plan_of(cache) is not None:
            del cache._tokencurric  # a cache that was reset belongs to another prompt now
        kwargs, deepstack = take_over(self.parts.decoder, kwargs, self.parts.depth)
        self.record = self._begin(self.request, seen, embeds, deepstack)
        if self.request.ghost is not None and "inputs_embeds" in kwargs:
            kwargs = {**kwargs, "inputs_embeds": embeds + self.request.ghost().to(embeds)}
        return args, {**kwargs, self._key: self.record}

    def _continue(self, seen: dict[str, Any], embeds: Any, cache: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        late = [name for name in seen if name.startswith(VISION) and (isinstance(seen[name], Tensor) or seen[name])]
        if late:
            raise StateError(
                f"compress needs all pictures in the first call on a cache; got {late[0]} with a cache that holds "
                f"{int(cache.get_seq_length())} tokens. Only tokens of the first are compressed. Start a new cache."
            )
        self.record = None
        plan = plan_of(cache)
        if plan is not None and plan.layer == 0 and kwargs.get("position_ids") is None:
            # Layer 0 is short, so the length that the model would count from is too small.
            start = plan.positions_seen(cache)
            position = torch.arange(embeds.shape[1], device=embeds.device)[None] + start
            return args, {**kwargs, "position_ids": position}
        return None

    def _begin(self, request: Request, seen: dict[str, Any], embeds: Any, deepstack: Deepstack | None) -> Record:
        layout, query = request.layout, request.query
        ids: Any = seen.get("input_ids")
        prompt, self.prompt = self.prompt, None
        if layout is None:
            visual = request.visual
            if visual is None and ids is None:
                raise StateError(
                    "compress needs to know which tokens are visual; got a call without input_ids. Pass "
                    "visual_mask=... (True at visual tokens) to compress(...), or call the model with input_ids."
                )
            if visual is None:
                visual = is_visual(ids, self.parts.visual_ids)
            mask = _two_axes(seen.get("attention_mask"), visual.shape[1])
            if prompt is not None:
                visual = visual & (torch.arange(visual.shape[1], device=visual.device) < prompt)
                query = _last_real(mask, visual, prompt) if query is None else query
            layout = lay_out(visual, mask, labels=seen.get("labels"), query=query)
        if embeds is not None and tuple(embeds.shape[:2]) != tuple(layout.visual.shape):
            raise ShapeError(
                f"compress needs token ids of the decoder's input, shape {tuple(embeds.shape[:2])}; got "
                f"{tuple(layout.visual.shape)}. Each visual token needs a placeholder. Use the model's processor."
            )
        key = request.row_key
        if key is None:
            ids = layout.real.long() if ids is None else ids
            key = content_keys(ids[:, :prompt], layout.real[:, :prompt])
        return Record(request, layout, key, deepstack=deepstack)

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        record = self.record
        if self.request is None or record is None:
            return None
        if record.request.layer < self.parts.depth and not record.decided:
            raise UnsupportedModelError(
                f"{type(module).__name__} does not pass its keyword arguments on to its layers, so they never learnt "
                "what to drop. Nothing would be compressed. Have its forward hand **kwargs to each layer."
            )
        hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        if record.request.finish is not None:
            hidden = record.request.finish(record, hidden)
        elif record.shortened is not None:
            hidden = record.shortened.selection.expand(hidden)
        else:
            return None
        if not hasattr(output, "last_hidden_state"):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output

    # Layers

    def _before_layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Select at the compressing layer; hand the short sequence's arguments to it and those above."""
        record: Record | None = kwargs.get(self._key)
        if record is None:
            if self.request is None or (plan := plan_of(kwargs.get("past_key_values"))) is None:
                return None
            return args, decode_arguments(plan, self.parts.decoder.config, number, args[0], kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name != self._key}
        layout, request = record.layout, record.request
        if number + 1 == request.layer and request.taps and not record.decided and max(layout.visual_counts, default=0):
            record.tap = AttentionTap(attention_of(layer), layout.query, layout.real)
        hidden = args[0]
        if record.deepstack is not None:
            short = record.shortened if number > request.layer else None
            hidden = record.deepstack.add(number, hidden, None if short is None else short.selection)
        if number < request.layer:
            return (hidden, *args[1:]), kwargs
        if number == request.layer and not record.decided:
            record.decide(hidden, self.parts.norm)
        if request.capture and record.hidden is not None:
            record.arguments[number] = {**kwargs, "past_key_values": None}
        if record.shortened is None:
            return (hidden, *args[1:]), kwargs
        if number == request.layer:
            hidden = record.shortened.selection.gather(hidden)
        cache = kwargs.get("past_key_values")
        if cache is not None:
            # Without the memo: decoding has no use for the prompt's masks, and the cache lives long.
            cache._tokencurric = CachePlan(replace(record.shortened, memo={}), request.layer)
        return (hidden, *args[1:]), self._shortened_arguments(number, kwargs, hidden, record.shortened)

    def _after_layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep the layer's output where it is asked for."""
        record = self.record
        if record is not None and record.request.features and number >= record.request.layer:
            record.features.setdefault(number, output if isinstance(output, Tensor) else output[0])

    def run_upper_layers(self, record: Record, shortened: Shortened | None) -> tuple[Tensor, dict[int, Tensor]]:
        """The layers from the compressing one on, once more, with another selection; without the final norm.

        Args:
            record: of a forward that captured. shortened: the other selection; None runs them at full length.

        Returns:
            The last layer's output, and every upper layer's.
        """
        if record.hidden is None:
            raise StateError(
                "run_upper_layers needs a forward pass that captured the input of the compressing layer; this one did "
                "not. Set Request(capture=True)."
            )
        fork, hidden, outputs = record.fork(shortened), record.hidden, {}
        for number in range(record.request.layer, self.parts.depth):
            out = self.parts.layers[number](hidden, **record.arguments[number], **{self._key: fork})
            hidden = outputs[number] = out if isinstance(out, Tensor) else out[0]
        return hidden, outputs

    def _shortened_arguments(
        self, number: int, kwargs: dict[str, Any], hidden: Tensor, shortened: Shortened
    ) -> dict[str, Any]:
        selection, new = shortened.selection, dict(kwargs)
        for name, value in kwargs.items():
            if name == "attention_mask" or value is None:
                continue
            if name in _ALIGNED:
                new[name] = _gather_all(value, shortened, _ALIGNED[name])
            elif isinstance(value, Tensor) and selection.length in value.shape[:3]:
                raise UnsupportedModelError(
                    f"{type(self.parts.decoder).__name__} passes {name} of shape {tuple(value.shape)} to its layers, "
                    f"which looks aligned with the sequence of {selection.length} tokens. How to shorten it is not "
                    "known, and leaving it would be wrong. Models whose layers take only masks, positions and a cache "
                    "are supported."
                )
        implementation = self.parts.decoder.config._attn_implementation
        if "flash" in implementation:
            new["position_ids"] = None  # gaps between positions would be taken for the borders of packed sequences
        new["attention_mask"] = self._short_mask(number, kwargs, hidden, shortened, implementation)
        return new

    def _short_mask(
        self, number: int, kwargs: dict[str, Any], hidden: Tensor, shortened: Shortened, implementation: str
    ) -> Tensor | None:
        selection, mask, cache = shortened.selection, kwargs.get("attention_mask"), kwargs.get("past_key_values")
        width = selection.short if cache is None else int(cache.get_mask_sizes(selection.short, number)[0])
        if mask is not None:
            return shortened.once(mask, lambda full: short_mask(full, selection, width), width)
        if shortened.dense and width == selection.short:
            return None  # plain causal attention on the short sequence
        if "flash" in implementation:
            return selection.valid.to(hidden.device)

        def build(index: Tensor) -> Tensor:
            at, valid = index.to(hidden.device), selection.valid.to(hidden.device)
            eager = "eager" in implementation
            full = ruled_mask(at, at, valid, causal_mask_function, eager=eager, dtype=hidden.dtype)
            return widen(full, width)

        return shortened.once(selection.index, build, width, hidden.device)


def attachments_of(parts: ModelParts) -> list[Attachment]:
    """The attachments whose hooks are on the model now."""
    owners = (getattr(hook, "__self__", None) for hook in parts.decoder._forward_pre_hooks.values())
    return [owner for owner in owners if isinstance(owner, Attachment)]


def _gather_all(value: Any, shortened: Shortened, axis: int) -> Any:
    """Gather a tensor, or each of a tuple of them. The batch axis is the one before the sequence, if there is one."""
    if isinstance(value, Sequence):
        return type(value)(_gather_all(each, shortened, axis) for each in value)  # type: ignore[call-arg]
    if not isinstance(value, Tensor):
        return value

    def gather(full: Tensor) -> Tensor:
        if full.ndim == 1:
            return shortened.selection.gather(full[None], 1)
        at = axis % full.ndim
        return shortened.selection.gather(full, at, batch_axis=at - 1)

    return shortened.once(value, gather)


def _last_real(mask: Tensor | None, visual: Tensor, length: int) -> Tensor:
    """The last position among the first `length` that is no padding, a row."""
    real = torch.ones_like(visual) if mask is None else mask
    position = torch.arange(length, device=visual.device)
    return torch.where(real[:, :length].to(visual.device), position, 0).amax(1)


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
