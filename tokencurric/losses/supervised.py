"""From hidden states at counted positions to losses, without ever holding all logits."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tokencurric.errors import RangeError, ShapeError
from tokencurric.losses.consistency import ConsistencyLoss
from tokencurric.losses.fused import fits, fused_cross_entropy
from tokencurric.losses.head import Head

_LOGITS_A_CHUNK = 2**23  # 32 MiB in float32: large enough for full speed, small beside a model


@dataclass(frozen=True)
class LossSums:
    """Sums over positions, not means, so that chunks, micro-batches and ranks add up.

    Args:
        sft: cross-entropy, nats. consistency: divergence, nats.
        sft_count, consistency_count: numbers of positions behind them.
    """

    sft: Float[Tensor, ""]
    consistency: Float[Tensor, ""]
    sft_count: int
    consistency_count: Int[Tensor, ""]


@dataclass(frozen=True)
class Taught:
    """What the teacher says at the student's counted positions.

    Args:
        hidden: the teacher's hidden states. head: its output projection.
        counts: positions at which the two are compared; None means all.
    """

    hidden: Float[Tensor, "position dim"]
    head: Head
    counts: Bool[Tensor, " position"] | None = None


def supervised_losses(
    hidden: Float[Tensor, "position dim"],
    targets: Int[Tensor, " position"],
    head: Head,
    *,
    taught: Taught | None = None,
    loss: ConsistencyLoss | None = None,
    chunk: int | None = None,
    fused: bool | None = None,
) -> LossSums:
    """Cross-entropy and consistency at the positions that predict a supervised token.

    Logits are made a chunk of positions at a time and again in the backward pass, so memory grows with the chunk
    and not with positions × vocabulary. Without a teacher a fused kernel can do it, see `fused_cross_entropy`; with one
    there is none that fits: cross-entropy and divergence, each fused by itself, would make the student's logits twice.

    Args:
        hidden: the student's hidden states, after the final norm. targets: the tokens to predict.
        head: hidden states to logits. taught: the teacher's side; None leaves consistency at 0.
        loss: how the two are compared; needed with `taught`.
        chunk: positions a chunk; None chooses about 8 million logits.
        fused: whether to use the fused kernel; None does where it fits: on a GPU, with liger-kernel installed, for a
            plain linear head and no teacher, unless `chunk` is given.

    Returns:
        Sums; with no position, 0 with a live gradient.

    Raises:
        ShapeError: the tensors differ in their number of positions.
        RangeError: `chunk` is below 1, or `fused=True` comes with a teacher.
        MissingDependencyError, UnsupportedModelError: of `fused_cross_entropy`, with `fused=True`.

    Example:
        >>> hidden = torch.randn(5, 8, requires_grad=True)
        >>> sums = supervised_losses(hidden, torch.arange(5), torch.nn.Linear(8, 11))
        >>> sums.sft_count, int(sums.consistency_count)
        (5, 0)
    """
    positions = targets.shape[0]
    _check(positions, hidden, taught, loss, chunk)
    if fused and taught is not None:
        raise RangeError(
            "supervised_losses needs fused=None or False with taught=...; got fused=True. No fused kernel makes both "
            "losses of one set of logits. Leave `fused` out to have it used where it fits."
        )
    if positions == 0:
        # Through the head all the same: in distributed training every rank has to have a gradient for every weight.
        nothing = head(hidden).float().sum()
        return LossSums(nothing, nothing.detach(), 0, torch.zeros((), dtype=torch.int64))
    if fused or (fused is None and taught is None and chunk is None and fits(hidden, head)):
        sft_alone = fused_cross_entropy(hidden, targets, head)
        return LossSums(sft_alone, sft_alone.new_zeros(()), positions, torch.tensor(0))
    size = chunk or _chunk_for(head, hidden)

    def losses(rows: Tensor, goal: Tensor, taught_rows: Tensor | None, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = head(rows)
        sft = functional.cross_entropy(logits.to(_at_least_float32(logits)), goal, reduction="sum")
        if taught is None or loss is None or taught_rows is None:
            return sft, sft.new_zeros(())
        if counts is not None:  # or NaN where nothing is compared would still reach the student's gradient
            taught_rows = taught_rows.masked_fill(~counts[:, None], 0.0)
        with torch.no_grad():
            teacher_logits = taught.head(taught_rows)
        each = loss.each(logits, teacher_logits)
        return sft, (each if counts is None else torch.where(counts, each, 0.0)).sum()

    sft, consistency = [], []
    single = positions <= size
    for start in range(0, positions, size):
        rows = slice(start, start + size)
        arguments = (
            hidden[rows],
            targets[rows],
            None if taught is None else taught.hidden[rows].detach(),
            None if taught is None or taught.counts is None else taught.counts[rows],
        )
        if single or not torch.is_grad_enabled():  # nothing to save by computing it twice
            pair = losses(*arguments)
        else:
            pair = checkpoint(losses, *arguments, use_reentrant=False, preserve_rng_state=_draws(head))
        sft.append(pair[0])
        consistency.append(pair[1])
    compared = torch.tensor(0 if taught is None else positions)
    if taught is not None and taught.counts is not None:
        compared = taught.counts.sum()
    return LossSums(torch.stack(sft).sum(), torch.stack(consistency).sum(), positions, compared)


def _chunk_for(head: Head, hidden: Tensor) -> int:
    """Positions a chunk. A head need not be a plain layer, so the vocabulary may have to be read off one position."""
    vocabulary = getattr(getattr(head, "__self__", head), "out_features", None)
    if not isinstance(vocabulary, int):
        with torch.no_grad():
            vocabulary = head(hidden[:1]).shape[-1]
    return max(1, _LOGITS_A_CHUNK // vocabulary)


def _draws(head: Head) -> bool:
    """Whether a second run has to draw what the first one drew."""
    module = getattr(head, "__self__", head)
    modules = module.modules() if isinstance(module, nn.Module) else ()
    return any(isinstance(each, nn.Dropout) and each.training and each.p > 0 for each in modules)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check(
    positions: int, hidden: Tensor, taught: Taught | None, loss: ConsistencyLoss | None, chunk: int | None
) -> None:
    if hidden.shape[0] != positions or (taught is not None and taught.hidden.shape[0] != positions):
        raise ShapeError(
            f"supervised_losses needs one hidden state a target; got {positions} targets, "
            f"{hidden.shape[0]} hidden states and {'no' if taught is None else taught.hidden.shape[0]} taught ones. "
            "Gather hidden states at the positions before the supervised tokens."
        )
    if taught is not None and loss is None:
        raise RangeError(
            "supervised_losses needs loss=... with taught=...; got taught alone. How the two are compared is not said. "
            "Pass a ConsistencyLoss."
        )
    if chunk is not None and chunk < 1:
        raise RangeError(
            f"supervised_losses needs chunk >= 1; got chunk={chunk}. It is a number of positions. Leave it out to "
            "have it chosen."
        )
