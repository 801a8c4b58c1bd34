"""Reading queries and keys of one attention module, whatever attention implementation runs.

`output_attentions` would force eager attention and materialise every head's full map. Here one module, for one
forward, is given a copy of its config that names a wrapper: it lets the real implementation run and computes the one
row that is needed, from the prompt's query to all keys.
"""

import copy
import inspect
import sys
import threading
from collections.abc import Collection
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokencurric.errors import UnsupportedModelError
from tokencurric.ranking import full_precision

_NAME = "tokencurric_tap"  # the one name this library registers anywhere
_TAPS, _CONFIG = "_tokencurric_taps", "_tokencurric_config"  # of a module's copied config: who reads, and the original
_ARMING = threading.Lock()

# Keyword arguments of an attention function. The first are part of what is computed here; the others leave the weights
# alone, or (`position_ids`, `is_causal`) are in the mask already. Whatever else changes weights is refused by name.
_READ = frozenset({"scaling", "softcap", "s_aux", "sliding_window"})
_HARMLESS = frozenset(
    {"dropout", "is_causal", "position_ids", "deterministic", "output_attentions", "use_cache", "cache"}
)


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
    bias: Float[Tensor, "#batch #heads seq"] | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """Attention from the position `at` of each row to all, softmax over those it sees, mean over heads.

    Args:
        query: after rotary embedding.
        key: after rotary embedding.
        at: one query position per row.
        sees: positions that the query attends to.
        scale: factor of the products; None means 1/√head_dim.
        cap: soft cap on the scaled products; None means no cap.
        bias: added to the capped products; -inf hides a position from a head.
        sinks: one logit per head that enters the softmax's denominator and attends to nothing.

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
        logits = rearrange(products, "batch kv_heads seq group -> batch (kv_heads group) seq")
    logits = logits * (width**-0.5 if scale is None else scale)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    if bias is not None:
        logits = logits + bias.float()
    logits = logits.masked_fill(~sees[:, None], float("-inf"))
    if sinks is None:
        return logits.softmax(-1).mean(1)
    beside = sinks.float().to(logits.device).view(1, -1, 1).expand(batch, heads, 1)
    return torch.cat([logits, beside], -1).softmax(-1)[..., :-1].mean(1)


class AttentionTap:
    """Armed on one attention module, it reads once and restores the module.

    Args:
        module: a transformers attention module.
        query: one query position per row.
        real: positions that are no padding.
        passed: names of the layer's keyword arguments, which may travel on to the attention function.
    """

    def __init__(
        self,
        module: Any,
        query: Int[Tensor, " batch"],
        real: Bool[Tensor, "batch seq"],
        passed: Collection[str] = (),
    ) -> None:
        self._module, self._thread = module, get_ident()
        self._query, self._real, self._passed = query, real, frozenset(passed)
        self._eager = _eager_of(module)
        self.tapped: Tapped | None = None
        if _NAME not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(_NAME, _attention_with_tap)
        with _ARMING:
            self.implementation: str = vars(module.config).get(_CONFIG, module.config)._attn_implementation
            if _TAPS not in vars(module.config):
                config = copy.copy(module.config)  # shallow: only this module looks at the copy
                vars(config).update({"_attn_implementation_internal": _NAME, _TAPS: [], _CONFIG: module.config})
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
    def read(self, query: Tensor, key: Tensor, mask: Any, arguments: dict[str, Any]) -> None:
        """Compute the row and restore the module: a recomputation of the layer is not read again.

        Raises:
            UnsupportedModelError: the attention module hands over something else that may change the weights.
        """
        self.close()
        self._refuse_unknown(mask, arguments)
        batch, seq = query.shape[0], query.shape[2]
        key = key[:, :, :seq].detach()  # a static cache's tail is empty
        rows, at = torch.arange(batch, device=query.device), self._query.to(query.device)
        slots = torch.arange(seq, device=at.device)
        sees, bias = self._real.to(at.device) & (slots <= at[:, None]), None
        if mask is not None and mask.ndim == 4:  # carries what only the model knows, such as a sliding window
            row = mask[rows if mask.shape[0] > 1 else torch.zeros_like(rows), :, at, :seq]
            hidden = ~row if row.dtype == torch.bool else row <= torch.finfo(row.dtype).min / 2
            bias = (torch.zeros_like(row, dtype=torch.float32) if row.dtype == torch.bool else row).float()
            bias = bias.masked_fill(hidden, float("-inf"))
        window = arguments.get("sliding_window")
        if window is not None and "flash" in self.implementation:  # elsewhere it is in the mask
            sees = sees & (at[:, None] - slots < window)
        scale, cap, sinks = arguments.get("scaling"), arguments.get("softcap"), arguments.get("s_aux")
        self.tapped = Tapped(attention_row(query, key, at, sees, scale=scale, cap=cap, bias=bias, sinks=sinks), key)

    def _refuse_unknown(self, mask: Any, arguments: dict[str, Any]) -> None:
        name = type(self._module).__name__
        if mask is not None and not isinstance(mask, Tensor):
            raise UnsupportedModelError(
                f"compressor needs attention or keys; {name} has a {type(mask).__name__} as its mask, which cannot be "
                'read.\nHint: load the model with attn_implementation="sdpa", "eager" or a FlashAttention.'
            )
        given = {each for each, value in arguments.items() if value is not None} - _READ - _HARMLESS
        ours = given - self._passed  # made by the module itself, for the attention function
        for function in (self._eager, ALL_ATTENTION_FUNCTIONS.get(self.implementation)):
            if given and function is not None:
                ours |= given & inspect.signature(function).parameters.keys()
        if ours:
            raise UnsupportedModelError(
                f"compressor needs attention or keys; {name} hands {', '.join(sorted(ours))} to its attention function."
                "\nHint: how this changes the weights is not known; use a compressor that needs neither, as Uniform."
            )


def _eager_of(module: nn.Module) -> Any:
    """The eager attention function, which stands beside the module's class or beside one that it inherits from."""
    places = [sys.modules.get(each.__module__) for each in type(module).__mro__]
    found = (getattr(each, "eager_attention_forward", None) for each in places)
    return next((each for each in found if each is not None), None)


def _attention_with_tap(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> Any:
    config: Any = module.config
    taps: list[AttentionTap] = getattr(config, _TAPS, [])
    implementation: str = getattr(config, _CONFIG, config)._attn_implementation
    if torch.compiler.is_compiling():
        (tap,) = taps
        tap.read(query, key, attention_mask, arguments)
    else:
        me = get_ident()
        for tap in [each for each in taps if each._thread == me]:
            tap.read(query, key, attention_mask, arguments)
    function: Any = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, _eager_of(module))
    return function(module, query, key, value, attention_mask, **arguments)
