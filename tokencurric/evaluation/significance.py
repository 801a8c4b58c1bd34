"""How sure an accuracy is, and a difference between two on the same questions."""

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from tokencurric.errors import RangeError, ShapeError


@dataclass(frozen=True)
class Difference:
    """A difference of two accuracies and its standard error.

    Example:
        >>> Difference(0.1, 0.02).significant()
        True
    """

    mean: float
    error: float

    def significant(self, errors: float | int = 2) -> bool:
        """Whether the difference is larger than so many standard errors, in either direction."""
        return abs(self.mean) > errors * self.error


def binomial_error(correct: Bool[Tensor, " question"]) -> float:
    """Standard error of the share of right answers: √(p(1 − p)/n).

    Args:
        correct: which questions were answered right; they are taken to be independent of each other.

    Raises:
        ShapeError: there is no question.

    Example:
        >>> import torch
        >>> binomial_error(torch.tensor([True, False, True, False]))
        0.25
    """
    _check_questions("binomial_error", correct)
    share = correct.double().mean().item()
    return float((share * (1 - share) / correct.numel()) ** 0.5)


def paired_difference(after: Bool[Tensor, " question"], before: Bool[Tensor, " question"]) -> Difference:
    """Mean of after − before over the same questions, with the standard error of paired observations.

    d_i = after_i − before_i ∈ {−1, 0, 1};  error = √(Σ(d_i − d̄)²/(n(n − 1))). Questions that both get right, or both
    wrong, add nothing to it, so it is far below the error of two independent samples where the two mostly agree.

    Args:
        after, before: right answers to the same questions in the same order.

    Returns:
        Their difference; the error of a single question is infinite.

    Raises:
        ShapeError: there is no question, or the numbers of questions differ.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([True, True, True, False]), torch.tensor([True, False, True, False])
        >>> paired_difference(a, b)
        Difference(mean=0.25, error=0.25)
    """
    _check_questions("paired_difference", after)
    if after.shape != before.shape:
        raise ShapeError(
            f"paired_difference needs answers to the same questions; got {tuple(after.shape)} and "
            f"{tuple(before.shape)}. Question i is compared with question i. Pass both in the order of the questions."
        )
    each = after.double() - before.double()
    if each.numel() == 1:
        return Difference(each.item(), float("inf"))
    return Difference(each.mean().item(), each.std(unbiased=True).item() / each.numel() ** 0.5)


def recovered_share(full: float, before: float, after: float) -> float | None:
    """The part of what compression cost that training won back: (after − before)/(full − before).

    Args:
        full: accuracy of the untrained model with all tokens. before: of the same, compressed. after: of the trained
            one, equally compressed.

    Returns:
        1 for all of it; above 1 where training did more than repair; None where compression cost nothing.

    Raises:
        RangeError: an accuracy is outside [0, 1].

    Example:
        >>> recovered_share(1.0, 0.5, 0.75), recovered_share(0.9, 0.9, 0.9)
        (0.5, None)
    """
    for name, value in (("full", full), ("before", before), ("after", after)):
        if not 0.0 <= value <= 1.0:
            raise RangeError(
                f"recovered_share needs accuracies in [0, 1]; got {name}={value}. They are shares of right answers. "
                "Divide percentages by 100."
            )
    return (after - before) / (full - before) if full > before else None


def _check_questions(who: str, correct: Tensor) -> None:
    if correct.ndim != 1 or correct.numel() == 0:
        raise ShapeError(
            f"{who} needs one truth value a question; got shape {tuple(correct.shape)}. An accuracy without questions "
            "means nothing. Pass a vector with at least one entry."
        )
