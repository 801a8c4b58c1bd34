"""Hooks that let the upper layers of a decoder run on a short sequence, and that come off without a trace."""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tokencurric.adapters.compiled import outside_graphs
from tokencurric.adapters.decoding import CachePlan
from tokencurric.adapters.deepstack import Deepstack
from tokencurric.adapters.discovery import ModelParts
from tokencurric.adapters.forwards import Decoding, Forwards
from tokencurric.adapters.last_layer import LastLayer
from tokencurric.adapters.prompt import begin
from tokencurric.adapters.record import Carrier, Record, Request
from tokencurric.adapters.seam import Call, Seam
from tokencurric.adapters.short_caches import ShortCaches
from tokencurric.adapters.stretch import Stretch
from tokencurric.adapters.traces import Traces
from tokencurric.errors import ShapeError, StateError, UnsupportedModelError
from tokencurric.hosts.names import CACHE
from tokencurric.losses import Head


class Attachment:
    """The hooks of one user on one model. While `request` is None they change nothing.

    Args:
        seam: what there is to know about the model.

    Raises:
        StateError: another attachment is at work on the model.
    """

    def __init__(self, seam: Seam, *, compiled: bool = False) -> None:
        self.seam, self.parts = seam, seam.parts
        self.everywhere: Request | None = None  # of all threads
        self.forwards = Forwards(self.parts, compiled=compiled)
        self.traces = Traces()
        self._caches = ShortCaches()
        self._records = WeakTensorKeyDictionary()  # where layers cannot carry one: by what each layer was given
        parts, traces = self.parts, self.traces
        self.refuse_nesting()
        # The same whenever it can be: graphs that torch.compile makes hold for one key.
        taken = {other._key for other in attachments_of(parts)}
        self._key: str = next(key for number in count() if (key := f"tokencurric_{number}") not in taken)
        self._last = LastLayer(self._key, traces)
        for root in parts.roots:
            traces.before(root, self._before_root, with_kwargs=True)
            # First in line, so that wrappers such as FSDP2 see the loss among the root's outputs.
            traces.after(root, self._after_root, prepend=True)
            traces.after(root, self._root_ended)
        # First in line too, so that a ghost's weights are asked for where a picture's are: before the decoder's.
        first = parts.decoder not in parts.roots  # else what the root's hook sees has to come before
        traces.before(parts.decoder, self._before_decoder, prepend=first, with_kwargs=True)
        traces.after(seam.end, self._after_end, prepend=True)
        if not seam.carries:
            traces.after(parts.decoder, self._after_decoder)
            traces.after(parts.decoder, self._decoder_ended, always_call=True)
        for number, layer in enumerate(parts.layers):
            traces.before(layer, partial(self._before_layer, number), with_kwargs=True)
            traces.after(layer, partial(self._after_layer, number))
        if parts.head is not None:
            traces.before(parts.head, self._before_head)
            traces.after(parts.head, self._after_head, prepend=True)

    @property
    def request(self) -> Request | None:
        """What forward passes of this thread shall do; None leaves them alone. Setting it holds for this thread."""
        own = self.forwards.now.request
        return self.everywhere if own is None else own

    @request.setter
    def request(self, request: Request | None) -> None:
        self.forwards.now.request = request

    @property
    def record(self) -> Record | None:
        """Record of the latest forward of this thread."""
        return self.forwards.now.record

    @record.setter
    def record(self, record: Record | None) -> None:
        self.forwards.now.record = record

    def narrow(self) -> None:
        """From now on the last layer computes only what is looked at, where a request says what that is."""
        parts = self.seam.position_wise(self.parts.layers[-1])
        if parts is not None:
            self._last.attach(parts)

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
        for tap in self.forwards.armed():
            tap.close()  # also those of other threads, whose forwards broke off
        self.traces.remove()
        self._caches.close()
        self.everywhere = None
        self.forwards = Forwards(self.parts, compiled=self.forwards.compiled)
        self._records.clear()

    def settle(self) -> None:
        """Restore what a forward of this thread left when it broke off: a tapped module, a layer on some positions."""
        if torch.compiler.is_compiling():
            return  # a graph of this would hold for one prompt
        self._last.leave()
        now = self.forwards.now
        if now.tap is not None:
            now.tap.close()
            now.tap = None

    def note(self, kind: str, features: Any) -> None:
        """Keep what the model made of the images, or of the videos, of the forward under way."""
        now = self.forwards.now
        now.features = {**now.features, kind: features}

    # Hooks on the modules that see token ids

    def _before_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.request is None:
            return
        now = self.forwards.now
        if module is self.parts.roots[0] or module is self.parts.base:
            now.seen = {}
            now.features = {}
        now.seen = {**now.seen, **self.seam.seen(module, args, kwargs)}

    def _root_ended(self, *_: Any) -> None:
        self.forwards.now.seen = {}  # or a decoder that is called by itself would take it for its own

    def _after_root(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        record = self.record
        if self.request is not None and self.forwards.now.seen:
            raise UnsupportedModelError(
                f"{type(module).__name__} has not called its {type(self.parts.decoder).__name__} as a module: nothing "
                "was compressed.\nHint: call the decoder itself, not its layers or its forward."
            )
        if self.request is None or record is None:
            return None
        _refuse_unseen(module, record, self.parts.depth)
        return None if record.loss is None else self._hand_out(record.loss, output)

    @outside_graphs
    def _hand_out(self, loss: Tensor, output: Any) -> Any:
        return self.seam.with_loss(output, loss)

    # Hooks on the decoder

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.request is None:
            return None
        self.settle()
        now = self.forwards.now
        if not self.forwards.in_root():
            now.seen = {}  # of a call that broke off
        seen, now.seen = now.seen, {}
        features = {**(seen.get("mm_encoder_outputs") or {}), **now.features}  # `generate` makes them beforehand
        now.features = {}
        now.record = now.decoding = None
        visual = self.request.visual if self.request.layout is None else self.request.layout.visual
        call = self.seam.read(seen, args, kwargs, visual)
        if not self.seam.carries:
            now.call = call
        if call.past > 0:
            return self._go_on(call, args, kwargs)
        kwargs, deepstack = self.seam.enter(kwargs)
        now.record = record = self._begin(self.request, call, features, deepstack)
        if record.layout.padded_left and record.drops:
            kwargs, record.shift = self.seam.place(call, kwargs, record.layout.real.int().argmax(1))
        if self.request.ghost is not None and "inputs_embeds" in kwargs:
            embeds = kwargs["inputs_embeds"]
            kwargs = {**kwargs, "inputs_embeds": embeds + self.request.ghost().to(embeds)}
        if self.seam.carries:
            return args, {**kwargs, self._key: Carrier(record)}
        return args, kwargs

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note on the cache what this call left in it, where layers do not get it by name."""
        now = self.forwards.now
        if self.request is None or now.call is None:
            return
        record = now.record
        if record is not None and (self.parts.norm_inside or not record.decided):
            _refuse_unseen(module, record, self.parts.depth)
        if self.request.finish is None:
            self._note_plan(now.call, record, output)

    def _decoder_ended(self, *_: Any) -> None:
        self.forwards.now.call = None

    @outside_graphs
    def _note_plan(self, call: Call, record: Record | None, output: Any) -> None:
        self.seam.leave(call, output, (call.plan or CachePlan(())) if record is None else record.plan_up_to(None))

    def _go_on(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if call.pictures is not None:
            raise StateError(
                f"compress needs all pictures in the first call on a cache; got {call.pictures} with a cache that "
                f"holds {call.past} tokens. Only tokens of the first are compressed. Start a new cache."
            )
        plan = call.plan
        if plan is None:
            return None
        if self.seam.carries and not torch.compiler.is_compiling():
            self._caches.take(call.cache)
        decoding, kwargs = Decoding(plan, call), self.seam.go_on(plan, call, kwargs)
        if self.seam.carries:
            return args, {**kwargs, self._key: decoding}
        self.forwards.now.decoding = decoding
        return args, kwargs

    @outside_graphs
    def _begin(self, request: Request, call: Call, features: dict[str, Any], deepstack: Deepstack | None) -> Record:
        self.forwards.refuse_company()
        self.settle()
        return begin(self.parts, request, call, features, self.forwards.now.prompt, deepstack)

    def _after_end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        now = self.forwards.now
        if now.decoding is not None:
            now.decoding = None  # or it would hold a cache that nobody else does
        record = now.record
        return None if self.request is None or record is None else self._leave(record, module, output)

    @outside_graphs
    def _leave(self, record: Record, module: nn.Module, output: Any) -> Any:
        if self.seam.carries and record.request.layer < self.parts.depth and not record.decided:
            raise UnsupportedModelError(
                f"{type(module).__name__} does not pass its keyword arguments on to its layers, so they never learnt "
                "what to drop. Nothing would be compressed. Have its forward hand **kwargs to each layer."
            )
        if not record.through:
            return None  # the norm, on the way to a choice
        record.through = False
        hidden = self.seam.answer(output)
        if record.request.finish is not None:
            hidden = record.request.finish(record, hidden)
        elif record.shortened is not None:
            hidden = record.shortened.selection.expand(hidden)
        else:
            return None
        return self.seam.with_answer(output, hidden)

    # Hooks on the output head

    def _before_head(self, head: nn.Module, args: tuple[Any, ...]) -> Any:
        """Let one position through, whose logits nobody reads, and keep the rest for the loss."""
        record = self.record
        if self.request is None or record is None or record.request.score is None or record.loss is not None:
            return None
        return self._hold_back(record, args)

    @outside_graphs
    def _hold_back(self, record: Record, args: tuple[Any, ...]) -> Any:
        if not args:
            raise UnsupportedModelError(
                f"EPIC needs a model that gives its output head the hidden states in place, as in lm_head(hidden); "
                f"{type(self.parts.base).__name__} gives them by name. The loss is made of them."
            )
        record.reached = args[0]
        return args[0][:, :1], *args[1:]

    def _after_head(self, head: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Make the loss. Sharded weights are whole here, and again in backward, which begins at this output."""
        record = self.record
        if self.request is None or record is None or record.request.score is None or record.reached is None:
            return None
        reached, record.reached = record.reached, None
        return self._score(record, record.request.score, reached, head)

    @outside_graphs
    def _score(
        self, record: Record, score: Callable[[Record, Tensor, Head], Tensor], reached: Tensor, head: nn.Module
    ) -> Tensor:
        # Not through the module: how often it is called depends on the batch, and calls are where ranks wait.
        record.loss = score(record, reached, head.forward)
        return record.loss.reshape(1, 1, 1).clone()

    # Layers

    def _before_layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        carried: Carrier | Decoding | None = kwargs.get(self._key)
        if carried is None and self.seam.carries:
            return None
        kwargs = {name: value for name, value in kwargs.items() if name != self._key}
        if carried is None and self.request is not None and self.forwards.now.call is None and not _in_backward():
            raise StateError(
                f"A layer ran without a call of {type(self.parts.decoder).__name__}: nothing tells which tokens are "
                "visual.\nHint: set `decoder` of the adapter to the module that is called, as by a generate written by "
                "hand."
            )
        hidden, arguments = self.seam.arguments(layer, args, kwargs)
        record = carried.record if isinstance(carried, Carrier) else self._record_of(hidden)
        if record is not None:
            return self._enter(record, number, layer, hidden, arguments)
        decoding = carried if isinstance(carried, Decoding) else self.forwards.now.decoding
        if decoding is None:
            return None
        return (hidden,), self.seam.decode(number, arguments, hidden, decoding.plan, decoding.call)

    @outside_graphs
    def _enter(
        self, record: Record, number: int, layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        """Select at a compressing layer; hand the short sequence's arguments to it and those above."""
        self.seam.refuse_left(arguments)
        if number == 0 and hidden.shape[:2] != record.layout.visual.shape:
            raise ShapeError(
                f"The visual mask must cover the sequence that layer 0 is given, shape {tuple(hidden.shape[:2])}; got "
                f"{tuple(record.layout.visual.shape)}.\nHint: one entry per embedding, images included."
            )
        if record.deepstack is not None:
            below = record.at(number - 1).shortened
            hidden = record.deepstack.add(number, hidden, None if below is None else below.selection)
        if record.due(number):
            record.decide(hidden, self.parts.norm)
            self.forwards.now.tap = None
        stretch = record.at(number)
        if record.request.capture and record.hidden is not None:
            record.arguments[number] = self.seam.without_cache(arguments)
        if stretch.layer == number:
            hidden = stretch.enter(hidden)
        if stretch.shortened is not None:
            self._leave_plan(record, number, stretch, arguments)
            arguments = self.seam.shorten(number, arguments, hidden, stretch.shortened)
        if record.request.taps and record.due(number + 1) and max(stretch.layout.visual_counts, default=0):
            tap = self.seam.listen(layer, hidden, arguments, stretch.layout, stretch.shortened)
            record.tap = self.forwards.now.tap = tap
        if number == self.parts.depth - 1 and self._last.attached and record.predicting is not None:
            arguments = {**arguments, self._key: record.predicting}
        return (hidden,), arguments

    def _record_of(self, hidden: Tensor) -> Record | None:
        """Where layers cannot carry it: the record of the forward under way, or of the one that backward runs again."""
        if self.seam.carries:
            return None
        if _in_backward():  # a checkpointed layer gets what it got before
            found: Record | None = self._records.get(hidden)
            return found
        if self.request is None or self.record is None:
            return None
        if torch.is_grad_enabled():
            self._records[hidden] = self.record
        return self.record

    def _leave_plan(self, record: Record, number: int, stretch: Stretch, arguments: dict[str, Any]) -> None:
        """Note on the cache what layers up to this one hold, where the decoder makes its cache after its hook ran."""
        cache = CACHE.read(arguments) if self.seam.carries else None
        if cache is None or number > stretch.layer:
            return
        try:
            cache._tokencurric = record.plan_up_to(number)
            self._caches.take(cache)
        except AttributeError as error:
            raise StateError(
                f"compress needs a cache that takes an attribute; got a {type(cache).__name__}. What was dropped is "
                "noted there for the tokens to come. Use a class of your own that holds it."
            ) from error

    def _after_layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep the layer's output where it is asked for."""
        if number == self.parts.depth - 1:
            self._last.leave()
        record = self.record
        if record is None:
            return
        record.through = record.through or number == self.parts.depth - 1
        shortened = record.at(number).shortened
        if shortened is not None and record.request.finish is None:
            self.seam.layer_left(output, shortened)
        if record.request.features and number >= record.request.layer:
            record.features.setdefault(number, output if isinstance(output, Tensor) else output[0])

    def run_upper_layers(self, record: Record, stretch: Stretch | None) -> tuple[Tensor, dict[int, Tensor]]:
        """The layers from the compressing one on, once more, with another selection; without the final norm.

        Args:
            record: of a forward that captured. stretch: the other selection; None runs them at full length.

        Returns:
            The last layer's output; and every upper layer's, where the record's request asks for features.
        """
        if record.hidden is None:
            raise StateError(
                "run_upper_layers needs a forward pass that captured the input of the compressing layer; this one did "
                "not. Set Request(capture=True)."
            )
        fork, hidden = record.fork(stretch), record.hidden
        outputs: dict[int, Tensor] = {}
        carried = {self._key: Carrier(fork)} if self.seam.carries else {}
        self.record, before = fork, self.record
        try:
            for number in range(record.request.layer, self.parts.depth):
                out = self.parts.layers[number](hidden, **record.arguments[number], **carried)
                hidden = out if isinstance(out, Tensor) else out[0]
                if record.request.features:
                    outputs[number] = hidden
        finally:
            self.record = before
        return hidden, outputs


def _refuse_unseen(module: nn.Module, record: Record, depth: int) -> None:
    """Raise if a call of `module` is over and hooks have not seen its layers or its norm."""
    if record.request.layer < depth and (record.through or not record.decided):
        what = "applied the final norm to what its last layer returned" if record.decided else "called its layers"
        raise UnsupportedModelError(
            f"{type(module).__name__} has not {what} as modules, so hooks did not see it. Nothing would be "
            "compressed, or the output left short. Name the modules that the forward calls, and call them, not "
            "their forward."
        )


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def attachments_of(parts: ModelParts) -> list[Attachment]:
    """The attachments whose hooks are on the model now."""
    owners = (getattr(hook, "__self__", None) for hook in parts.decoder._forward_pre_hooks.values())
    return [owner for owner in owners if isinstance(owner, Attachment)]
