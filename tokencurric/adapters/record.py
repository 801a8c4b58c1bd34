"""What one forward pass decided, so that every layer, and every recomputation of a layer, does the same."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencurric._transfer import on_device
from tokencurric.adapters.counted import counted_slots
from tokencurric.adapters.decoding import CachePlan
from tokencurric.adapters.deepstack import Deepstack
from tokencurric.adapters.last_layer import Positions
from tokencurric.adapters.layout import Layout
from tokencurric.adapters.signals import NORMED, TAPPED, look
from tokencurric.adapters.stretch import Shortened, Stretch
from tokencurric.adapters.tap import Tap
from tokencurric.budget import Budget
from tokencurric.compressors import Compressor
from tokencurric.draws import hash_tensor
from tokencurric.errors import RangeError, ShapeError, StateError
from tokencurric.losses import Head
from tokencurric.selection import Selection
from tokencurric.token_budget import Count, Cut
from tokencurric.view import VisualView


@dataclass(frozen=True, eq=False)
class Request:
    """What a forward pass shall do.

    Args:
        compressor: decides. cuts: how many tokens stay from which layers on. seed: of the compressor.
        layout: of the batch, if it is known; None has it made from what the model is called with.
        visual, query: the visual mask and the query positions, where the caller gives them.
        labels: [batch seq] what is to be learnt, where the caller gives it beside a visual mask.
        row_key: the samples' numbers; None takes a hash of each row's prompt.
        prompt: length of each row's prompt in positions, padding included, where an answer comes with it.
        pictures: whether budgets are of each picture. groups: which tokens are a picture, where the caller says so.
        chosen: what the layers from the first cut on run on, where it was chosen elsewhere, and nothing if they run on
            everything; None has this forward choose.
        looks_again: keep the view, for choices with other budgets.
        capture: keep what is needed to run the upper layers once more.
        features: keep the outputs of the upper layers.
        predictors_only: nobody looks at what the last layer makes of positions that predict no supervised token.
        finish: turns the decoder's short output into what reaches the output head; None expands it to full length.
        score: makes a loss of what reached the head, given the head, while its weights are whole.
        ghost: a zero that depends on the vision tower, added to the decoder's input.
    """

    compressor: Compressor
    cuts: tuple[Cut, ...]
    seed: int = 0
    layout: Layout | None = None
    visual: Bool[Tensor, "batch seq"] | None = None
    query: Int[Tensor, " batch"] | None = None
    labels: Int[Tensor, "batch seq"] | None = None
    row_key: Int[Tensor, " batch"] | None = None
    prompt: int | Int[Tensor, " batch"] | None = None
    pictures: bool = False
    groups: Int[Tensor, "batch seq"] | None = None
    chosen: tuple[Stretch, ...] | None = None
    looks_again: bool = False
    capture: bool = False
    features: bool = False
    predictors_only: bool = False
    finish: "Callable[[Record, Tensor], Tensor] | None" = None
    score: "Callable[[Record, Tensor, Head], Tensor] | None" = None
    ghost: Callable[[], Tensor] | None = None

    @property
    def layer(self) -> int:
        """First layer that runs short."""
        return self.cuts[0].layer

    @property
    def taps(self) -> bool:
        """Whether the layer before has to be listened to."""
        return bool(self.compressor.needs & TAPPED)


@dataclass(eq=False)
class Record:
    """One forward pass, for every layer and every recomputation of a layer.

    A `Carrier` takes it along the layers' keyword arguments where layers hand on what they do not know.
    """

    request: Request
    layout: Layout
    row_key: Int[Tensor, " batch"]
    deepstack: Deepstack | None = None
    decided: int = 0
    stretches: list[Stretch] = field(default_factory=list)
    tap: Tap | None = None
    view: VisualView | None = None
    hidden: Float[Tensor, "batch seq dim"] | None = None
    arguments: dict[int, dict[str, Any]] = field(default_factory=dict)
    features: dict[int, Tensor] = field(default_factory=dict)
    reached: Tensor | None = None
    loss: Tensor | None = None
    shift: Int[Tensor, " batch"] | None = None  # what was subtracted from the positions that the model makes
    through: bool = False  # the last layer has run, and nobody has taken its answer yet

    def __post_init__(self) -> None:
        if not self.stretches:
            self.stretches += [Stretch(0, self.layout), *(self.request.chosen or ())]
        if self.request.chosen is not None:
            self.decided = len(self.request.cuts)

    @cached_property
    def drops(self) -> bool:
        """Whether some row, or picture, will lose tokens."""
        return any(self._short_of(cut) for cut in self.request.cuts)

    @property
    def shortened(self) -> Shortened | None:
        """What the last layer runs on; None where nothing was dropped."""
        return self.stretches[-1].shortened

    def at(self, layer: int) -> Stretch:
        """The stretch that `layer` belongs to."""
        return next((each for each in reversed(self.stretches) if each.layer <= layer), self.stretches[0])

    def due(self, layer: int) -> bool:
        """Whether a choice is still to be made at the input of `layer`."""
        return self.decided < len(self.request.cuts) and self.request.cuts[self.decided].layer == layer

    def decide(self, hidden: Tensor, norm: Callable[[Tensor], Tensor]) -> None:
        """Choose the survivors from the input of a compressing layer."""
        cut, below, self.decided = self.request.cuts[self.decided], self.stretches[-1], self.decided + 1
        if self.request.capture:
            self.hidden = hidden.detach()
        if max(below.layout.visual_counts, default=0) == 0:
            with torch.no_grad():
                for _ in self.request.compressor.needs & NORMED:  # ranks with pictures may wait for this one's share
                    norm(hidden[:, :1])
            return
        with torch.no_grad():
            self.view = self._look(below, hidden.detach(), norm)
        stretch = self.shorten(cut)
        if stretch is not None:
            self.stretches.append(stretch)
        if not self.request.looks_again:
            self.view = None  # nobody selects again: free the copies it holds

    def shorten(self, cut: Cut) -> Stretch | None:
        """What layers from `cut.layer` on run on; None where they run on what those below do."""
        below, view = self.at(cut.layer - 1), self.view
        if view is None:
            return None
        layout, original = below.layout, self.layout
        if layout.pictures is None or original.pictures is None:
            keep, kept = self._counts(cut, original.visual_counts, layout.visual_counts)
            if kept == layout.visual_counts:
                return None
            lost = [now < before for now, before in zip(layout.visual_counts, original.visual_counts, strict=True)]
            mask = self._ask(_anew(view, cut.layer, lost), keep, kept)
            in_pictures = None
        else:
            pictures = layout.pictures
            keep, in_pictures = self._counts(cut, original.pictures.counts, pictures.counts, pictures.rows)
            if in_pictures == pictures.counts:
                return None
            at = layout.visual_positions.to(view.tokens.device)
            lost = [now < before for now, before in zip(pictures.counts, original.pictures.counts, strict=True)]
            split = _anew(pictures.split(view, at), cut.layer, lost)
            mask = pictures.join(self._ask(split, keep, in_pictures), at, view.mask)
            kept = tuple(
                sum(count for count, of in zip(in_pictures, pictures.rows, strict=True) if of == row)
                for row in range(len(layout.visual_counts))
            )
        return self._stretch(cut.layer, below, mask, kept, in_pictures)

    @cached_property
    def predicting(self) -> Positions | None:
        """Where the last layer is looked at, on the sequence it runs on; None where that is everywhere, or nowhere."""
        layout, shortened = self.layout, self.shortened
        batch, width = (layout.visual if shortened is None else shortened.selection.index).shape
        if not self.request.predictors_only or layout.rows is None or not 0 < len(layout.rows) < batch * width:
            return None
        rows, slots = counted_slots(layout, shortened)
        return Positions(rows.to(slots.device), slots, (batch, width))

    def plan_up_to(self, layer: int | None) -> CachePlan:
        """What the layers up to `layer` hold of this prompt; None means all layers."""
        # Without the memo: decoding has no use for the prompt's masks, and the cache lives long.
        cuts = tuple(
            (each.layer, replace(each.shortened, memo={}))
            for each in self.stretches
            if each.shortened is not None and (layer is None or each.layer <= layer)
        )
        return CachePlan(cuts, self.shift)

    def fork(self, stretch: Stretch | None) -> "Record":
        """A record of the same forward pass with another selection."""
        deepstack = None if self.deepstack is None else self.deepstack.above(self.request.layer)
        stretches = [self.stretches[0], *([] if stretch is None else [stretch])]
        return Record(
            self.request, self.layout, self.row_key, deepstack, decided=len(self.request.cuts), stretches=stretches
        )

    def _short_of(self, cut: Cut) -> bool:
        pictures, rows = self.layout.pictures, self.layout.visual_counts
        if pictures is None:
            return self._counts(cut, rows, rows)[1] != rows
        return self._counts(cut, pictures.counts, pictures.counts, pictures.rows)[1] != pictures.counts

    def _counts(
        self, cut: Cut, original: tuple[int, ...], now: tuple[int, ...], rows: tuple[int, ...] | None = None
    ) -> tuple[Budget, tuple[int, ...]]:
        """The budget of each row (or picture, with its row), and what each keeps."""
        keep = cut.amount(original)
        batch = len(self.layout.visual_counts)
        if isinstance(keep, Tensor) and isinstance(cut.amount, Count):
            if len(keep) != batch:
                raise ShapeError(
                    f"compress needs a count for each of the batch's {batch} rows; got {len(keep)} "
                    f"(keep={keep.tolist()}). Pass one int for all rows, or as many counts as rows."
                )
            keep = keep if rows is None else keep[torch.tensor(rows, dtype=torch.int64)]
        wanted = keep.tolist() if isinstance(keep, Tensor) else [keep] * len(now)
        return keep, tuple(min(k, n) for k, n in zip(wanted, now, strict=True))

    def _ask(self, view: VisualView, keep: Budget, kept: tuple[int, ...]) -> Tensor:
        with torch.no_grad():
            mask = self.request.compressor(view, keep, seed=self.request.seed)
        self._check(mask, view.mask, list(kept))
        return mask

    def _stretch(
        self, layer: int, below: Stretch, mask: Tensor, kept: tuple[int, ...], in_pictures: tuple[int, ...] | None
    ) -> Stretch:
        layout = below.layout
        survives = layout.real & ~layout.visual
        # Entries past a row's tokens point at positions that are not visual: those keep what they have.
        at_positions = survives.gather(1, layout.visual_positions)
        mask = torch.where(layout.visual_valid, mask.to(survives.device), at_positions)
        survives = survives.scatter(1, layout.visual_positions, mask)
        lengths = tuple(real - n + k for real, n, k in zip(layout.real_counts, layout.visual_counts, kept, strict=True))
        if not self.request.compressor.tags.exact:
            # What it kept is only known when it is read, which waits for the device.
            kept, lengths = tuple((mask & layout.visual_valid).sum(1).tolist()), tuple(survives.sum(1).tolist())
            in_pictures = None if layout.pictures is None else layout.pictures.count(survives)
        if any(length == 0 < real for length, real in zip(lengths, layout.real_counts, strict=True)):
            raise RangeError(
                f"compress needs at least one token left in every row; got rows that keep {list(lengths)} tokens. A "
                "row of visual tokens alone would vanish. Keep at least 1, or put text around the picture."
            )
        here = Selection.from_mask(survives, width=max(lengths))
        whole = here if below.shortened is None else below.shortened.selection.then(here)
        shortened = Shortened(whole, self.layout.real.int().argmax(1), lengths)
        again = layer < self.request.cuts[-1].layer  # somebody looks at the short sequence
        return Stretch(
            layer, layout.shorten(here, kept, lengths, in_pictures) if again else layout, shortened, here.index
        )

    def _check(self, mask: Tensor, valid: Tensor, kept: list[int]) -> None:
        name, shape = type(self.request.compressor).__name__, tuple(valid.shape)
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ShapeError(
                f"A compressor needs to return a boolean mask of shape {shape}; {name} returned dtype={mask.dtype}, "
                f"shape={tuple(mask.shape)}. True marks a survivor. Check it with tokencurric.testing."
            )
        if not self.request.compressor.tags.exact:
            return
        right = ((mask & valid.to(mask.device)).sum(1) == on_device(kept, mask.device)).all()
        if mask.device.type != "cpu":
            torch._assert_async(right)  # no wait for the device in every step
        elif not bool(right):
            raise RangeError(
                f"{name} needs to keep exactly {kept} tokens of the rows, as its tag exact=True says; it kept "
                f"{mask.sum(1).tolist()}. The widths of the short tensors rely on it. Mend it, or set exact=False."
            )

    def _look(self, below: Stretch, hidden: Tensor, norm: Callable[[Tensor], Tensor]) -> VisualView:
        tapped = None if self.tap is None else self.tap.tapped
        if self.request.taps and tapped is None:
            raise StateError(
                f"{type(self.request.compressor).__name__} needs attention or keys of layer "
                f"{self.request.cuts[self.decided - 1].layer - 1}; that layer's attention module never called "
                "transformers' attention interface. Use a compressor that needs neither, such as Random or Uniform."
            )
        self.tap = None  # frees the layer's keys
        return look(below, hidden, norm, self.request.compressor.needs, tapped, self.row_key)


class Carrier:
    """Takes a record through modules that sharding wraps: those copy a dataclass among the arguments, with its tensors.

    Args:
        record: the one that all layers shall see.
    """

    def __init__(self, record: Record) -> None:
        self.record = record


def _anew(view: VisualView, layer: int, lost: list[bool]) -> VisualView:
    """The view for a second choice: rows that lost tokens at a first one do not repeat its draws.

    By their keys and not by the seed, so that a row's draw does not hang on what other rows lost.
    """
    if not any(lost):
        return view
    keys = view.keys_of_rows
    where = on_device(lost, keys.device)
    return replace(view, row_key=torch.where(where, hash_tensor(layer, keys), keys))
