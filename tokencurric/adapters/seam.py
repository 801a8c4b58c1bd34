"""What hooks ask about a model: the same questions of transformers models and of those with a `ModelAdapter`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Int
from torch import Tensor, nn

from tokencurric.adapters.decoding import CachePlan
from tokencurric.adapters.deepstack import Deepstack
from tokencurric.adapters.discovery import ModelParts
from tokencurric.adapters.last_layer import PositionWise
from tokencurric.adapters.layout import Layout
from tokencurric.adapters.stretch import Shortened
from tokencurric.adapters.tap import Tap


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a model, as far as compression has to know it.

    Args:
        visual: which positions are visual tokens; None if the call does not tell. real: which are no padding, of the
            prompt, or after it of all positions so far; None means all. ids: token ids, None if there are none.
        labels: as the model takes them.
        shape: batch and length of what the decoder is given, where that is known apart from `visual`.
        cache: what keeps keys and values; None if nothing does. past: positions it stands for already.
        pictures: name of an argument that brings pictures, if there is one.
        placed: whether the caller gave positions.
        plan: what a compressed prompt left in the cache; None if nothing was dropped there.
        inputs: what the call brings, by name, where an adapter reads it.
        content: [batch seq ...] what tells rows apart, token ids or embeddings; None where that is unknown.
    """

    visual: Bool[Tensor, "batch seq"] | None = None
    real: Bool[Tensor, "batch _"] | None = None
    ids: Int[Tensor, "batch seq"] | None = None
    labels: Int[Tensor, "batch seq"] | None = None
    shape: tuple[int, ...] | None = None
    cache: Any = None
    past: int = 0
    pictures: str | None = None
    placed: bool = False
    plan: CachePlan | None = None
    inputs: Mapping[str, Any] | None = None
    content: Tensor | None = None


@runtime_checkable
class Seam(Protocol):
    """Answers of one model.

    Args:
        parts: of the model. end: the module whose output holds the hidden states after the final norm.
        carries: whether layers hand on keyword arguments that they do not know, so that a record can ride there.
    """

    parts: ModelParts
    end: nn.Module
    carries: bool

    def seen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a call of one of the roots brings, by name."""
        ...

    def read(
        self,
        seen: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        visual: Bool[Tensor, "batch seq"] | None = None,
    ) -> Call:
        """The call, from what the roots saw and what the decoder is called with.

        Args:
            seen: what the roots were called with, by name; empty where the decoder is called by itself.
            args: positional arguments of the decoder.
            kwargs: arguments of the decoder by name.
            visual: [batch seq] visual mask, where the caller gives it; None has it found.
        """
        ...

    def leave(self, call: Call, output: Any, plan: CachePlan) -> None:
        """Note on the cache what a call left in it.

        Args:
            call: the call.
            output: output of the decoder.
            plan: what the layers of the cache hold; without cuts where nothing was dropped.
        """
        ...

    def refuse_left(self, arguments: dict[str, Any]) -> None:
        """Raise if a layer that begins a prompt is given what a compressed call left."""
        ...

    def layer_left(self, output: Any, shortened: Shortened) -> None:
        """Look at the output of a short layer, outside of training."""
        ...

    def enter(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Deepstack | None]:
        """The decoder's arguments, without features that it would add itself between its layers."""
        ...

    def place(
        self, call: Call, kwargs: dict[str, Any], padding: Int[Tensor, " batch"]
    ) -> tuple[dict[str, Any], Int[Tensor, " batch"] | None]:
        """The decoder's arguments with positions of each row alone, and what was subtracted; see `row_positions`."""
        ...

    def go_on(self, plan: CachePlan, call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The decoder's arguments for tokens after a compressed prompt."""
        ...

    def arguments(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states that a layer is called with, and its other arguments by name."""
        ...

    def shorten(self, number: int, arguments: dict[str, Any], hidden: Tensor, shortened: Shortened) -> dict[str, Any]:
        """A layer's arguments for a short sequence, from those for the full one."""
        ...

    def decode(
        self, number: int, arguments: dict[str, Any], hidden: Tensor, plan: CachePlan, call: Call
    ) -> dict[str, Any]:
        """A layer's arguments for tokens after a compressed prompt."""
        ...

    def listen(
        self, layer: nn.Module, hidden: Tensor, arguments: dict[str, Any], layout: Layout, shortened: Shortened | None
    ) -> Tap:
        """Attention and keys of a layer, read now or while it runs."""
        ...

    def without_cache(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A layer's arguments for a second run that leaves the cache alone."""
        ...

    def answer(self, output: Any) -> Tensor:
        """Hidden states in the output of `end`."""
        ...

    def with_answer(self, output: Any, hidden: Tensor) -> Any:
        """The output of `end` with other hidden states."""
        ...

    def with_loss(self, output: Any, loss: Tensor) -> Any:
        """The output of the model with a loss."""
        ...

    def run(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
        """Call the model for the loss that `with_loss` put there."""
        ...

    def ghost(self, inputs: Mapping[str, Any]) -> Callable[[], Tensor] | None:
        """What keeps ranks together when one of them has no picture; None if nothing has to."""
        ...

    def position_wise(self, layer: nn.Module) -> PositionWise | None:
        """What of a layer treats each position by itself, where that is known."""
        ...

    def refuse_unfit_head(self) -> None:
        """Raise unless the head alone turns hidden states into logits, as far as that shows without a batch."""
        ...

    def refuse_changed_output(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Raise unless `model` returns what its head gives, where it takes a batch to see that."""
        ...
