"""The usual way, honestly written: one sample at a time, with torch's own operations. For comparison only."""

import torch
from torch import Tensor
from torch.nn import functional

from tokencurric import VisualView


def random_loop(view: VisualView, keep: int, *, seed: int = 0) -> Tensor:
    """A permutation of each row from the generator's state."""
    mask = torch.zeros(view.tokens.shape[:2], dtype=torch.bool)
    for row in range(mask.shape[0]):
        mask[row, torch.randperm(mask.shape[1])[:keep]] = True
    return mask


def uniform_loop(view: VisualView, keep: int, *, seed: int = 0) -> Tensor:
    """Evenly spaced positions of each row."""
    mask = torch.zeros(view.tokens.shape[:2], dtype=torch.bool)
    for row in range(mask.shape[0]):
        mask[row, torch.linspace(0, mask.shape[1] - 1, keep).round().long()] = True
    return mask


def fastv_loop(view: VisualView, keep: int, *, seed: int = 0) -> Tensor:
    """topk of each row's attention."""
    assert view.attention is not None
    mask = torch.zeros(view.tokens.shape[:2], dtype=torch.bool)
    for row in range(mask.shape[0]):
        mask[row, view.attention[row].topk(keep).indices] = True
    return mask


def dart_loop(view: VisualView, keep: int, *, seed: int = 0) -> Tensor:
    """For each row and pivot: cosine to all tokens, then topk of those that are left."""
    assert view.keys is not None and view.normed_tokens is not None
    assert view.text_keys is not None and view.normed_text_tokens is not None
    mask = torch.zeros(view.tokens.shape[:2], dtype=torch.bool)
    for row in range(mask.shape[0]):
        norms = view.keys[row].flatten(1).norm(p=1, dim=-1)
        text_norms = view.text_keys[row].flatten(1).norm(p=1, dim=-1)
        first = norms.topk(4).indices
        pivots = [view.normed_tokens[row, i] for i in first]
        pivots += [view.normed_text_tokens[row, i] for i in text_norms.topk(4).indices]
        mask[row, first] = True
        for turn, pivot in enumerate(pivots):
            left = (~mask[row]).nonzero()[:, 0]
            similarity = functional.cosine_similarity(pivot[None], view.normed_tokens[row, left], dim=-1)
            share = (keep - 4) // 8 + (turn < (keep - 4) % 8)
            mask[row, left[similarity.topk(share, largest=False).indices]] = True
    return mask


LOOPS = {"Random": random_loop, "Uniform": uniform_loop, "FastV": fastv_loop, "DART": dart_loop}
