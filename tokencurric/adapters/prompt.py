"""The prompt of a forward: which tokens are visual, where it ends, and by what its rows are named."""

from typing import Any

import torch
from torch import Tensor

from tokencurric.adapters.deepstack import Deepstack
from tokencurric.adapters.discovery import ModelParts
from tokencurric.adapters.layout import Layout, lay_out
from tokencurric.adapters.pictures import lengths_of, numbered
from tokencurric.adapters.record import Record, Request
from tokencurric.adapters.repeated import for_rows_of
from tokencurric.adapters.row_keys import content_keys
from tokencurric.adapters.seam import Call
from tokencurric.errors import ShapeError, StateError


def begin(
    parts: ModelParts,
    request: Request,
    call: Call,
    features: dict[str, Any],
    prompt: int | None,
    deepstack: Deepstack | None,
) -> Record:
    """The record of a forward over a prompt.

    Args:
        parts: parts of the model.
        request: what the forward does.
        call: the call of the decoder.
        features: what the model made of its images, and of its videos.
        prompt: length of the prompt in tokens where `generate` runs; None outside of it.
        deepstack: features that are added between layers.

    Raises:
        StateError: which tokens are visual cannot be told.
        ShapeError: the visual mask is of another sequence.
    """
    request, layout = for_rows_of(call, request), request.layout
    if layout is None:
        layout = _lay_out(parts, request, call, features, prompt)
    if call.shape is not None and call.shape != tuple(layout.visual.shape):
        raise ShapeError(
            f"compress needs token ids of the decoder's input, shape {call.shape}; got "
            f"{tuple(layout.visual.shape)}. Each visual token needs a placeholder. Use the model's processor."
        )
    key = request.row_key
    if key is None:
        key = content_keys(layout.real.long() if call.ids is None else call.ids, layout.prompt)
    return Record(request, layout, key, deepstack)


def _lay_out(
    parts: ModelParts, request: Request, call: Call, features: dict[str, Any], generating: int | None
) -> Layout:
    visual, groups = call.visual if request.visual is None else request.visual, request.groups
    if visual is None:
        raise StateError(
            "compress needs to know which tokens are visual; got a call without input_ids. Pass "
            "visual_mask=... (True at visual tokens) to compress(...), or call the model with input_ids."
        )
    prompt: int | Tensor | None = request.prompt if generating is None else generating
    if generating is not None and call.shape is not None and generating < call.shape[1]:
        # Each step without a cache brings the answer so far; what the caller gave is of the prompt.
        visual = _lengthened(visual, call.shape)
        groups = None if groups is None else _lengthened(groups, call.shape)
    if prompt is not None:
        end = prompt.to(visual.device)[:, None] if isinstance(prompt, Tensor) else prompt
        visual = visual & (torch.arange(visual.shape[1], device=visual.device) < end)
    if request.pictures and groups is None:
        config = getattr(parts.base, "config", None)
        lengths = {kind: lengths_of(each, config) for kind, each in features.items()}
        groups = numbered(call.ids, visual, lengths, parts.visual_kinds)
    labels = call.labels if request.labels is None else request.labels
    if labels is not None and request.query is not None and labels.shape != visual.shape:
        labels = None  # of a sequence without its images; only the query would be read off them
    return lay_out(visual, call.real, labels=labels, query=request.query, groups=groups, prompt=prompt)


def _lengthened(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask, or numbers, of a prompt's positions, with 0 at those that come after it."""
    return torch.nn.functional.pad(mask, (0, max(0, shape[1] - mask.shape[1])))
