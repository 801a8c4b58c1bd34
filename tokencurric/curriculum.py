"""Schedules for the ratio range, the teacher's margin and the layer, and what they say at a step."""

import math
from dataclasses import dataclass
from typing import Literal

from tokencurric.draws import hash_ints, uniform
from tokencurric.errors import RangeError
from tokencurric.schedules import Clipped, Constant, Linear, Schedule

_RATIO, _SELECTION = 1, 2  # separate the draws that are made from one (seed, step)


@dataclass(frozen=True)
class Stage:
    """What one optimizer step does.

    Args:
        layer: first decoder layer that runs on the short sequence; `layers` means none does.
        layers: depth of the decoder.
        student, teacher: fractions of visual tokens removed for each.
        margin: Δ, the most by which the teacher's ratio is smaller.
        progress: β. seed: for the compressor; teacher and student get the same.

    Example:
        >>> Stage(layer=2, layers=32, student=0.5, teacher=0.3, margin=0.2, progress=0.5, seed=0).compresses
        True
    """

    layer: int
    layers: int
    student: float | int
    teacher: float | int
    margin: float | int
    progress: float | int
    seed: int

    @property
    def compresses(self) -> bool:
        """Whether the student loses tokens at all; if not, the step is plain fine-tuning."""
        return self.layer < self.layers and self.student > 0

    @property
    def distils(self) -> bool:
        """Whether the teacher differs from the student, so that there is something to distil."""
        return self.compresses and self.teacher < self.student


@dataclass(frozen=True)
class DeepToShallow:
    """A layer that moves from the top of the decoder, whatever its depth, to `last`.

    value = layers + (last − layers)·path(β), so that at path 0 nothing is compressed.

    Args:
        last: the layer at path 1. path: from 0 to 1.

    Example:
        >>> DeepToShallow(last=2).value(0.5, layers=32)
        17.0

    Source: EPIC (arXiv:2510.00515) §3, layer consistency distillation.
    """

    last: int = 2
    path: Schedule = Linear(0.0, 1.0)

    def value(self, progress: float | int, *, layers: int) -> float | int:
        """The layer, before rounding."""
        return layers + (self.last - layers) * self.path(progress)


@dataclass(frozen=True)
class Curriculum:
    """How hard the compression is at each step of training.

    The student's ratio is drawn uniformly between `low` and `high`, once an optimizer step, from (seed, step) alone:
    the same on every rank and after a resume. The teacher's is max(0, student − margin).

    Args:
        low, high: bounds of the student's ratio, the fraction of visual tokens removed.
        margin: Δ >= 0 between student and teacher.
        layer: first decoder layer that runs short; rounded half up.

    Example:
        >>> stage = tcd().at(2500, 5000, seed=0, layers=32)
        >>> stage.layer, 0.025 <= stage.student <= 0.7, round(stage.margin, 6)
        (2, True, 0.15)

    Source: EPIC (arXiv:2510.00515) §3.
    """

    low: Schedule
    high: Schedule
    margin: Schedule
    layer: Schedule | DeepToShallow = Constant(2)

    def at(self, step: int, total: int, seed: int = 0, *, layers: int) -> Stage:
        """The stage of one optimizer step: a pure function of its arguments.

        Args:
            step: optimizer steps done, 0 <= step < total. total: of the training. seed: of the training.
            layers: depth of the decoder.

        Raises:
            RangeError: step, layers, or a scheduled value has no meaning.
        """
        if not 0 <= step < total:
            raise RangeError(
                f"Curriculum.at needs 0 <= step < total; got step={step}, total={total}. It counts the optimizer "
                "steps done before this one. Pass the length of the whole training as total."
            )
        progress = step / total
        low, high, margin = self.low(progress), self.high(progress), self.margin(progress)
        if not 0.0 <= low <= high <= 1.0:
            raise RangeError(
                f"Curriculum needs 0 <= low <= high <= 1; got low={low}, high={high} at progress {progress:.4f}. "
                "They bound the fraction of visual tokens removed. Mend the schedules, or clip them."
            )
        if not margin >= 0.0:
            raise RangeError(
                f"Curriculum needs margin >= 0; got margin={margin} at progress {progress:.4f}. "
                "The teacher sees at least the student's tokens. Clip the schedule at 0."
            )
        student = low + (high - low) * uniform(seed, step, _RATIO)
        return Stage(
            layer=self._layer_at(progress, layers),
            layers=layers,
            student=student,
            teacher=max(0.0, student - margin),
            margin=margin,
            progress=progress,
            seed=hash_ints(seed, step, _SELECTION),
        )

    def _layer_at(self, progress: float, layers: int) -> int:
        scheduled = self.layer
        if isinstance(scheduled, DeepToShallow):
            value = scheduled.value(progress, layers=layers)
        else:
            value = scheduled(progress)
        layer = math.floor(value + 0.5)
        if not 0 <= layer <= layers:
            raise RangeError(
                f"Curriculum needs 0 <= layer <= {layers}, the depth of the decoder; got layer={layer} at progress "
                f"{progress:.4f}. It is the first layer that runs on the short sequence. Mend the layer schedule."
            )
        return layer


