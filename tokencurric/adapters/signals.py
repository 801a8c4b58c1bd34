"""What a compressor is shown of a decoder layer's input, and of the layer before."""

from collections.abc import Callable, Set

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tokencurric.adapters.stretch import Stretch
from tokencurric.adapters.tap import Tapped
from tokencurric.view import Signal, VisualView

TAPPED = frozenset({"attention", "keys", "text_keys"})  # signals that need the layer before
NORMED = frozenset({"normed_tokens", "normed_text_tokens"})  # signals that need the final norm


def look(
    below: Stretch,
    hidden: Float[Tensor, "batch slots dim"],
    norm: Callable[[Tensor], Tensor],
    needs: Set[Signal],
    tapped: Tapped | None,
    row_key: Int[Tensor, " batch"],
) -> VisualView:
    """The visual tokens of a batch with the signals that are needed.

    Args:
        below: layers whose sequence is looked at.
        hidden: what the last of them returned.
        norm: the final norm.
        needs: the signals.
        tapped: attention and keys of that layer; None leaves them out.
        row_key: number of each sample.
    """
    layout, shortened = below.layout, below.shortened
    visual, text = layout.visual_positions.to(hidden.device), layout.text_positions.to(hidden.device)
    tokens = _pick(hidden, visual)
    signals: dict[str, Tensor] = {}
    if "normed_tokens" in needs:
        signals["normed_tokens"] = norm(tokens)
    if needs & {"text_tokens", "normed_text_tokens"}:
        signals["text_tokens"] = _pick(hidden, text)
        if "normed_text_tokens" in needs:
            signals["normed_text_tokens"] = norm(signals["text_tokens"])
    if tapped is not None:
        keys = rearrange(tapped.keys, "batch heads seq width -> batch seq heads width").to(hidden.device)
        signals["keys"] = _pick(keys, visual)
        signals["text_keys"] = _pick(keys, text)
        signals["attention"] = tapped.attention.to(hidden.device).gather(1, visual)
    return VisualView(
        tokens=tokens,
        valid=layout.visual_valid.to(hidden.device),
        positions=visual if shortened is None else shortened.selection.index.to(hidden.device).gather(1, visual),
        row_key=row_key.to(hidden.device),
        text_valid=layout.text_valid.to(hidden.device),
        **signals,
    )


def _pick(
    x: Shaped[Tensor, "batch slots *rest"], positions: Int[Tensor, "batch token"]
) -> Shaped[Tensor, "batch token *rest"]:
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[rows, positions]
