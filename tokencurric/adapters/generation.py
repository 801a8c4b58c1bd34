"""What `generate` keeps to itself and compression needs to know: where the prompt ends, what it compiles."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from tokencurric.adapters.attachment import Attachment
from tokencurric.adapters.compiled import is_compiled
from tokencurric.errors import StateError


@contextmanager
def watched(attachment: Attachment) -> Iterator[None]:
    """Within, some steps of `generate` are looked at before they run.

    No hook sees these things. A prompt in chunks looks like a conversation that goes on, and assisted decoding appends
    its first draft to the prompt. With a static cache the model is compiled around layers that may be compiled already,
    which would go past their hooks. So the methods are wrapped on the instance while the context is open.

    Args:
        attachment: on the model.
    """
    base = attachment.parts.base
    wrapped = {}
    for name, before in (("_prefill", _refuse_chunks), ("_get_candidate_generator", _note_prompt)):
        if hasattr(base, name) and name not in vars(base):
            wrapped[name] = partial(_preceded, getattr(base, name), partial(before, attachment))
    if any(is_compiled(layer) for layer in attachment.parts.layers) and hasattr(base, "get_compiled_call"):
        wrapped["get_compiled_call"] = partial(_as_it_is, base)
    for name, method in wrapped.items():
        object.__setattr__(base, name, method)
    try:
        yield
    finally:
        for name in wrapped:
            object.__delattr__(base, name)


def _preceded(method: Any, before: Any, *args: Any, **kwargs: Any) -> Any:
    before(*args, **kwargs)
    return method(*args, **kwargs)


def _as_it_is(base: Any, compile_config: Any) -> Any:
    return base.__call__


def _refuse_chunks(attachment: Attachment, input_ids: Any, generation_config: Any, *_: Any, **__: Any) -> None:
    size = generation_config.prefill_chunk_size
    if size is not None:
        raise StateError(
            f"compress needs the whole prompt in one call; got prefill_chunk_size={size}. Only visual tokens of the "
            "first chunk would be compressed, seen by a query in the middle of the prompt. Leave it out."
        )


def _note_prompt(attachment: Attachment, generation_config: Any, input_ids: Any, *_: Any, **__: Any) -> None:
    attachment.prompt = input_ids.shape[1]
