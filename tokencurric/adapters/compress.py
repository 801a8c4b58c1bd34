"""Compressing the visual tokens of a transformers model for as long as a context is open."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from jaxtyping import Bool, Int
from torch import Tensor, nn

from tokencurric.adapters.adapter import ModelAdapter
from tokencurric.adapters.attachment import Attachment
from tokencurric.adapters.compiled import refuse_compiled_twice, renew, runs_compiled_anywhere
from tokencurric.adapters.discovery import ModelParts
from tokencurric.adapters.generation import watch_generate
from tokencurric.adapters.handwritten import HandwrittenSeam
from tokencurric.adapters.hugging_face import TransformersSeam
from tokencurric.adapters.pictures import note_images
from tokencurric.adapters.record import Request
from tokencurric.adapters.seam import Seam
from tokencurric.adapters.signals import TAPPED
from tokencurric.budget import Budget
from tokencurric.compressors import Compressor, require_compressor
from tokencurric.errors import MissingSignalError, RangeError
from tokencurric.token_budget import TokenBudget
from tokencurric.view import remedy

_OPENING = threading.Lock()  # two threads that open a context on one model do not overlook each other


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
    prompt_length: int | Int[Tensor, " batch"] | None = None,
    seed: int = 0,
    adapter: Callable[[Any], ModelAdapter] | None = None,
) -> Iterator[nn.Module]:
    """Run decoder layers from `layer` on without the visual tokens that `compressor` drops.

    Inside the context the model's forward and `generate` work as before, with a key-value cache that is really
    smaller. Logits of a dropped position are those of the nearest kept position before it. Where nothing is dropped
    nothing runs: the result is bit-identical. Backward of a forward belongs inside the context. Leaving it, also by an
    exception, restores the model exactly. Layers that are compiled one by one, `layers[n] = torch.compile(layers[n])`,
    stay one graph each, whatever the prompt contains; of a model that is compiled as a whole, the prompt's hooks stay
    outside the graphs.

    The context holds in every thread, and leaving it waits for calls of other threads. Copies of the model made inside
    are plain. `generate` decides once where the prompt ends. A forward pass takes the whole row for the prompt, unless
    `labels`, `prompt_length` or `query` state where it ends: pass one of them when a row holds an answer too.

    A row keeps the same tokens alone and in any batch. Without `position_ids`, the model would number the padded
    sequence; where tokens are dropped, each row is numbered from its first token instead, as `generate` does. Attention
    depends on distances only, so this changes logits by rounding alone.

    Args:
        model: multimodal transformers model, also wrapped by DDP, PEFT or torch.compile; with `adapter`, any other.
        compressor: decides which tokens stay, from the input of `layer` and attention and keys of the layer before.
        keep: visual tokens that stay, all images of a row together: one count, or one per row.
        ratio: fraction of the visual tokens that is removed, instead of `keep`.
        layer: first decoder layer that runs short; the model's depth means none does. With a list of layers, and as
            many counts or ratios, more is dropped at each of them; all are of the original tokens (`TokenBudget`).
        per: "image" gives the budget to each image or video of a row, and has the compressor choose within each. What
            counts as one is what the model's vision tower is given as one: where a processor cuts images into tiles
            (InternVL, Aya Vision, Gemma 3) or videos into frames (Video-LLaVA), that is a tile or a frame.
        query: [batch] index of the last prompt token per row, whose attention is read; None means the prompt's end.
        visual_mask: [batch seq] True at visual tokens of the first call on a cache, padding included. Needed where ids
            do not tell: calls with `inputs_embeds`, configs without an image token, decoders that are called directly.
        groups: [batch seq] number that is the same within an image, for per="image" where the model does not tell its
            images apart, or where frames shall count as images.
        row_key: [batch] numbers of the samples, for compressors that draw; None takes a hash of each row's prompt, or
            of its length alone in a call with `inputs_embeds`.
        prompt_length: positions per row, padding included, that are its prompt: one int, or one per row. What comes
            after is an answer, which no choice depends on. Inside of `generate` it is known and this is not read.
        seed: passed to the compressor.
        adapter: makes the `ModelAdapter` of a model that is not from transformers.

    Yields:
        The model.

    Raises:
        NotACompressorError: `compressor` is a name, a class or a plain function, or lacks something.
        UnsupportedModelError: the model is not built so that tokens can be dropped.
        RangeError: not exactly one of keep and ratio is given, or a number is out of range.
        MissingSignalError: the compressor needs signals that `layer` does not have.
        StateError: another compression is open on the model, or the model is compiled and two threads call it.

    Example:
        >>> from tokencurric import FastV, compress
        >>> with compress(model, FastV(), keep=128, layer=2):  # doctest: +SKIP
        ...     model.generate(**inputs)
        >>> with compress(model, DART(), ratio=[0.5, 0.75, 0.9], layer=[8, 16, 24]):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    require_compressor(compressor, who="compress")
    budget = TokenBudget(keep=keep, ratio=ratio, layer=layer, per=per)
    seam = seam_of(model, adapter)
    for cut in budget.cuts:
        check_layer(compressor, cut.layer, seam.parts)
    cuts = tuple(cut for cut in budget.cuts if cut.layer < seam.parts.depth)
    request = Request(
        compressor,
        cuts,
        seed,
        visual=visual_mask,
        query=query,
        row_key=row_key,
        prompt=prompt_length,
        pictures=per == "image",
        groups=groups,
    )
    refuse_compiled_twice(model, seam.parts)
    with _OPENING:
        attachment = Attachment(seam, compiled=runs_compiled_anywhere(model, seam.parts))
        if cuts:
            attachment.everywhere = request
    try:
        watch_generate(attachment)
        if per == "image" and groups is None:
            note_images(seam.parts, attachment.traces, attachment.note)
        renew(seam.parts, attachment.traces)
        yield model
    finally:
        try:
            attachment.forwards.wait_for_others()
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
