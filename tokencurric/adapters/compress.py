"""Compressing the visual tokens of a transformers model for as long as a context is open."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from jaxtyping import Bool, Int
from torch import Tensor, nn

from tokencurric.adapters.adapter import ModelAdapter
from tokencurric.adapters.attachment import Attachment
from tokencurric.adapters.compiled import refuse_compiled_twice, seen_anew
from tokencurric.adapters.discovery import ModelParts
from tokencurric.adapters.generation import watched
from tokencurric.adapters.handwritten import HandwrittenSeam
from tokencurric.adapters.hugging_face import TransformersSeam
from tokencurric.adapters.pictures import noting_pictures
from tokencurric.adapters.record import TAPPED, Request
from tokencurric.adapters.seam import Seam
from tokencurric.budget import Budget
from tokencurric.compressors import Compressor
from tokencurric.errors import MissingSignalError, RangeError
from tokencurric.token_budget import TokenBudget
from tokencurric.view import remedy


@contextmanager
def compress(
    model: nn.Module,
    compressor: Compressor,
    *,
    keep: Budget | Sequence[Budget] | None = None,
    ratio: float | int | Sequence[float | int] | None = None,
    layer: int | Sequence[int] = 2,
    per: Literal["row", "image"] = "row",
    query: Int[Tensor, " batch"] | None = None,
    visual_mask: Bool[Tensor, "batch seq"] | None = None,
    groups: Int[Tensor, "batch seq"] | None = None,
    row_key: Int[Tensor, " batch"] | None = None,
    seed: int = 0,
    adapter: Callable[[Any], ModelAdapter] | None = None,
) -> Iterator[nn.Module]:
    """Run decoder layers from `layer` on without the visual tokens that `compressor` drops.

    Inside the context the model's forward and `generate` work as before, with a key-value cache that is really
    smaller. Logits of a dropped position are those of the nearest kept position before it. Where nothing is dropped
    nothing runs: the result is bit-identical. Backward of a forward belongs inside the context. Leaving it, also by an
    exception, restores the model exactly. Layers that are compiled one by one, `layers[n] = torch.compile(layers[n])`,
    stay one graph each, whatever the prompt says; of a model that is compiled as a whole, the prompt's hooks stay
    outside the graphs.

    Args:
        model: a multimodal transformers model, also wrapped by DDP, PEFT or torch.compile; with `adapter`, any other.
        compressor: decides which tokens stay, from the input of `layer` and attention and keys of the layer before.
        keep: visual tokens that stay, all pictures of a row together: one count, or one a row. ratio: the fraction
            removed, instead of keep.
        layer: first decoder layer that runs short; the model's depth means none does. With a list of layers, and as
            many counts or ratios, more is dropped at each of them; all are of the original tokens (`TokenBudget`).
        per: "image" gives the budget to each picture or video of a row, and has the compressor choose within each. What
            counts as one is what the model's vision tower is given as one: where a processor cuts pictures into tiles
            (InternVL, Aya Vision, Gemma 3) or videos into frames (Video-LLaVA), that is a tile or a frame.
        query: position whose attention is read, a row; None means the end of the prompt.
        visual_mask: which positions are visual, for calls with `inputs_embeds` only.
        groups: for per="image" where the model does not tell its pictures apart, or where frames shall count as
            pictures: a number for each position, the same within a picture.
        row_key: numbers of the samples, for compressors that draw; None takes a hash of each row's tokens.
        seed: of the compressor.
        adapter: for a model that is not from transformers, what makes its `ModelAdapter`.

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
        >>> with compress(model, DART(), ratio=[0.5, 0.75, 0.9], layer=[8, 16, 24]):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    budget = TokenBudget(keep=keep, ratio=ratio, layer=layer, per=per)
    seam = seam_of(model, adapter)
    for cut in budget.cuts:
        check_layer(compressor, cut.layer, seam.parts)
    cuts = tuple(cut for cut in budget.cuts if cut.layer < seam.parts.depth)
    refuse_compiled_twice(model, seam.parts)
    attachment = Attachment(seam)
    if cuts:
        attachment.request = Request(
            compressor,
            cuts,
            seed,
            visual=visual_mask,
            query=query,
            row_key=row_key,
            pictures=per == "image",
            groups=groups,
        )
    asks = per == "image" and groups is None
    pictures = noting_pictures(seam.parts, attachment.features.__setitem__) if asks else nullcontext()
    try:
        with watched(attachment), seen_anew(seam.parts), pictures:
            yield model
    finally:
        attachment.remove()


def seam_of(model: nn.Module, adapter: Callable[[Any], ModelAdapter] | None) -> Seam:
    """What hooks ask about `model`: by its structure if it is from transformers, or by its adapter.

    Raises:
        UnsupportedModelError: it is not built so that tokens can be dropped.
    """
    return TransformersSeam(model) if adapter is None else HandwrittenSeam(model, adapter)


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
