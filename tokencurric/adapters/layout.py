"""Where a batch has visual tokens, prompt text, padding, the query and what is to be learnt.

Everything the host has to know (widths of short tensors) is read from the device once, together.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tokencurric.adapters.pictures import Pictures
from tokencurric.errors import RangeError, ShapeError
from tokencurric.selection import Selection

IGNORED = -100  # label of a position that is not supervised, as in transformers


@dataclass(frozen=True, eq=False)
class Layout:
    """Positions of a batch, on its full sequence, and the counts the host knows.

    Args:
        visual, real: which positions are visual tokens; which are no padding.
        query: the end of the prompt, a row: whose attention is read.
        visual_positions, visual_valid: the visual positions, packed. text_positions, text_valid: the prompt text's.
        visual_counts, real_counts: a row, on the host. padded_left: whether some row has padding before its tokens.
        rows, predictors: of each supervised token, its row and the position that predicts it; None without labels.
        targets: the supervised tokens.
        pictures: whose visual tokens are whose, for budgets of each picture; None where rows have one budget.
    """

    visual: Bool[Tensor, "batch seq"]
    real: Bool[Tensor, "batch seq"]
    query: Int[Tensor, " batch"]
    visual_positions: Int[Tensor, "batch visual"]
    visual_valid: Bool[Tensor, "batch visual"]
    text_positions: Int[Tensor, "batch text"]
    text_valid: Bool[Tensor, "batch text"]
    visual_counts: tuple[int, ...]
    real_counts: tuple[int, ...]
    padded_left: bool = False
    rows: Int[Tensor, " position"] | None = None
    predictors: Int[Tensor, " position"] | None = None
    targets: Int[Tensor, " position"] | None = None
    pictures: Pictures | None = None

    @property
    def length(self) -> int:
        """Of the sequence."""
        return self.visual.shape[1]

    @property
    def prompt(self) -> Bool[Tensor, "batch seq"]:
        """True at tokens up to the query: what a choice may depend on."""
        position = torch.arange(self.length, device=self.real.device)
        return self.real & (position <= self.query.to(self.real.device)[:, None])

    def shorten(
        self,
        selection: Selection,
        visual_counts: tuple[int, ...],
        real_counts: tuple[int, ...],
        picture_counts: tuple[int, ...] | None,
    ) -> "Layout":
        """The layout of the selected slots, without what is to be learnt.

        Args:
            selection: from this layout's sequence. visual_counts, real_counts: what rows keep.
            picture_counts: what pictures keep, if they have budgets of their own.
        """
        slot, device = selection.slot, selection.index.device
        visual = selection.gather(self.visual.to(device)) & selection.valid
        positions, valid = _pack(visual, max(visual_counts, default=0))
        return Layout(
            visual=visual,
            real=selection.valid,
            query=slot.gather(1, self.query.to(device)[:, None])[:, 0],
            visual_positions=positions,
            visual_valid=valid,
            text_positions=slot.gather(1, self.text_positions.to(device)),
            text_valid=self.text_valid,
            visual_counts=visual_counts,
            real_counts=real_counts,
            pictures=None
            if self.pictures is None or picture_counts is None
            else self.pictures.keeping(selection, picture_counts),
        )


def lay_out(
    visual: Bool[Tensor, "batch seq"],
    attention_mask: Bool[Tensor, "batch seq"] | Int[Tensor, "batch seq"] | None = None,
    *,
    labels: Int[Tensor, "batch seq"] | None = None,
    query: Int[Tensor, " batch"] | None = None,
    groups: Int[Tensor, "batch seq"] | None = None,
    prompt: int | Int[Tensor, " batch"] | None = None,
) -> Layout:
    """Lay out a batch.

    The query is the end of the first prompt after a row's last visual token: with labels, the position before the
    first supervised token there; with `prompt`, the last token of that prompt; without either, or where there is none,
    the last real position.

    Args:
        visual: visual tokens. attention_mask: zero at padding; None means there is none. labels: as the model takes
            them, -100 where nothing is supervised. query: the query positions, if not the default.
        groups: a number for each visual token that is the same within a picture, where pictures have budgets of their
            own.
        prompt: positions of each row that belong to its prompt, counted from the start and padding included; what
            comes after is an answer, whose image placeholders are text. None means that nothing comes after.

    Raises:
        ShapeError: shapes differ.
        RangeError: a query lies outside the sequence, or a prompt has no token.

    Example:
        >>> visual = torch.tensor([[False, True, True, False, False]])
        >>> layout = lay_out(visual, labels=torch.tensor([[-100, -100, -100, -100, 7]]))
        >>> layout.query.tolist(), layout.text_positions.tolist(), layout.predictors.tolist()
        ([3], [[3]], [3])
    """
    batch, seq = visual.shape
    for name, tensor, shape in (
        ("attention_mask", attention_mask, (batch, seq)),
        ("labels", labels, (batch, seq)),
        ("query", query, (batch,)),
        ("groups", groups, (batch, seq)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ShapeError(
                f"lay_out needs {name} of shape {shape}; got {tuple(tensor.shape)}. It describes the same batch as "
                "the token ids. Pass the batch as the processor made it."
            )
    position = torch.arange(seq, device=visual.device)
    real = torch.ones_like(visual) if attention_mask is None else attention_mask.to(visual.device).bool()
    asked = real if prompt is None else real & (position < _ends(prompt, visual)[:, None])
    visual = visual & asked
    last_visual = torch.where(visual, position, -1).amax(1)
    last_real = torch.where(asked, position, 0).amax(1)
    supervised = None if labels is None else _predicting(labels.to(visual.device)) & real
    if query is None:
        query = last_real
        if labels is not None:
            query = _prompt_end(labels.to(visual.device), visual, real, last_visual, last_real)
    query = query.to(visual.device)
    text = real & ~visual & (position > last_visual[:, None]) & (position <= query[:, None])

    counts = [visual.sum(1), real.sum(1), text.sum(1), query, real.int().argmax(1)]
    counts.append(torch.zeros_like(query) if supervised is None else supervised.sum(1))
    counts.append(asked.sum(1))
    # The one wait for the device.
    n_visual, n_real, n_text, queries, first_real, n_supervised, n_asked = torch.stack(counts).tolist()
    if any(n == 0 < every for n, every in zip(n_asked, n_real, strict=True)):
        raise RangeError(
            f"prompt_length must leave at least one token per row; got rows with {n_asked} tokens before it.\n"
            "Hint: it counts positions from the start of a row, padding included."
        )
    if not all(0 <= q < seq for q in queries):
        raise RangeError(
            f"lay_out needs query positions from 0 to {seq - 1}; got {queries}. A query is a position of the full "
            "sequence, padding included. Leave it out for the end of the prompt."
        )
    visual_positions, visual_valid = _pack(visual, max(n_visual, default=0))
    text_positions, text_valid = _pack(text, max(n_text, default=0))
    rows = predictors = targets = None
    if supervised is not None and labels is not None:
        rows, predictors = torch.nonzero_static(supervised, size=sum(n_supervised)).unbind(1)
        targets = labels.to(visual.device)[rows, predictors + 1]
    return Layout(
        visual, real, query, visual_positions, visual_valid, text_positions, text_valid,
        tuple(n_visual), tuple(n_real), any(first_real), rows, predictors, targets,
        None if groups is None else Pictures.of(groups.to(visual.device), visual),
    )  # fmt: skip


def _ends(prompt: int | Tensor, visual: Tensor) -> Tensor:
    """Where each row's prompt ends."""
    batch, seq = visual.shape
    if isinstance(prompt, Tensor):
        if prompt.shape != (batch,) or prompt.is_floating_point() or prompt.dtype == torch.bool:
            raise ShapeError(
                f"prompt_length must be an int or an integer tensor of shape ({batch},); got {prompt.dtype} of shape "
                f"{tuple(prompt.shape)}.\nHint: one length per row, in positions from the start, padding included."
            )
        return prompt.to(visual.device)
    if not 0 < prompt <= seq:
        raise RangeError(
            f"prompt_length must be between 1 and {seq}, the length of the sequence; got {prompt}.\n"
            "Hint: it counts positions from the start of a row, padding included."
        )
    return torch.full((batch,), prompt, device=visual.device)


def _predicting(labels: Tensor) -> Tensor:
    """Positions whose next token is supervised."""
    return torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1), value=False)


def _prompt_end(labels: Tensor, visual: Tensor, real: Tensor, last_visual: Tensor, last_real: Tensor) -> Tensor:
    """First position at or after the last visual token that is no answer and precedes one; else the last real one.

    Visual tokens are never an answer, whatever their labels say: some collators label every token.
    """
    answer = (labels != IGNORED) & ~visual
    position = torch.arange(labels.shape[1], device=labels.device)
    precedes = torch.nn.functional.pad(answer[:, 1:], (0, 1), value=False)
    ends = precedes & ~answer & real & (position >= last_visual[:, None])
    return torch.where(ends.any(1), ends.int().argmax(1), last_real)


def _pack(mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Positions where `mask` holds, in order, packed to the left; and which entries are such."""
    order = (~mask).int().argsort(dim=1, stable=True)[:, :width]
    return order, mask.gather(1, order)
