"""The loss that keeps a compressed student consistent with its less compressed teacher."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokencurric.errors import RangeError, ShapeError
from tokencurric.losses.divergences import Divergence, forward_kl


class ConsistencyLoss(nn.Module):
    """Divergence between student and teacher at the positions that count.

    ``L = 1/|M| · Σ_{i∈M} D(teacher_i, student_i)``, where M are the positions that *predict* a supervised token: the
    position before it, so that the first answer token counts and what follows the last does not.

    Args:
        temperature: τ > 0. divergence: `forward_kl` (default), `reverse_kl`, `jensen_shannon`, or your own.

    Raises:
        RangeError: τ is not positive and finite.

    Example:
        >>> loss = ConsistencyLoss(temperature=2.0)
        >>> student, teacher = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 7)
        >>> bool(loss(student, teacher) > 0), float(loss(teacher, teacher))
        (True, 0.0)

    Source: EPIC (arXiv:2510.00515) §3. Differs: masks predicting positions (published code masks unshifted ones),
    and the factor τ² of Hinton et al. 2015 keeps gradients of one size when τ is not 1.
    """

    def __init__(self, temperature: float | int = 1.0, *, divergence: Divergence = forward_kl) -> None:
        super().__init__()
        if not 0.0 < temperature < float("inf"):
            raise RangeError(
                f"ConsistencyLoss needs a temperature > 0; got temperature={temperature}. Logits are divided by it. "
                "The paper's value is 1.0."
            )
        self.temperature = temperature
        self.divergence = divergence

    def forward(
        self,
        student: Float[Tensor, "*batch vocab"],
        teacher: Float[Tensor, "*batch vocab"],
        mask: Bool[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean over the counted positions.

        Args:
            student: logits that receive gradient. teacher: constants. mask: positions that count; None means all,
                and none gives 0 with a live gradient.

        Returns:
            Nats a counted position.

        Raises:
            ShapeError: shapes differ.
        """
        total, count = self.sum(student, teacher, mask)
        return total / count.clamp(min=1)

    def sum(
        self,
        student: Float[Tensor, "*batch vocab"],
        teacher: Float[Tensor, "*batch vocab"],
        mask: Bool[Tensor, "*batch"] | None = None,
    ) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Sum over the counted positions, and their number: the form that can be chunked and accumulated.

        Args, Raises: as `forward`.
        """
        if mask is None:
            mask = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
        elif mask.shape != student.shape[:-1]:
            raise ShapeError(
                f"ConsistencyLoss needs a mask of shape {tuple(student.shape[:-1])}; got {tuple(mask.shape)}. "
                "It has one entry a position. Drop the vocabulary axis."
            )
        if student.shape != teacher.shape:
            raise ShapeError(
                f"ConsistencyLoss needs student and teacher logits of one shape; got {tuple(student.shape)} and "
                f"{tuple(teacher.shape)}. They are compared position by position. Gather the same positions of both."
            )
        # Selecting first keeps what stands at uncounted positions, NaN included, out of value and gradient.
        each = self.each(student[mask], teacher[mask])
        # An empty selection still hangs on the student's graph, so backward works.
        return each.sum(), mask.sum()

    def each(
        self, student: Float[Tensor, "*batch vocab"], teacher: Float[Tensor, "*batch vocab"]
    ) -> Float[Tensor, "*batch"]:
        """The divergence at each position; the teacher is detached. Every other method goes through this one."""
        return self.divergence(student, teacher.detach(), temperature=self.temperature)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        name = getattr(self.divergence, "__name__", repr(self.divergence))
        return f"temperature={self.temperature}, divergence={name}"
