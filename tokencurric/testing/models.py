"""A model and the batch it is asked with, and what a compressed run is held against.

The oracle knows nothing of shorter sequences: the model runs at full length, and the tokens that were dropped are
hidden as keys from the compressing layer on. The oracle of `generate` has no cache: for each new token it computes
everything before it anew.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokencurric.adapters import find_parts
from tokencurric.compressors import Compressor, Tags
from tokencurric.view import Signal, VisualView

Inputs = Mapping[str, Any]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def lengthen(inputs: Inputs, sequences: Tensor, *, new_type: int = 0) -> dict[str, Any]:
    """The inputs of a prompt for the prompt and what was generated after it.

    Knows `attention_mask` (new tokens are real), `token_type_ids` and `mm_token_type_ids`.

    Args:
        inputs: of the prompt. sequences: prompt and new tokens [batch longer]. new_type: the new tokens'
            `token_type_ids`.

    Example:
        >>> prompt = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2)}
        >>> lengthen(prompt, torch.tensor([[5, 6, 7]]))["attention_mask"].shape
        torch.Size([1, 3])
    """
    more = sequences.shape[1] - inputs["input_ids"].shape[1]
    longer = {**inputs, "input_ids": sequences}
    for name, value in (("attention_mask", 1), ("token_type_ids", new_type), ("mm_token_type_ids", 0)):
        if name in inputs:
            longer[name] = nn.functional.pad(inputs[name], (0, more), value=value)
    return longer


@dataclass(frozen=True, eq=False)
class Prompted:
    """What `model_checks` check: a model, and a batch of prompts that a processor made for it.

    Args:
        model: in evaluation mode. inputs: what the model takes, without labels; two visual tokens in some row at least.
        lengthen: the inputs for a prompt and what was generated after it, where the default does not know some input.
        generation: further arguments of `generate`, for instance tokens that must not be generated because the model
            would take them for pictures.
    """

    model: nn.Module
    inputs: Inputs
    lengthen: Callable[[Inputs, Tensor], Inputs] = lengthen
    generation: Inputs | None = None

    def __deepcopy__(self, memo: Any) -> "Prompted":
        """Itself: a model is too large to be copied for every case, and the checks leave it as it was."""
        return self

    def __repr__(self) -> str:
        return type(self.model).__name__

    @property
    def tolerance(self) -> float:
        """How far results may be apart, relative to the largest logit: rounding of the model's dtype."""
        dtype = next(self.model.parameters()).dtype
        return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 0.03)

    @property
    def moves(self) -> float:
        """What dropping has to change at least, in the same measure, or a comparison would show nothing."""
        return max(1e-2, 3 * self.tolerance)

    @property
    def shape(self) -> tuple[int, int]:
        """Batch and length of the prompts."""
        batch, length = self.inputs["input_ids"].shape
        return batch, length

    def real(self) -> Tensor:
        """Where the prompts have tokens and not padding, [batch seq]."""
        ids = self.inputs["input_ids"]
        mask = self.inputs.get("attention_mask")
        return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of a forward, [batch seq vocab]."""
        found: Tensor = self.model(**self.inputs).logits
        return found

    @torch.no_grad()
    def generated(self, new: int = 4) -> tuple[Tensor, Tensor]:
        """Prompts with `new` greedy tokens, and the logits these were chosen from, [new batch vocab]."""
        settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        generate: Any = self.model.generate
        found = generate(
            **self.inputs, min_new_tokens=new, max_new_tokens=new, **settings, **dict(self.generation or {})
        )
        return found.sequences, torch.stack(found.logits)


@contextmanager
def hidden(model: nn.Module, dropped: Tensor | Sequence[Tensor], layer: int | Sequence[int]) -> Iterator[None]:
    """Layers from `layer` on see all tokens under the model's own masks, with dropped tokens hidden as keys besides.

    Args:
        model: of transformers. dropped: [batch seq]. layer: the first that may not see them. Several cuts are
            sequences of both.

    Example:
        >>> with hidden(model, dropped, 2):  # doctest: +SKIP
        ...     model(**inputs).logits
    """
    drops = [dropped] if isinstance(dropped, Tensor) else dropped
    layers = [layer] if isinstance(layer, int) else layer
    own = torch.eye(drops[0].shape[1], dtype=torch.bool, device=drops[0].device)

    def hide(gone: Tensor, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs["attention_mask"]
        if mask is None:
            mask = torch.ones_like(own).tril()[None, None]
        lowest = torch.finfo(mask.dtype).min if mask.dtype.is_floating_point else None
        return args, {**kwargs, "attention_mask": mask & ~gone if lowest is None else mask.masked_fill(gone, lowest)}

    handles = [
        each.register_forward_pre_hook(partial(hide, gone[:, None, None, :] & ~own), with_kwargs=True)
        for gone, first in zip(drops, layers, strict=True)
        for each in list(find_parts(model).layers)[first:]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def recomputed(
    model: nn.Module,
    inputs: Inputs,
    dropped: Tensor | Sequence[Tensor],
    layer: int | Sequence[int],
    sequences: Tensor,
    *,
    lengthen: Callable[[Inputs, Tensor], Inputs] = lengthen,
) -> Tensor:
    """Logits before each new token of `sequences`, [new batch vocab], from a forward over everything before it.

    Args:
        model: of transformers. inputs: of the prompt. dropped, layer: as for `hidden`.
        sequences: prompt and new tokens [batch longer]. lengthen: as of `Prompted`.

    Example:
        >>> found = model.generate(**inputs, return_dict_in_generate=True)  # doctest: +SKIP
        >>> recomputed(model, inputs, dropped, 2, found.sequences)  # doctest: +SKIP
    """
    prompt, logits = inputs["input_ids"].shape[1], []
    for length in range(prompt, sequences.shape[1]):
        longer = lengthen(inputs, sequences[:, :length])
        drops = [dropped] if isinstance(dropped, Tensor) else dropped
        gone = [nn.functional.pad(each, (0, length - prompt)) for each in drops]
        with hidden(model, gone, [layer] if isinstance(layer, int) else layer):
            logits.append(model(**longer, use_cache=False).logits[:, -1])
    return torch.stack(logits)


class Recording:
    """A compressor that remembers what it was shown and what it answered.

    Example:
        >>> from tokencurric import Uniform, VisualView
        >>> recording = Recording(Uniform())
        >>> view = VisualView(tokens=torch.zeros(1, 4, 2), positions=torch.tensor([[0, 1, 2, 3]]))
        >>> mask = recording(view, 2)
        >>> recording.dropped(1, 4).tolist()
        [[False, True, False, True]]
    """

    def __init__(self, inner: Compressor) -> None:
        self.inner = inner
        self.needs: frozenset[Signal] = inner.needs
        self.tags: Tags = inner.tags
        self.calls: list[tuple[VisualView, Tensor]] = []

    def __call__(self, view: VisualView, keep: Any, *, seed: int = 0) -> Tensor:
        """Answer as `inner` does."""
        mask = self.inner(view, keep, seed=seed)
        self.calls.append((view, mask))
        return mask

    def dropped(self, batch: int, length: int) -> Tensor:
        """The dropped positions of the last call on the full sequence, [batch length]."""
        return self.drops(batch, length, 1)[0]

    def drops(self, batch: int, length: int, cuts: int) -> list[Tensor]:
        """What is gone after each of the last `cuts` calls, those before it among it, [batch length] each."""
        found: list[Tensor] = []
        for view, mask in self.calls[-cuts:]:
            positions = view.positions
            assert positions is not None
            dropped = torch.zeros(batch, length, dtype=torch.bool, device=mask.device)
            rows = torch.arange(batch, device=mask.device)[:, None].expand_as(mask)
            gone = view.mask & ~mask
            dropped[rows[gone], positions[gone]] = True
            found.append(dropped | found[-1] if found else dropped)
        return found


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest of what is compared with.

    Example:
        >>> apart(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
        0.25
    """
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=torch.finfo(theirs.dtype).tiny))


def fingerprint(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Types, attributes, hooks and settings of every module; where its tensors lie, and how often they were written to.

    Example:
        >>> before = fingerprint(torch.nn.Linear(2, 2))
        >>> list(before)
        ['']
    """
    return {name: _of_module(module) for name, module in model.named_modules()}


def _of_module(module: nn.Module) -> tuple[Any, ...]:
    config = getattr(module, "config", None)
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return (
        type(module),
        sorted(vars(module)),
        {hooks: len(getattr(module, hooks)) for hooks in _HOOKS},
        None
        if config is None
        else (id(config), sorted(vars(config)), str(config), getattr(config, "_attn_implementation", None)),
        module.training,
        [(name, tensor.data_ptr(), tensor._version) for name, tensor in tensors],
    )
