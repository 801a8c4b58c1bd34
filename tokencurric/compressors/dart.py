"""DART: keep what duplicates the pivots least."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencurric.budget import Budget, row_budget
from tokencurric.compressors.protocol import Tags
from tokencurric.errors import RangeError
from tokencurric.ranking import full_precision, keep_top, rank_keys
from tokencurric.view import Signal, VisualView

_IN_CACHE = 2**20  # numbers, with their absolute values


@dataclass(frozen=True)
class DART:
    """Keeps a few pivots with large keys and, for each of them, the tokens that are least similar to it.

    Pivots are the visual and the prompt-text tokens of largest L1 key norm. Each pivot in order (visual ones by
    descending norm, then text ones) takes, from the tokens that are left, those with the lowest cosine similarity of
    the normed hidden states. The shares sum to the budget exactly, the remainder going to the first pivots. A budget
    below `visual_pivots` keeps the tokens of largest norm; a row without prompt text has visual pivots only.

    Args:
        visual_pivots: at least 1. text_pivots: at least 0.

    Raises:
        RangeError: a number of pivots is too small.

    Example:
        >>> tokens, keys = torch.randn(1, 20, 8), torch.randn(1, 20, 2, 4)
        >>> text, text_keys = torch.randn(1, 5, 8), torch.randn(1, 5, 2, 4)
        >>> signals = {"normed_tokens": tokens, "keys": keys, "normed_text_tokens": text, "text_keys": text_keys}
        >>> view = VisualView(tokens=tokens, **signals)
        >>> int(DART()(view, keep=12).sum())
        12

    Source: Wen et al. 2025, DART (arXiv:2502.11494) §3. Differs: exact budget (published code keeps
    4 + 8·⌊·⌋ tokens), pivots in a fixed order, and never a pivot from the answer. Norms are of keys after rotary
    embedding and so depend on the position: `compress` counts it from each row's first token, where published code
    counts the padding before it, too.
    """

    visual_pivots: int = 4
    text_pivots: int = 4

    needs: ClassVar[frozenset[Signal]] = frozenset({"keys", "normed_tokens", "text_keys", "normed_text_tokens"})
    tags: ClassVar[Tags] = Tags()

    def __post_init__(self) -> None:
        if self.visual_pivots < 1 or self.text_pivots < 0:
            raise RangeError(
                f"DART needs visual_pivots >= 1 and text_pivots >= 0; got visual_pivots={self.visual_pivots}, "
                f"text_pivots={self.text_pivots}. Without a visual pivot a row without text has no reference. "
                "The paper uses 4 and 4."
            )

    @torch.no_grad()
    def __call__(self, view: VisualView, keep: Budget, *, seed: int = 0) -> Bool[Tensor, "batch visual"]:
        """The mask of survivors; `seed` changes nothing.

        Raises:
            MissingSignalError: the view lacks keys or normed hidden states, of the visual tokens or the prompt text.
        """
        keys = view.signal("keys", who="DART")
        tokens = view.signal("normed_tokens", who="DART")
        text_keys = view.signal("text_keys", who="DART")
        text = view.signal("normed_text_tokens", who="DART")
        count = row_budget(keep, view.mask)
        text_valid = view.text_valid
        if text_valid is None:
            text_valid = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)

        norms = _l1_norm(keys)
        visual_live = view.counts.clamp(max=self.visual_pivots)
        text_live = text_valid.sum(1).clamp(max=self.text_pivots)
        visual_pivot = _largest(norms, view.mask, self.visual_pivots)
        text_pivot = _largest(_l1_norm(text_keys), text_valid, self.text_pivots)
        pivots = torch.cat((_rows(tokens, visual_pivot), _rows(text, text_pivot)), dim=1)

        kept = keep_top(norms, view.mask, torch.minimum(count, visual_live))
        order = torch.cat(
            (
                _order(visual_pivot.shape[1], visual_live, 0),
                _order(text_pivot.shape[1], text_live, visual_live),
            ),
            dim=1,
        )
        shares = _shares(count - torch.minimum(count, visual_live), visual_live + text_live, order)
        return kept | least_similar(tokens, pivots, shares, view.mask & ~kept)


def least_similar(
    tokens: Float[Tensor, "batch visual dim"],
    pivots: Float[Tensor, "batch pivot dim"],
    shares: Int[Tensor, "batch pivot"],
    candidates: Bool[Tensor, "batch visual"],
) -> Bool[Tensor, "batch visual"]:
    """For each pivot in order, take from the candidates that are left the `shares` with the lowest cosine to it.

    Args:
        tokens, pivots: compared by cosine similarity, in float32.
        shares: how many each pivot takes; a row's sum is at most its number of candidates.
        candidates: tokens that may be taken.

    Returns:
        The tokens taken, by any pivot.

    Example:
        >>> tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
        >>> least_similar(tokens, tokens[:, :1], torch.tensor([[1]]), torch.tensor([[False, True, True]])).tolist()
        [[False, False, True]]
    """
    tokens = tokens.float()
    # The pivot's own length scales a whole ranking, so only the tokens are normalised.
    norm = torch.linalg.vector_norm(tokens, dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    with full_precision(tokens.device):
        cosine = (pivots.float() @ tokens.transpose(1, 2)) / norm[:, None]
    left = candidates
    for i in range(pivots.shape[1]):
        left = left & ~keep_top(-cosine[:, i], left, shares[:, i])
    return candidates & ~left


def _l1_norm(keys: Float[Tensor, "batch token kv_heads head_dim"]) -> Float[Tensor, "batch token"]:
    if keys.device.type != "cpu" or torch.compiler.is_compiling():
        norms: Tensor = torch.linalg.vector_norm(keys.float(), ord=1, dim=(2, 3))
        return norms
    # On a CPU that takes three readings' time. Parts that fit into the cache, as most inputs do at once, take one.
    tokens = keys.flatten(2).flatten(0, 1)
    size = max(1, _IN_CACHE // max(1, tokens.shape[1]))
    sums = [part.abs().float().sum(-1) for part in tokens.split(size)]
    return torch.cat(sums).view(keys.shape[:2])


def _largest(
    norms: Float[Tensor, "batch token"], valid: Bool[Tensor, "batch token"], number: int
) -> Int[Tensor, "batch pivot"]:
    """Indices of the `number` largest, or of as many as there are columns; entries past a row's tokens are unused."""
    keys = rank_keys(norms).masked_fill(~valid, torch.iinfo(torch.int64).min)
    return keys.topk(min(number, norms.shape[1]), dim=1).indices  # keys are unique, so topk is safe


def _rows(x: Float[Tensor, "batch token dim"], index: Int[Tensor, "batch pivot"]) -> Float[Tensor, "batch pivot dim"]:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _order(width: int, live: Int[Tensor, " batch"], first: Int[Tensor, " batch"] | int) -> Int[Tensor, "batch pivot"]:
    """Turn of each pivot, counted over visual and text pivots that exist; -1 for those that don't."""
    turn = torch.arange(width, device=live.device).expand(len(live), width)
    start = first[:, None] if isinstance(first, Tensor) else first
    return torch.where(turn < live[:, None], turn + start, -1)


def _shares(
    rest: Int[Tensor, " batch"], pivots: Int[Tensor, " batch"], order: Int[Tensor, "batch pivot"]
) -> Int[Tensor, "batch pivot"]:
    """Split `rest` evenly, the remainder going to the first pivots: no share falls when the budget grows."""
    pivots = pivots.clamp(min=1)
    even, extra = rest // pivots, rest % pivots
    return torch.where(order >= 0, even[:, None] + (order < extra[:, None]).long(), 0)
