"""What `generate` keeps to itself and compression needs: where the prompt ends, what it compiles."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from tokencurric.adapters.attachment import Attachment
from tokencurric.adapters.compiled import is_compiled
from tokencurric.errors import StateError


def watch_generate(attachment: Attachment) -> None:
    """Wrap `generate` on the model, until the attachment is removed.

    No hook sees where the prompt ends: assisted decoding appends its first draft to it, and without a cache each step
    is a forward over the prompt and the answer so far. A prompt in chunks looks like a conversation that goes on. With
    a static cache the decoder is compiled, around layers that may be compiled already.

    Args:
        attachment: attachment on the model.
    """
    base = attachment.parts.base
    if callable(generate := getattr(base, "generate", None)):
        attachment.traces.put(base, "generate", _from_its_prompt(attachment, generate))
    if callable(compiled_call := getattr(base, "get_compiled_call", None)):
        attachment.traces.put(base, "get_compiled_call", _around_layers(attachment, compiled_call))


def _from_its_prompt(attachment: Attachment, generate: Callable[..., Any]) -> Any:
    signature = inspect.signature(generate)
    overridden = getattr(type(attachment.parts.base), "generate", None) is not GenerationMixin.generate

    @wraps(generate)
    def generating(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args, **kwargs).arguments
        given |= {name: value for each in given.values() if isinstance(each, dict) for name, value in each.items()}
        _refuse_chunks(attachment, given)
        with attachment.forwards.generating(_prompt_length(given, ids=not overridden)):
            return generate(*args, **kwargs)

    return generating


def _prompt_length(given: dict[str, Any], *, ids: bool) -> int | None:
    """Length of the sequence that the first forward gets.

    Args:
        given: arguments of `generate` by name.
        ids: whether token ids tell it; a class with a `generate` of its own may put more embeddings in their place.
    """
    prompts = (given.get(name) for name in ("inputs_embeds", *(("input_ids", "inputs") if ids else ())))
    return next((each.shape[1] for each in prompts if isinstance(each, Tensor) and each.ndim >= 2), None)


def _refuse_chunks(attachment: Attachment, given: dict[str, Any]) -> None:
    config = given.get("generation_config") or getattr(attachment.parts.base, "generation_config", None)
    size = given.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    if size is not None and attachment.request is not None:
        raise StateError(
            f"compress needs the whole prompt in one call; got prefill_chunk_size={size}. Only visual tokens of the "
            "first chunk would be compressed, seen by a query in the middle of the prompt. Leave it out."
        )


def _around_layers(attachment: Attachment, compiled_call: Callable[..., Any]) -> Any:
    @wraps(compiled_call)
    def choose(*args: Any, **kwargs: Any) -> Any:
        if any(is_compiled(layer) for layer in attachment.parts.layers):
            return attachment.parts.base.__call__
        attachment.forwards.share()
        return compiled_call(*args, **kwargs)

    return choose