def constant(ratio: float | int, *, layer: int = 2, margin: float | int = 0.0) -> Curriculum:
    """No curriculum: one ratio and one layer throughout, the baseline to hold the presets against.

    Args:
        ratio: fraction removed. layer: first that runs short. margin: Δ; 0 means there is no teacher, and then
            `EPIC(weight=0)` gives the whole loss to cross-entropy.

    Example:
        >>> constant(8 / 9).at(0, 10, layers=6).student == 8 / 9
        True
    """
    return Curriculum(low=Constant(ratio), high=Constant(ratio), margin=Constant(margin), layer=Constant(layer))


def tcd(variant: Literal["paper", "code"] = "paper", *, layer: int = 2) -> Curriculum:
    """Token consistency distillation: ratio and margin grow, the layer stays.

    Args:
        variant: "paper", or "code" for the values of the authors' published script.
        layer: first decoder layer that runs short; 2 in the paper.

    Raises:
        RangeError: another variant.

    Example:
        >>> tcd().high
        Linear(start=0.05, end=0.9)

    Source: EPIC (arXiv:2510.00515) §3.2; the margin's start of 0 is ours, the paper names none.
    """
    if variant == "paper":
        return Curriculum(low=Linear(0.0, 0.5), high=Linear(0.05, 0.9), margin=Linear(0.0, 0.3), layer=Constant(layer))
    if variant == "code":
        return Curriculum(
            low=Linear(0.1, 0.26),
            high=Linear(0.1, 0.74),
            margin=Clipped(Linear(0.1, 0.6), high=0.3),
            layer=Constant(layer),
        )
    raise RangeError(
        f"tcd needs variant 'paper' or 'code'; got variant={variant!r}. They are the paper's numbers and the "
        "published script's. For your own, make a Curriculum."
    )


def lcd(*, last: int = 2) -> Curriculum:
    """Layer consistency distillation: the compressing layer moves from the top of the decoder down to `last`.

    Example:
        >>> [lcd().at(step, 4, layers=32).layer for step in range(4)]
        [32, 25, 17, 10]

    Source: EPIC (arXiv:2510.00515) §3.3; `last` = 2 and the margin's start are ours.
    """
    return Curriculum(low=Constant(0.2), high=Constant(0.9), margin=Linear(0.0, 0.3), layer=DeepToShallow(last))


def icd(*, last: int = 2) -> Curriculum:
    """Integrated consistency distillation: `tcd`'s ratios and margin with `lcd`'s layers.

    Example:
        >>> icd().low == tcd().low and icd().layer == lcd().layer
        True

    Source: EPIC (arXiv:2510.00515), appendix.
    """
    ramp = tcd()
    return Curriculum(low=ramp.low, high=ramp.high, margin=ramp.margin, layer=DeepToShallow(last))
