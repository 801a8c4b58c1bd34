"""Compressing the visual tokens of a transformers model for as long as a context is open."""

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import Bool, Int
from torch import Tensor, nn

from tokencurric.adapters.attachment import Attachment
from tokencurric.adapters.discovery import ModelParts, find_parts
from tokencurric.adapters.generation import watched
from tokencurric.adapters.record import TAPPED, Amount, Count, Ratio, Request
from tokencurric.budget import Budget, check_budget, keep_count
from tokencurric.compressors import Compressor
from tokencurric.errors import MissingSignalError, RangeError
from tokencurric.view import remedy


@contextmanager
def compress(
    model: nn.Module,
    compressor: Compressor,
    *,
    keep: Budget | None = None,
    ratio: float | int | None = None,
    layer: int = 2,
    query: Int[Tensor, " batch"] | None = None,
    visual_mask: Bool[Tensor, "batch seq"] | None = None,
    row_key: Int[Tensor, " batch"] | None = None,
    seed: int = 0,
) -> Iterator[nn.Module]:
    """Run decoder layers from `layer` on without the visual tokens that `compressor` drops.

    Inside the context the model's forward and `generate` work as before, with a key-value cache that is really
    smaller. Logits of a dropped position are those of the nearest kept position before it. Where nothing is dropped
    nothing runs: the result is bit-identical. Backward of a forward belongs inside the context. Leaving it, also by an
    exception, restores the model exactly.

    Args:
        model: a multimodal transformers model, also wrapped by DDP, PEFT or torch.compile.
        compressor: decides which tokens stay, from the input of `layer` and attention and keys of the layer before.
        keep: visual tokens that stay, all pictures of a row together: one count, or one a row. ratio: the fraction
            removed, instead of keep.
        layer: first decoder layer that runs short; the model's depth means none does.
        query: position whose attention is read, a row; None means the end of the prompt.
        visual_mask: which positions are visual, for calls with `inputs_embeds` only.
        row_key: numbers of the samples, for compressors that draw; None takes a hash of each row's tokens.
        seed: of the compressor.

    Yields:
        The model.

    Raises:
        UnsupportedModelError: the model is not built so that tokens can be dropped.
        RangeError: not exactly one of keep and ratio is given, or a number is out of range.
        MissingSignalError: the compressor needs signals that `layer` does not have.
        StateError: another compression is open on the model.

    Example:
        >>> from tokencurric import FastV, compress
        >>> with compress(model, FastV(), keep=128, layer=2):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    parts = find_parts(model)
    amount = _amount(keep, ratio)
    check_layer(compressor, layer, parts)
    attachment = Attachment(parts)
    if layer < parts.depth:
        attachment.request = Request(compressor, amount, layer, seed, visual=visual_mask, query=query, row_key=row_key)
    try:
        with watched(attachment):
            yield model
    finally:
        attachment.remove()


def _amount(keep: Budget | None, ratio: float | int | None) -> Amount:
    if (keep is None) == (ratio is None):
        raise RangeError(
            f"compress needs either keep or ratio; got keep={keep}, ratio={ratio}. keep is the number of visual tokens "
            "that stay, ratio the fraction removed. Give one of them."
        )
    if ratio is not None:
        keep_count(0, ratio)  # refuses what is no ratio, now and not at the first batch
        return Ratio(ratio)
    count: Budget = keep if keep is not None else 0
    check_budget(count, count.shape[0] if isinstance(count, Tensor) and count.ndim == 1 else 1)
    return Count(count)


def check_layer(compressor: Compressor, layer: int, parts: ModelParts) -> None:
    """Raise unless `layer` exists and has the signals that `compressor` needs.

    Raises:
        RangeError: no such layer. MissingSignalError: the signal, and what to do.
    """
    if type(layer) is not int or not 0 <= layer <= parts.depth:
        raise RangeError(
            f"compress needs 0 <= layer <= {parts.depth}, the depth of the decoder; got layer={layer!r}. It is the "
            f"first layer that runs on the short sequence; {parts.depth} compresses nothing."
        )
    name = type(compressor).__name__
    outside = sorted(compressor.needs & {"cls_attention", "grid"})
    if outside:
        raise MissingSignalError(
            f"{name} needs the signal {outside[0]!r}; a decoder layer does not have it. {remedy('cls_attention')}"
        )
    missing = sorted(compressor.needs & TAPPED)
    if layer == 0 and missing:
        raise MissingSignalError(
            f"{name} needs the signal {missing[0]!r}; got layer=0, which has no layer before it. {remedy('keys')}"
        )
