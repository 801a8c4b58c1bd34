"""The laws of a divergence, alone and inside ConsistencyLoss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokencurric.losses import ConsistencyLoss, Divergence
from tokencurric.testing.check import Broken, Check
from tokencurric.testing.strategies.logits import LogitKind, LogitsCase, logits

Body = Callable[[Divergence, LogitsCase], None]
TOLERANCE = 1e-5


def _itself(subject: Any) -> Any:
    return subject


def _always(_: Any) -> bool:
    return True


def divergence_law(law: str, *kinds: LogitKind) -> Callable[[Body], Check]:
    """Make a check of a function (divergence, case) that raises `Broken`, on all kinds of logits or on some."""
    strategy = logits(kinds=kinds) if kinds else logits()

    def made(body: Body) -> Check:
        name: str = body.__name__
        return Check(name=name, law=law, cases=lambda _: strategy, body=body, applies=_always, prepare=_itself)

    return made


def _far(a: Tensor, b: Tensor, case: LogitsCase) -> bool:
    slack = TOLERANCE * max(1.0, case.temperature**2)
    return not torch.allclose(a.double(), b.double(), rtol=1e-4, atol=slack)


@divergence_law("One finite number >= 0 a position, in float32.")
def is_a_number_a_position(divergence: Divergence, case: LogitsCase) -> None:
    """For masked words (logits of −inf) and logits in the thousands too, and never below zero by rounding."""
    student, teacher = case.tensors()
    each = divergence(student, teacher, temperature=case.temperature)
    if each.shape != student.shape[:-1] or each.dtype != torch.float32:
        raise Broken(f"For logits {tuple(student.shape)} it is {each.dtype} {tuple(each.shape)}.")
    if not bool((each.isfinite() & (each >= 0)).all()):
        raise Broken(f"It is {each.tolist()}.")


@divergence_law("It is 0 where student and teacher agree, also if their logits differ by a constant.")
def vanishes_at_equality(divergence: Divergence, case: LogitsCase) -> None:
    """The softmax decides, not the logits."""
    student, _ = case.tensors()
    for shift in (0.0, 1.0):
        each = divergence(student, student + shift, temperature=case.temperature)
        if _far(each, torch.zeros_like(each), case):
            raise Broken(f"With the teacher's logits equal to the student's plus {shift}, it is {each.tolist()}.")


@divergence_law("It is above 0 where they differ.", "normal", "masked")
def notices_a_difference(divergence: Divergence, case: LogitsCase) -> None:
    """By 1 nat in the logit of the first word."""
    student, _ = case.tensors()
    if int(student[0].isfinite().sum()) < 2:
        return
    teacher = student.clone()
    teacher[:, 0] += 1.0
    each = divergence(student, teacher, temperature=case.temperature)
    if not bool((each > 1e-7).all()):
        raise Broken(f"With the teacher's first logit 1 above the student's, it is {each.tolist()}.")


@divergence_law("The teacher gets no gradient, and the student gets a finite one that leads downhill.")
def teaches_the_student_only(divergence: Divergence, case: LogitsCase) -> None:
    """A small step against the gradient lowers the divergence."""
    student, teacher = (x.double().requires_grad_() for x in case.tensors())
    each = divergence(student, teacher, temperature=case.temperature)
    each.sum().backward()
    total = float(each.detach().sum())
    if teacher.grad is not None:
        raise Broken(f"The teacher's gradient is {teacher.grad.tolist()}.")
    slope = student.grad
    if slope is None or not bool(slope.isfinite().all()):
        raise Broken(f"The student's gradient is {None if slope is None else slope.tolist()}.")
    square = float(slope.square().sum())
    if square < 1e-6:
        return
    step = min(1e-3, 1e-3 / square**0.5)
    with torch.no_grad():
        lower = divergence(student - step * slope, teacher, temperature=case.temperature).sum()
    if not float(lower) < total - 0.5 * step * square:
        raise Broken(f"Downhill by {step:.2g} of the gradient it goes from {total!r} to {float(lower)!r}.")


@divergence_law("Temperature τ means τ² times the divergence of logits divided by τ.")
def scales_with_temperature(divergence: Divergence, case: LogitsCase) -> None:
    """So that gradients keep their size."""
    student, teacher = case.tensors()
    for tau in (0.5, 2.0, 3.0):
        here = divergence(student, teacher, temperature=tau)
        there = tau**2 * divergence(student / tau, teacher / tau, temperature=1.0)
        if _far(here, there, case):
            raise Broken(f"At τ={tau} it is {here.tolist()}; τ² times that of the divided logits is {there.tolist()}.")


@divergence_law("It agrees with its own value in float64, and computes half precision in float32.")
def is_precise(divergence: Divergence, case: LogitsCase) -> None:
    """Logits that bfloat16 holds exactly, in three dtypes."""
    exact = divergence(*(x.bfloat16().double() for x in case.tensors()), temperature=case.temperature)
    for dtype in (torch.float32, torch.bfloat16):
        each = divergence(*(x.bfloat16().to(dtype) for x in case.tensors()), temperature=case.temperature)
        if _far(each, exact, case):
            raise Broken(f"In {dtype} it is {each.tolist()}; in float64, {exact.tolist()}.")


@divergence_law("Each position counts by itself.")
def looks_at_one_position(divergence: Divergence, case: LogitsCase) -> None:
    """All positions together against one at a time, and leading axes against none."""
    student, teacher = case.tensors()
    together = divergence(student, teacher, temperature=case.temperature)
    alone = torch.stack([divergence(s, t, temperature=case.temperature) for s, t in zip(student, teacher, strict=True)])
    if _far(together, alone, case):
        raise Broken(f"Together the positions give {together.tolist()}; one at a time, {alone.tolist()}.")


@divergence_law("In ConsistencyLoss, what stands at uncounted positions changes neither value nor gradient.")
def is_blind_outside_the_mask(divergence: Divergence, case: LogitsCase) -> None:
    """NaN at the uncounted positions against leaving them out; sums and counts agree with the mean."""
    loss = ConsistencyLoss(case.temperature, divergence=divergence)
    student, teacher = case.tensors()
    bad = torch.full_like(student, float("nan"))
    mask = torch.arange(2 * case.positions) < case.positions
    wide = torch.cat((student, bad)).requires_grad_()
    value = loss(wide, torch.cat((teacher, bad)), mask)
    value.backward()
    few = student.clone().requires_grad_()
    expected = loss(few, teacher)
    expected.backward()
    if _far(value.detach(), expected.detach(), case):
        raise Broken(
            f"Masked it is {float(value.detach())!r}; over the counted positions alone, {float(expected.detach())!r}."
        )
    if wide.grad is None or few.grad is None or _far(wide.grad, torch.cat((few.grad, torch.zeros_like(few))), case):
        raise Broken(f"The gradient is {None if wide.grad is None else wide.grad.tolist()}.")
    total, count = loss.sum(wide.detach(), torch.cat((teacher, bad)), mask)
    if int(count) != case.positions or _far(total / case.positions, value.detach(), case):
        raise Broken(f"The sum is {float(total)!r} over {int(count)}, the mean {float(value.detach())!r}.")


@divergence_law("In ConsistencyLoss, no counted position gives 0 with a finite gradient of 0.")
def survives_an_empty_mask(divergence: Divergence, case: LogitsCase) -> None:
    """A micro-batch without a supervised token must not stop a training."""
    student, teacher = case.tensors()
    live = student.requires_grad_()
    value = ConsistencyLoss(case.temperature, divergence=divergence)(
        live, teacher, torch.zeros(case.positions, dtype=torch.bool)
    )
    if float(value.detach()) != 0.0 or not value.requires_grad:
        raise Broken(f"It is {value!r}.")
    value.backward()
    if live.grad is None or bool(live.grad.any()):
        raise Broken(f"The gradient is {None if live.grad is None else live.grad.tolist()}.")
