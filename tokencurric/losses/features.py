"""Distance between the hidden states of student and teacher, layer by layer."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from tokencurric.errors import ShapeError
from tokencurric.selection import Selection, take


def feature_distance(
    student: Mapping[int, Float[Tensor, "batch _ dim"]],
    kept: Selection,
    teacher: Mapping[int, Float[Tensor, "batch _ dim"]],
    taught: Selection,
    row_weight: Shaped[Tensor, " batch"],
    real: Bool[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared distance over layers, width and the positions that both keep, a row; summed with row weights.

    Args:
        student, teacher: outputs of the layers, by number; the teacher's are constants. kept, taught: their selections.
        row_weight: what a row counts, such as its number of supervised tokens, so that micro-batches add up.
        real: positions of the full sequence that are no padding, which counts in no mean; None means all.

    Returns:
        Σ_rows weight · mean (h_student − h_teacher)², in float32.

    Raises:
        ShapeError: the two do not have the same layers or widths.

    Example:
        >>> everything = Selection.from_mask(torch.ones(1, 3, dtype=torch.bool))
        >>> states = {0: torch.randn(1, 3, 4)}
        >>> float(feature_distance(states, everything, states, everything, torch.ones(1)))
        0.0
    """
    if student.keys() != teacher.keys() or any(student[i].shape[-1] != teacher[i].shape[-1] for i in student):
        raise ShapeError(
            f"The feature loss needs a teacher with the student's layers and width; got layers {sorted(student)} and "
            f"{sorted(teacher)}. Hidden states are compared layer by layer. Set feature_weight=0 for this teacher."
        )
    both = kept.valid & taught.mask.gather(1, kept.index)
    if real is not None:
        both = both & real.to(both.device).gather(1, kept.index)
    slots = taught.slot.gather(1, kept.index)
    total = torch.zeros(both.shape[0], device=both.device)
    for layer, hidden in student.items():
        target = take(teacher[layer].detach(), slots, 1).to(hidden.device)
        each = (hidden.float() - target.float()).square().mean(-1)
        total = total + torch.where(both.to(each.device), each, 0.0).sum(1).to(total.device)
    row_mean = total / both.sum(1).clamp(min=1) / max(1, len(student))
    return (row_mean * row_weight.to(row_mean)).sum()
