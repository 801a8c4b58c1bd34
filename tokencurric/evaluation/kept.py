"""Which visual tokens a compressor keeps in a real forward pass."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tokencurric.adapters import compress
from tokencurric.budget import Budget
from tokencurric.compressors import Compressor, require_compressor
from tokencurric.compressors.protocol import Tags
from tokencurric.errors import RangeError
from tokencurric.view import Signal, VisualView


class _Listening:
    """A compressor that remembers its last answer."""

    def __init__(self, inner: Compressor) -> None:
        self.inner = inner
        self.mask: Tensor | None = None

    @property
    def needs(self) -> frozenset[Signal]:
        return self.inner.needs

    @property
    def tags(self) -> Tags:
        return self.inner.tags

    def __call__(self, view: VisualView, keep: Budget, *, seed: int = 0) -> Bool[Tensor, "batch visual"]:
        self.mask = self.inner(view, keep, seed=seed)
        return self.mask


def kept_tokens(
    model: Any,
    inputs: Mapping[str, Any],
    compressor: Compressor,
    *,
    keep: int,
    layer: int = 2,
    row_key: Int[Tensor, " batch"] | None = None,
    seed: int = 0,
) -> Bool[Tensor, "batch visual"]:
    """The mask of survivors among each row's visual tokens, in the order in which the model reads them.

    Args:
        model, inputs: what is called. compressor, keep, layer, row_key, seed: as for `compress`.

    Raises:
        NotACompressorError: `compressor` is none. RangeError: nothing is dropped, so nothing is chosen.

    Example:
        >>> kept_tokens(model, prompts.inputs, FastV(), keep=16).sum(1)  # doctest: +SKIP
        tensor([16, 16])
    """
    listening = _Listening(require_compressor(compressor, who="kept_tokens"))
    with torch.no_grad(), compress(model, listening, keep=keep, layer=layer, row_key=row_key, seed=seed):
        model(**inputs, use_cache=False, logits_to_keep=1)
    if listening.mask is None:
        raise RangeError(
            f"kept_tokens needs a budget below the number of visual tokens; got keep={keep}. Where all stay, the "
            "compressor is never asked. Choose a smaller count."
        )
    return listening.mask.cpu()
