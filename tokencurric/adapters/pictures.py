"""Which visual tokens belong to which picture, so that each picture can have a budget of its own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tokencurric._transfer import on_device
from tokencurric.adapters.discovery import ModelParts, is_visual
from tokencurric.adapters.traces import Traces
from tokencurric.draws import hash_tensor
from tokencurric.errors import StateError
from tokencurric.selection import Selection
from tokencurric.view import VisualView

_PER_TOKEN = ("positions", "normed_tokens", "keys", "attention", "cls_attention")
_PER_ROW = ("text_tokens", "normed_text_tokens", "text_keys", "text_valid")
_ROW_BY_ROW = ("idefics2", "idefics3", "smolvlm")  # these return all pictures of a row, or their tiles, as one
_SAY = "Pass groups=..., a whole number for each position that is the same within a picture."
READERS = {"get_image_features": "image", "get_video_features": "video"}  # methods, and whose features they return


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures of a batch.

    Args:
        number: of the picture that a position belongs to, counted through the batch; −1 where there is no visual token.
        rows: row of each picture. counts: its visual tokens.
    """

    number: Int[Tensor, "batch seq"]
    rows: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, groups: Int[Tensor, "batch seq"], visual: Bool[Tensor, "batch seq"]) -> "Pictures":
        """The pictures of visual tokens whose `groups` say which belong together.

        Args:
            groups: any whole numbers; equal ones in a row are one picture. visual: where they count.

        Example:
            >>> groups = torch.tensor([[7, 7, 3], [7, 0, 0]])
            >>> pictures = Pictures.of(groups, torch.tensor([[True, True, True], [True, False, False]]))
            >>> pictures.rows, pictures.counts
            ((0, 0, 1), (1, 2, 1))
        """
        number = torch.full(groups.shape, -1, dtype=torch.int64, device=groups.device)
        rows = torch.arange(len(groups), device=groups.device)[:, None].expand_as(groups)
        pairs = torch.stack((rows[visual], groups[visual].long()), 1)
        if not len(pairs):
            return cls(number, (), ())
        found, each, counts = pairs.unique(dim=0, return_inverse=True, return_counts=True)
        return cls(number.masked_scatter(visual, each), tuple(found[:, 0].tolist()), tuple(counts.tolist()))

    def keeping(self, selection: Selection, kept: tuple[int, ...]) -> "Pictures":
        """The same pictures on the short sequence of `selection`, with `kept` tokens each."""
        number = selection.gather(self.number.to(selection.index.device))
        return Pictures(number.masked_fill(~selection.valid, -1), self.rows, kept)

    def count(self, survives: Bool[Tensor, "batch seq"]) -> tuple[int, ...]:
        """Visual tokens of each picture where `survives` holds."""
        there = self.number.to(survives.device)[survives]
        return tuple(torch.bincount(there[there >= 0], minlength=len(self.counts)).tolist())

    def split(self, view: VisualView, at: Int[Tensor, "batch visual"]) -> VisualView:
        """The view with a row for each picture; its prompt text is that of its row.

        Args:
            view: of rows. at: positions of its tokens in the sequence.
        """
        index, valid = self._places(at, view.mask)
        rows = on_device(self.rows, index.device)
        own = torch.arange(len(rows), device=index.device) - torch.searchsorted(rows, rows)  # number within the row
        tokens = {name: getattr(view, name) for name in ("tokens", *_PER_TOKEN)}
        texts = {name: getattr(view, name) for name in _PER_ROW}
        return VisualView(
            valid=valid,
            row_key=hash_tensor(0, view.keys_of_rows[rows], own),
            **{name: each.flatten(0, 1)[index] for name, each in tokens.items() if each is not None},
            **{name: each[rows] for name, each in texts.items() if each is not None},
        )

    def join(
        self,
        mask: Bool[Tensor, "picture widest"],
        at: Int[Tensor, "batch visual"],
        present: Bool[Tensor, "batch visual"],
    ) -> Bool[Tensor, "batch visual"]:
        """A mask for rows from one for pictures.

        Args:
            mask: of the view that `split` made. at, present: as there, with `present` the mask of the view of rows.
        """
        index, valid = self._places(at, present)
        whole = torch.zeros(at.numel() + 1, dtype=torch.bool, device=mask.device)
        whole[torch.where(valid, index, at.numel())] = mask & valid  # what is no token goes past the end
        return whole[:-1].view(at.shape)

    def _places(self, at: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """For each picture the places of its tokens in the flattened packed layout, and which of these are tokens."""
        number = self.number.to(at.device).gather(1, at)
        order = torch.where(present, number, len(self.counts)).flatten().argsort(stable=True)
        counts = on_device(self.counts, at.device)
        widest = torch.arange(max(self.counts, default=0), device=at.device)
        start = (counts.cumsum(0) - counts)[:, None]
        return order[(start + widest).clamp(max=len(order) - 1)], widest < counts[:, None]


def note_images(parts: ModelParts, traces: Traces, note: Callable[[str, Any], None]) -> None:
    """Until the traces are removed, `note(kind, features)` is called with what the model makes of images and videos.

    A transformers model makes the features of all images in one method, and returns them image by image. No hook sees
    that, so the method is wrapped on the instance.

    Args:
        parts: parts of the model.
        traces: what is put on its modules.
        note: gets "image" or "video", and what the method returned.
    """
    for name, kind in READERS.items():
        root = next((each for each in reversed(parts.roots) if hasattr(each, name)), None)
        if root is not None:
            traces.put(root, name, _noted(getattr(root, name), kind, note))


def _noted(method: Any, kind: str, note: Callable[[str, Any], None]) -> Any:
    @wraps(method)  # transformers looks at the names of its arguments
    def noting(*args: Any, **kwargs: Any) -> Any:
        output = method(*args, **kwargs)
        note(kind, output)
        return output

    return noting


def lengths_of(features: Any, config: Any) -> list[int] | None:
    """Visual tokens of each picture, from what a model made of them; None if it does not tell pictures apart.

    Args:
        features: the output of its `get_image_features` or `get_video_features`. config: of the model.
    """
    told: Any = getattr(features, "pooler_output", None)
    untold = told is None or (isinstance(told, Tensor) and told.ndim < 3)
    if untold or getattr(config, "model_type", None) in _ROW_BY_ROW:
        return None
    return [each.shape[:-1].numel() for each in told]


def numbered(
    ids: Int[Tensor, "batch seq"] | None,
    visual: Bool[Tensor, "batch seq"],
    lengths: Mapping[str, list[int] | None],
    kinds: Mapping[str, tuple[int, ...]],
) -> Int[Tensor, "batch seq"]:
    """A number for each visual token that names its picture or video.

    Args:
        ids: token ids of the batch. visual: which are visual tokens. kinds: token ids of pictures and of videos.
        lengths: visual tokens of each picture and of each video, in the order of the batch.

    Raises:
        StateError: the model does not tell its pictures apart, or tells of other tokens than there are.

    Example:
        >>> ids = torch.tensor([[9, 9, 1], [9, 1, 1]])
        >>> numbered(ids, ids == 9, {"image": [2, 1]}, {"image": (9,)}).tolist()
        [[0, 0, 0], [1, 0, 0]]
    """
    known = tuple(number for tokens in kinds.values() for number in tokens)
    if ids is None or bool((visual & ~is_visual(ids, known)).any()):
        raise StateError(
            "per='image' needs to know which visual tokens belong to which picture; got a call without token ids, or "
            f"visual tokens that are none by their ids. {_SAY}"
        )
    groups, first = torch.zeros_like(ids), 0
    for kind, tokens in kinds.items():
        where = is_visual(ids, tokens) & visual
        there, told = int(where.sum()), lengths.get(kind)
        if not there:
            continue
        if told is None or sum(told) != there:
            raise StateError(
                f"per='image' needs to know which visual tokens belong to which picture; the model told "
                f"{'nothing' if told is None else f'of {sum(told)} {kind} tokens, and there are {there}'}. {_SAY}"
            )
        number = torch.arange(first, first + len(told), device=ids.device)
        groups = groups.masked_scatter(where, number.repeat_interleave(on_device(told, ids.device)))
        first += len(told)
    return groups
