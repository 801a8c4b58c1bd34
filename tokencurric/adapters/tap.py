"""Reading queries and keys of one attention module, whatever attention implementation runs.

`output_attentions` would force eager attention and materialise every head's full map. Here one module, for one
forward, is given a copy of its config that names a wrapper: it lets the real implementation run and computes the one
row that is needed, from the prompt's query to all keys.
"""

import copy
import sys
import threading
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokencurric.ranking import full_precision

_NAME = "tokencurric_tap"  # the one name this library registers anywhere
_TAPS, _CONFIG = "_tokencurric_taps", "_tokencurric_config"  # of a module's copied config: who reads, and the original
_ARMING = threading.Lock()


@dataclass(frozen=True, eq=False)
class Tapped:
    """What was read.

    Args:
        attention: from the query to every position, softmax over all keys, mean over heads; 0 where it cannot see.
        keys: after rotary embedding.
    """

    attention: Float[Tensor, "batch seq"]
    keys: Float[Tensor, "batch kv_heads seq head_dim"]


@runtime_checkable
class Tap(Protocol):
    """Something that reads one layer once.

    Args:
        tapped: what was read; None so far.
    """

    tapped: Tapped | None

    def close(self) -> None:
        """Stop listening; it may be called again."""
        ...


@torch.no_grad()
def attention_row(
    query: Float[Tensor, "batch heads seq head_dim"],
    key: Float[Tensor, "batch kv_heads seq head_dim"],
    at: Int[Tensor, " batch"],
    sees: Bool[Tensor, "batch seq"],
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Tensor, "batch seq"]:
    """Attention from the position `at` of each row to all, softmax over those it sees, mean over heads.

    Args:
        query, key: after rotary embedding. at: a position a row. sees: where it may look.
        scale: of the products; None means 1/√head_dim. cap: of a soft cap on the scaled products, if there is one.

    Example:
        >>> q = k = torch.zeros(1, 1, 2, 4)
        >>> attention_row(q, k, torch.tensor([1]), torch.ones(1, 2, dtype=torch.bool)).tolist()
        [[0.5, 0.5]]
    """
    batch, heads, _, width = query.shape
    one = query[torch.arange(batch, device=query.device), :, at].view(batch, key.shape[1], heads // key.shape[1], width)
    with full_precision(key.device):
        # Keys stand head by head inside of a token's row; einsum would copy them all into another order first.
        products = key.float() @ one.float().transpose(2, 3)
        logits = rearrange(products, "batch kv_heads seq group -> batch (kv_heads group) seq") * (scale or width**-0.5)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits.masked_fill(~sees[:, None], float("-inf")).softmax(-1).mean(1)


class AttentionTap:
    """Armed on one attention module, it reads once and restores the module.

    Args:
        module: a transformers attention module.
        query: position per row whose attention is read.
        real: positions that are no padding.
    """

    def __init__(self, module: Any, query: Int[Tensor, " batch"], real: Bool[Tensor, "batch seq"]) -> None:
        self._module, self._thread = module, get_ident()
        self._query, self._real = query, real
        self.tapped: Tapped | None = None
        if _NAME not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(_NAME, _attention_with_tap)
        with _ARMING:
            if _TAPS not in vars(module.config):
                config = copy.copy(module.config)  # shallow: only this module looks at the copy
                config.__dict__ |= {"_attn_implementation_internal": _NAME, _TAPS: [], _CONFIG: module.config}
                module.config = config
            vars(module.config)[_TAPS].append(self)

    def close(self) -> None:
        """Restore the module, unless another thread listens to it; it may be called again."""
        if torch.compiler.is_compiling():  # one thread at a time, see `Forwards`; locks cannot be traced
            self._close()
            return
        with _ARMING:
            self._close()

    def _close(self) -> None:
        config = self._module.config
        taps: list[AttentionTap] = getattr(config, _TAPS, [])
        if self in taps:
            taps.remove(self)
            if not taps:
                self._module.config = getattr(config, _CONFIG)

    @torch.no_grad()
    def read(self, query: Tensor, key: Tensor, mask: Tensor | None, arguments: dict[str, Any]) -> None:
        """Compute the row and restore the module: a recomputation of the layer is not read again."""
        self.close()
        batch, seq = query.shape[0], query.shape[2]
        key = key[:, :, :seq].detach()  # a static cache's tail is empty
        rows, at = torch.arange(batch, device=query.device), self._query.to(query.device)
        sees = self._visible(rows, at, seq, mask)
        scale, cap = arguments.get("scaling"), arguments.get("softcap")
        self.tapped = Tapped(attention_row(query, key, at, sees, scale=scale, cap=cap), key)

    def _visible(self, rows: Tensor, at: Tensor, seq: int, mask: Tensor | None) -> Tensor:
        seen = self._real.to(at.device) & (torch.arange(seq, device=at.device) <= at[:, None])
        if mask is not None and mask.ndim == 4:  # carries what only the model knows, such as a sliding window
            row = mask[rows if mask.shape[0] > 1 else torch.zeros_like(rows), 0, at, :seq]
            seen = seen & (row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2)
        return seen


def _attention_with_tap(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> Any:
    config: Any = module.config
    taps: list[AttentionTap] = getattr(config, _TAPS, [])
    config = getattr(config, _CONFIG, config)
    if torch.compiler.is_compiling():
        (tap,) = taps
        tap.read(query, key, attention_mask, arguments)
    else:
        me = get_ident()
        for tap in [each for each in taps if each._thread == me]:
            tap.read(query, key, attention_mask, arguments)
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    return attend(module, query, key, value, attention_mask, **arguments)
