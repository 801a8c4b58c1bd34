"""What one forward pass decided, so that every layer, and every recomputation of a layer, does the same."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencurric.adapters.deepstack import Deepstack
from tokencurric.adapters.layout import Layout
from tokencurric.adapters.tap import AttentionTap
from tokencurric.budget import Budget, keep_count
from tokencurric.compressors import Compressor
from tokencurric.errors import RangeError, ShapeError, StateError
from tokencurric.selection import Selection
from tokencurric.view import VisualView

TAPPED = frozenset({"attention", "keys", "text_keys"})  # signals that need the layer before


@dataclass(frozen=True)
class Count:
    """`keep` tokens of every row, or as many as `keep` says a row.

    Example:
        >>> Count(128)((576, 576))
        128
    """

    keep: Budget

    def __call__(self, counts: tuple[int, ...]) -> Budget:
        """The budget."""
        return self.keep


@dataclass(frozen=True)
class Ratio:
    """The fraction `ratio` of each row's tokens removed.

    Example:
        >>> Ratio(7 / 9)((576, 0, 1152)).tolist()
        [128, 0, 256]
    """

    ratio: float | int

    def __call__(self, counts: tuple[int, ...]) -> Budget:
        """The budget, a row."""
        return torch.tensor([keep_count(n, self.ratio) for n in counts], dtype=torch.int64)


Amount: TypeAlias = Count | Ratio


@dataclass(frozen=True, eq=False)
class Request:
    """What a forward pass shall do.

    Args:
        compressor: decides. amount: how many tokens stay. layer: first layer that runs short. seed: of the compressor.
        layout: of the batch, if it is known; None has it made from what the model is called with.
        visual, query: the visual mask and the query positions, where the caller gives them.
        row_key: the samples' numbers; None takes a hash of each row's token ids.
        capture: keep what is needed to run the upper layers once more.
        features: keep the outputs of the upper layers.
        finish: turns the decoder's short output into what the model goes on with; None expands it to full length.
        ghost: a zero that depends on the vision tower, added to the decoder's input.
    """

    compressor: Compressor
    amount: Amount
    layer: int
    seed: int = 0
    layout: Layout | None = None
    visual: Bool[Tensor, "batch seq"] | None = None
    query: Int[Tensor, " batch"] | None = None
    row_key: Int[Tensor, " batch"] | None = None
    capture: bool = False
    features: bool = False
    finish: "Callable[[Record, Tensor], Tensor] | None" = None
    ghost: Callable[[], Tensor] | None = None

    @property
    def taps(self) -> bool:
        """Whether the layer before has to be listened to."""
        return bool(self.compressor.needs & TAPPED)


@dataclass(frozen=True, eq=False)
class Shortened:
    """A selection in force.

    Args:
        selection: the survivors. dense: no row has a filler. left_padding: of the full sequence, a row.
        memo: tensors that several layers share, gathered once.
    """

    selection: Selection
    dense: bool
    left_padding: Int[Tensor, " batch"]
    memo: dict[Any, tuple[Any, Any]] = field(default_factory=dict)

    def once(self, tensor: Tensor, gather: Callable[[Tensor], Tensor], *key: Any) -> Tensor:
        """`gather(tensor)`, computed once for each tensor."""
        name = (id(tensor), *key)
        if name not in self.memo:
            self.memo[name] = (tensor, gather(tensor))  # holding the tensor keeps its id from being used again
        gathered: Tensor = self.memo[name][1]
        return gathered


@dataclass(eq=False)
class Record:
    """One forward pass. It rides in the layers' keyword arguments, so a recomputation finds it again."""

    request: Request
    layout: Layout
    row_key: Int[Tensor, " batch"]
    deepstack: Deepstack | None = None
    decided: bool = False
    shortened: Shortened | None = None
    tap: AttentionTap | None = None
    view: VisualView | None = None
    hidden: Float[Tensor, "batch seq dim"] | None = None
    arguments: dict[int, dict[str, Any]] = field(default_factory=dict)
    features: dict[int, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None

    def decide(self, hidden: Tensor, norm: Callable[[Tensor], Tensor]) -> None:
        """Choose the survivors from the input of the compressing layer."""
        self.decided = True
        if self.request.capture:
            self.hidden = hidden.detach()
        if max(self.layout.visual_counts, default=0) == 0:
            return
        with torch.no_grad():
            self.view = self._look(hidden.detach(), norm)
        self.shortened = self.shorten(self.request.amount)
        if not self.request.capture:
            self.view = None  # nobody selects again: free the copies it holds

    def shorten(self, amount: Amount) -> Shortened | None:
        """The selection that keeps `amount`; None where nothing is dropped."""
        layout, view = self.layout, self.view
        if view is None:
            return None
        keep = amount(layout.visual_counts)
        wanted = keep.tolist() if isinstance(keep, Tensor) else [keep] * len(layout.visual_counts)
        if len(wanted) != len(layout.visual_counts):
            raise ShapeError(
                f"compress needs a count for each of the batch's {len(layout.visual_counts)} rows; got {len(wanted)} "
                f"(keep={wanted}). Pass one int for all rows, or as many counts as rows."
            )
        kept = [min(k, n) for k, n in zip(wanted, layout.visual_counts, strict=True)]
        if kept == list(layout.visual_counts):
            return None
        compressor = self.request.compressor
        with torch.no_grad():
            mask = compressor(view, keep, seed=self.request.seed)
        self._check(mask, kept)
        survives = layout.real & ~layout.visual
        # Entries past a row's tokens point at positions that are not visual: those keep what they have.
        at_positions = survives.gather(1, layout.visual_positions)
        mask = torch.where(layout.visual_valid, mask.to(survives.device), at_positions)
        survives = survives.scatter(1, layout.visual_positions, mask)
        lengths = [real - n + k for real, n, k in zip(layout.real_counts, layout.visual_counts, kept, strict=True)]
        if any(length == 0 < real for length, real in zip(lengths, layout.real_counts, strict=True)):
            raise RangeError(
                f"compress needs at least one token left in every row; got rows that keep {lengths} tokens. A row of "
                "visual tokens alone would vanish. Keep at least 1, or put text around the picture."
            )
        exact = compressor.tags.exact
        selection = Selection.from_mask(survives, width=max(lengths) if exact else None)
        dense = len(set(lengths)) == 1 if exact else bool(selection.valid.all())
        return Shortened(selection, dense, layout.real.int().argmax(1))

    def fork(self, shortened: Shortened | None) -> "Record":
        """A record of the same forward pass with another selection."""
        deepstack = None if self.deepstack is None else self.deepstack.above(self.request.layer)
        return Record(self.request, self.layout, self.row_key, deepstack=deepstack, decided=True, shortened=shortened)

    def _check(self, mask: Tensor, kept: list[int]) -> None:
        name, shape = type(self.request.compressor).__name__, tuple(self.layout.visual_valid.shape)
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ShapeError(
                f"A compressor needs to return a boolean mask of shape {shape}; {name} returned dtype={mask.dtype}, "
                f"shape={tuple(mask.shape)}. True marks a survivor. Check it with tokencurric.testing."
            )
        if not self.request.compressor.tags.exact:
            return
        right = (
            (mask & self.layout.visual_valid.to(mask.device)).sum(1) == torch.tensor(kept, device=mask.device)
        ).all()
        if mask.device.type != "cpu":
            torch._assert_async(right)  # no wait for the device in every step
        elif not bool(right):
            raise RangeError(
                f"{name} needs to keep exactly {kept} tokens of the rows, as its tag exact=True says; it kept "
                f"{mask.sum(1).tolist()}. The widths of the short tensors rely on it. Mend it, or set exact=False."
            )

    def _look(self, hidden: Tensor, norm: Callable[[Tensor], Tensor]) -> VisualView:
        layout, needs = self.layout, self.request.compressor.needs
        visual, text = layout.visual_positions.to(hidden.device), layout.text_positions.to(hidden.device)
        tokens = _pick(hidden, visual)
        signals: dict[str, Tensor] = {}
        if "normed_tokens" in needs:
            signals["normed_tokens"] = norm(tokens)
        if needs & {"text_tokens", "normed_text_tokens"}:
            signals["text_tokens"] = _pick(hidden, text)
            if "normed_text_tokens" in needs:
                signals["normed_text_tokens"] = norm(signals["text_tokens"])
        if self.request.taps:
            tapped = None if self.tap is None else self.tap.tapped
            if tapped is None:
                raise StateError(
                    f"{type(self.request.compressor).__name__} needs attention or keys of layer "
                    f"{self.request.layer - 1}; that layer's attention module never called transformers' attention "
                    "interface. Use a compressor that needs neither, such as Random or Uniform."
                )
            keys = rearrange(tapped.keys, "batch heads seq width -> batch seq heads width").to(hidden.device)
            signals["keys"] = _pick(keys, visual)
            signals["text_keys"] = _pick(keys, text)
            signals["attention"] = tapped.attention.to(hidden.device).gather(1, visual)
            self.tap = None  # frees the layer's keys
        return VisualView(
            tokens=tokens,
            valid=layout.visual_valid.to(hidden.device),
            positions=visual,
            row_key=self.row_key.to(hidden.device),
            text_valid=layout.text_valid.to(hidden.device),
            **signals,
        )


def _pick(x: Tensor, positions: Tensor) -> Tensor:
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[rows, positions]
