"""Divergences between two categorical distributions given by logits: pure functions, one number a position."""

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tokencurric.errors import RangeError, ShapeError


@runtime_checkable
class Divergence(Protocol):
    """D(teacher, student) >= 0 in nats, a number for each position; 0 where the two agree."""

    def __call__(
        self,
        student: Float[Tensor, "*batch vocab"],
        teacher: Float[Tensor, "*batch vocab"],
        *,
        temperature: float | int,
    ) -> Float[Tensor, "*batch"]:
        """The divergence at each position."""
        ...


def forward_kl(
    student: Float[Tensor, "*batch vocab"], teacher: Float[Tensor, "*batch vocab"], *, temperature: float | int = 1.0
) -> Float[Tensor, "*batch"]:
    """Kullback-Leibler divergence from teacher to student, a position.

    D = τ²·Σ_v p_v (log p_v − log q_v),  p = softmax(teacher/τ), q = softmax(student/τ)

    Args:
        student: logits that receive gradient. teacher: constants, detached here. temperature: τ > 0.

    Returns:
        Nats, in float32 (float64 for float64 logits), >= 0.

    Raises:
        RangeError: τ is not positive and finite. ShapeError: the logits differ in shape.

    Example:
        >>> forward_kl(torch.zeros(2, 5), torch.zeros(2, 5)).tolist()
        [0.0, 0.0]

    Source: Hinton et al. 2015 (arXiv:1503.02531) §2; EPIC (arXiv:2510.00515) §3. Differs: EPIC has no factor τ².
    """
    q, p = _log_probabilities(student, teacher, temperature)
    return _floor(temperature**2 * _kl(p, q))


def reverse_kl(
    student: Float[Tensor, "*batch vocab"], teacher: Float[Tensor, "*batch vocab"], *, temperature: float | int = 1.0
) -> Float[Tensor, "*batch"]:
    """Kullback-Leibler divergence from student to teacher, a position: τ²·Σ_v q_v (log q_v − log p_v).

    Args, Returns, Raises: as `forward_kl`.

    Example:
        >>> reverse_kl(torch.zeros(2, 5), torch.zeros(2, 5)).tolist()
        [0.0, 0.0]

    Source: Gu et al. 2023, MiniLLM (arXiv:2306.08543) §2.
    """
    q, p = _log_probabilities(student, teacher, temperature)
    return _floor(temperature**2 * _kl(q, p))


def jensen_shannon(
    student: Float[Tensor, "*batch vocab"], teacher: Float[Tensor, "*batch vocab"], *, temperature: float | int = 1.0
) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence, a position: τ²·(KL(p‖m) + KL(q‖m))/2 with m = (p + q)/2; at most τ²·log 2.

    Args, Returns, Raises: as `forward_kl`.

    Example:
        >>> jensen_shannon(torch.zeros(2, 5), torch.zeros(2, 5)).tolist()
        [0.0, 0.0]

    Source: Lin 1991, "Divergence measures based on the Shannon entropy".
    """
    q, p = _log_probabilities(student, teacher, temperature)
    # Between two logits of −inf there is no slope; the least finite number has the same exponential, and slope 0.
    both = torch.stack((p, q)).clamp(min=torch.finfo(p.dtype).min)
    m = torch.logsumexp(both, dim=0) - math.log(2)
    return _floor(temperature**2 * (_kl(p, m) + _kl(q, m)) / 2)


def _log_probabilities(student: Tensor, teacher: Tensor, temperature: float | int) -> tuple[Tensor, Tensor]:
    if not 0.0 < temperature < float("inf"):
        raise RangeError(
            f"A divergence needs a temperature > 0; got temperature={temperature}. Logits are divided by it. "
            "1.0 leaves them as they are."
        )
    if student.shape != teacher.shape:
        raise ShapeError(
            f"A divergence needs student and teacher logits of one shape; got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}. They are compared position by position. Gather the same positions of both."
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    return (
        (student.to(dtype) / temperature).log_softmax(-1),
        (teacher.detach().to(dtype) / temperature).log_softmax(-1),
    )


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (log p − log q); an entry of probability 0 adds nothing to value or gradient, also where both are −inf."""
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)


def _floor(divergence: Tensor) -> Tensor:
    """0 where rounding made the sum negative, with the gradient untouched."""
    return torch.where(divergence < 0, divergence - divergence.detach(), divergence)
