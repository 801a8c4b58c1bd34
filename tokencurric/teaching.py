"""The teacher's side of EPIC: which tokens it sees, and the forward pass in which it says what it makes of them."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokencurric.adapters.attachment import Attachment
from tokencurric.adapters.counted import counted_states
from tokencurric.adapters.quiet import evaluating
from tokencurric.adapters.record import Record, Request
from tokencurric.adapters.seam import Call, Seam
from tokencurric.adapters.stretch import Shortened, Stretch
from tokencurric.errors import RangeError, ShapeError
from tokencurric.losses import Head
from tokencurric.token_budget import Cut

Chosen = tuple[Stretch, ...]


@dataclass(frozen=True)
class TeacherSide:
    """What a teacher's forward left.

    Args:
        hidden: hidden states at the counted positions, after the final norm.
        kept: which of these positions the teacher kept.
        shortened: what the teacher ran on; None means all.
        features: outputs of the upper layers, by number; empty where nobody compares them.
    """

    hidden: Float[Tensor, "position dim"]
    kept: Bool[Tensor, " position"]
    shortened: Shortened | None
    features: dict[int, Tensor]


def chosen_at(record: Record, cut: Cut) -> Chosen:
    """What `cut` leaves of the tokens that a forward pass looked at, for another forward pass on the same batch.

    The same view and seed choose for student and teacher, so a nested compressor lets the teacher keep all that the
    student keeps, whichever of the two looks.

    Args:
        record: of a forward pass whose request has `capture` or `looks_again`.
        cut: a budget for the layer at which that pass looked.
    """
    stretch = record.shorten(cut)
    if stretch is None or stretch.shortened is None:
        return ()
    # Each forward pass gathers its own masks and positions, perhaps on another device.
    return (replace(stretch, shortened=replace(stretch.shortened, memo={})),)


def shared_pass(attachment: Attachment, record: Record, cut: Cut) -> TeacherSide:
    """The teacher that shares the student's lower layers: the upper ones once more, in evaluation mode.

    Args:
        attachment: of the student. record: of its forward, which captured. cut: the teacher's.
    """
    stretch = record.shorten(cut)
    shortened = None if stretch is None else stretch.shortened
    with torch.no_grad(), evaluating(attachment.parts.layers[cut.layer :]):
        hidden, features = attachment.run_upper_layers(record, stretch)
        at, kept = counted_states(record.layout, shortened, hidden)
        return TeacherSide(attachment.parts.norm(at), kept, shortened, features)


def separate_pass(
    attachment: Attachment, model: nn.Module, inputs: Mapping[str, Any], request: Request, student: Cut | None = None
) -> tuple[TeacherSide, Chosen | None]:
    """A teacher's own forward, in evaluation mode and without gradient.

    Args:
        attachment: of the teacher. model: the teacher. inputs: what it takes. request: the teacher's.
        student: a cut for which this pass chooses, too; None chooses for the teacher alone.

    Returns:
        The teacher's side, and what the student shall run on.
    """
    attachment.refuse_nesting()
    sides: list[tuple[TeacherSide, Chosen | None]] = []

    def finish(record: Record, hidden: Tensor) -> Tensor:
        at, kept = counted_states(record.layout, record.shortened, hidden)
        side = TeacherSide(at, kept, record.shortened, dict(record.features))
        sides.append((side, None if student is None else chosen_at(record, student)))
        return hidden[:1, :1]  # as in a student's forward: what follows the head is made of one position

    attachment.request = replace(request, finish=finish, looks_again=student is not None)
    try:
        with torch.no_grad(), evaluating(model):
            attachment.seam.run(model, inputs)
    finally:
        attachment.settle()
        attachment.request = attachment.record = None
    return sides[0]


def refuse_shared_layers(student: Seam, teacher: Seam) -> None:
    """Raise if the two are one decoder: a module teacher runs within the student's forward pass.

    Raises:
        RangeError: they are.
    """
    if student.parts.layers is teacher.parts.layers:
        raise RangeError(
            "EPIC needs a teacher with decoder layers of its own; got the student's.\n"
            'Hint: Pass teacher="self", with share_prefix=False for a forward pass of its own.'
        )


def refuse_other_tokens(student: Call, teacher: Seam, inputs: Mapping[str, Any], *, known: bool) -> None:
    """Raise unless the teacher takes the same positions of a batch for visual tokens.

    Args:
        student: the batch as the student reads it. teacher: what there is to know about the teacher.
        inputs: the batch. known: whether both take the same token ids for visual ones.

    Raises:
        ShapeError: it takes others.
    """
    if known:
        return  # without a look at the batch, which waits for an accelerator
    theirs = teacher.read(inputs, (), {}).visual
    if student.visual is None or theirs is None or not torch.equal(student.visual, theirs.to(student.visual.device)):
        raise ShapeError(
            "EPIC needs a teacher with the student's visual tokens; got one that takes other positions for visual.\n"
            "Hint: The student's choice is handed to the teacher, so both need the same token ids and placeholders."
        )


def autocast_of(model: nn.Module) -> AbstractContextManager[Any]:
    """The autocast state that holds now on the device of `model`, to be entered again within another one.

    Example:
        >>> outside = autocast_of(nn.Linear(2, 2))
        >>> with torch.autocast("cpu", torch.bfloat16), outside:
        ...     torch.is_autocast_enabled("cpu")
        False
    """
    first = next(model.parameters(), None)
    if first is None or not torch.amp.is_autocast_available(first.device.type):
        return nullcontext()
    kind = first.device.type
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))


def without_dropout(module: nn.Module | None, head: Head) -> Head:
    """The computation of `module`, a head, in evaluation mode.

    Args:
        module: the head; None has no mode. head: its computation.
    """
    if module is None or not module.training:
        return head

    def quiet(hidden: Tensor) -> Tensor:
        with evaluating(module):
            return head(hidden)

    return quiet
