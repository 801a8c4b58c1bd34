"""What a compressor may look at: the visual tokens of a batch and the signals it asked for."""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencurric.errors import MissingSignalError, ShapeError

Signal: TypeAlias = Literal[
    "normed_tokens",
    "keys",
    "attention",
    "text_tokens",
    "normed_text_tokens",
    "text_keys",
    "cls_attention",
    "grid",
]

# Axes after the batch that each field must share with its owner: visual fields with `tokens`, text ones with
# `text_valid`.
_VISUAL = ("valid", "positions", "normed_tokens", "keys", "attention", "cls_attention")
_TEXT = ("text_tokens", "normed_text_tokens", "text_keys")


@dataclass(frozen=True, eq=False, kw_only=True)
class VisualView:
    """The visual tokens of a batch in a dense, padded layout, with the signals a compressor declared in `needs`.

    Rows are ragged: a row has 0 to `visual` tokens, marked by `valid` anywhere in the padded axis, in the order in
    which the model reads them. "Prompt text" are the positions that are neither visual nor padding, after the row's
    last visual token, up to and including the query position whose attention is read.

    Args:
        tokens: hidden states (or projected features) of the visual tokens.
        valid: which entries are tokens; None means all of them.
        positions: the tokens' positions in the model's sequence.
        row_key: a number that names the sample, for compressors that draw; None means the row's index.
        normed_tokens: `tokens` after the model's final norm.
        keys: keys of the layer before, after rotary embedding at positions that count from the row's first token.
        attention: attention from the prompt query to each visual token: softmax over all keys, mean over heads.
        text_tokens, normed_text_tokens, text_keys: the same of the prompt text. text_valid: which entries are tokens.
        cls_attention: attention from the vision tower's class token to each visual token, mean over heads.
        grid: (height, width) of the visual tokens, a row.

    Raises:
        ShapeError: two fields do not fit together.

    Example:
        >>> view = VisualView(tokens=torch.randn(2, 9, 4), valid=torch.arange(9).expand(2, 9) < 6)
        >>> view.counts.tolist()
        [6, 6]
    """

    tokens: Float[Tensor, "batch visual dim"]
    valid: Bool[Tensor, "batch visual"] | None = None
    positions: Int[Tensor, "batch visual"] | None = None
    row_key: Int[Tensor, " batch"] | None = None
    normed_tokens: Float[Tensor, "batch visual dim"] | None = None
    keys: Float[Tensor, "batch visual kv_heads head_dim"] | None = None
    attention: Float[Tensor, "batch visual"] | None = None
    text_tokens: Float[Tensor, "batch text dim"] | None = None
    normed_text_tokens: Float[Tensor, "batch text dim"] | None = None
    text_keys: Float[Tensor, "batch text kv_heads head_dim"] | None = None
    text_valid: Bool[Tensor, "batch text"] | None = None
    cls_attention: Float[Tensor, "batch visual"] | None = None
    grid: Int[Tensor, "batch 2"] | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3:
            raise ShapeError(
                f"VisualView needs tokens [batch visual dim]; got tokens of shape {tuple(self.tokens.shape)}. "
                "Add the axis that is missing, for instance with unsqueeze(0) for a single row."
            )
        text = [getattr(self, name) for name in ("text_valid", *_TEXT) if getattr(self, name) is not None]
        self._check_axes(_VISUAL, tuple(self.tokens.shape[:2]), "[batch visual]")
        if text:
            self._check_axes(("text_valid", *_TEXT), (self.tokens.shape[0], text[0].shape[1]), "[batch text]")
        for name in ("row_key", "grid"):
            value = getattr(self, name)
            shape = (self.tokens.shape[0],) if name == "row_key" else (self.tokens.shape[0], 2)
            if value is not None and (tuple(value.shape) != shape or value.is_floating_point()):
                raise ShapeError(
                    f"VisualView needs whole numbers {name} of shape {shape}; got dtype={value.dtype}, shape "
                    f"{tuple(value.shape)}. There is one entry for each row of tokens. Give an integer tensor."
                )

    def _check_axes(self, names: tuple[str, ...], axes: tuple[int, ...], label: str) -> None:
        for name in names:
            value: Tensor | None = getattr(self, name)
            if value is not None and tuple(value.shape[:2]) != axes:
                raise ShapeError(
                    f"VisualView needs {name} to begin with {label} = {axes}; got shape {tuple(value.shape)}. "
                    "All fields describe the same padded tokens. Pad them together."
                )

    @cached_property
    def mask(self) -> Bool[Tensor, "batch visual"]:
        """`valid`, or all True when every entry is a token."""
        if self.valid is not None:
            return self.valid
        return torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)

    @cached_property
    def counts(self) -> Int[Tensor, " batch"]:
        """Number of visual tokens of each row."""
        return self.mask.sum(1)

    @cached_property
    def rank(self) -> Int[Tensor, "batch visual"]:
        """Number of a token within its row, 0 for the first: independent of where the padding stands."""
        return self.mask.cumsum(1) - 1

    @cached_property
    def keys_of_rows(self) -> Int[Tensor, " batch"]:
        """`row_key`, or the rows' indices."""
        if self.row_key is not None:
            return self.row_key
        return torch.arange(self.tokens.shape[0], device=self.tokens.device)

    @property
    def signals(self) -> frozenset[str]:
        """Names of the optional fields that are present."""
        return frozenset(f.name for f in fields(self) if f.name != "tokens" and getattr(self, f.name) is not None)

    def signal(self, name: Signal, *, who: str) -> Tensor:
        """The signal `name`, which `who` ranks tokens by.

        Raises:
            MissingSignalError: it is absent; names the compressor, the signal and what to do.

        Example:
            >>> view = VisualView(tokens=torch.zeros(1, 2, 4), attention=torch.tensor([[0.2, 0.8]]))
            >>> view.signal("attention", who="FastV").tolist()
            [[0.20000000298023224, 0.800000011920929]]
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise MissingSignalError(
                f"{who} needs the signal {name!r}; got a view with {sorted(self.signals)}. {who} ranks tokens by it. "
                f"{remedy(name)}"
            )
        return value


def remedy(signal: Signal) -> str:
    """Where a missing signal can come from, as a sentence for an error.

    Example:
        >>> "vision tower" in remedy("cls_attention")
        True
    """
    if signal in ("cls_attention", "grid"):
        return "It comes from the vision tower: fill this field of VisualView yourself."
    return (
        "It comes from the decoder layer before the one that compresses: use layer >= 1 with compress(...), "
        "or fill this field of VisualView yourself."
    )
