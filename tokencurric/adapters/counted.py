"""What is left, on a short sequence, of the positions that count."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencurric.adapters.layout import IGNORED, Layout
from tokencurric.adapters.stretch import Shortened
from tokencurric.errors import StateError
from tokencurric.selection import Selection


def _supervised(layout: Layout) -> tuple[Tensor, Tensor]:
    if layout.rows is None or layout.predictors is None:
        raise StateError("EPIC needs labels in the batch. Pass what tokencurric.data.ConversationCollator returns.")
    return layout.rows, layout.predictors


def counted_slots(
    layout: Layout, shortened: Shortened | None
) -> tuple[Int[Tensor, " position"], Int[Tensor, " position"]]:
    """Row and slot, on the short sequence, of each predicting position (or the nearest kept one before).

    Arguments and errors as of `counted_states`.
    """
    rows, slots = _supervised(layout)
    if shortened is None:
        return rows, slots
    device = shortened.selection.index.device
    return rows, shortened.selection.slot[rows.to(device), slots.to(device)]


def counted_states(
    layout: Layout, shortened: Shortened | None, hidden: Float[Tensor, "batch slots dim"]
) -> tuple[Float[Tensor, "position dim"], Bool[Tensor, " position"]]:
    """Hidden states at the predicting positions (or the nearest kept ones before), and which of those were kept.

    Args:
        layout: of the full sequence, with labels. shortened: what `hidden` is of it; None means all.

    Raises:
        StateError: the layout was made without labels.
    """
    rows, slots = counted_slots(layout, shortened)
    return hidden[rows.to(hidden.device), slots.to(hidden.device)], kept_predictors(layout, shortened)


def kept_predictors(layout: Layout, shortened: Shortened | None) -> Bool[Tensor, " position"]:
    """Which predicting positions were kept.

    Arguments and errors as of `counted_states`.
    """
    rows, predictors = _supervised(layout)
    if shortened is None:
        return torch.ones_like(rows, dtype=torch.bool)
    mask = shortened.selection.mask
    return mask[rows.to(mask.device), predictors.to(mask.device)]


def reachable_targets(
    layout: Layout, shortened: Shortened | None, targets: Int[Tensor, " position"]
) -> Int[Tensor, " position"]:
    """`targets`, ignored where nothing that survived stands at or before the position that should predict.

    Arguments and errors as of `counted_states`.
    """
    rows, predictors = _supervised(layout)
    if shortened is None:
        return targets
    before = shortened.selection.mask.cumsum(1)
    seen = before[rows.to(before.device), predictors.to(before.device)] > 0
    return torch.where(seen.to(targets.device), targets, IGNORED)


def visual_tokens(layout: Layout, shortened: Shortened | None) -> int:
    """Visual tokens of the batch that are kept."""
    every = sum(layout.visual_counts)
    return every if shortened is None else every - sum(layout.real_counts) + sum(shortened.lengths)


def padding_shares(layout: Layout, shortened: Shortened | None) -> tuple[float, float]:
    """The share of positions that are padding, on the full sequence and on the short one."""
    full = 1 - sum(layout.real_counts) / max(1, layout.visual.numel())
    if shortened is None:
        return full, full
    return full, 1 - sum(shortened.lengths) / max(1, shortened.selection.index.numel())


def selection_of(shortened: Shortened | None, layout: Layout) -> Selection:
    """The selection in force; everything where nothing was dropped."""
    if shortened is not None:
        return shortened.selection
    return Selection.from_mask(torch.ones_like(layout.visual), width=layout.length)
