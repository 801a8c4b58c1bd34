"""Finding the parts of a transformers model that compression works on, by structure and not by class."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from tokencurric.errors import UnsupportedModelError

_VISUAL_IDS = {"image": ("image_token_id", "image_token_index"), "video": ("video_token_id", "video_token_index")}
_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_SUPPORTED = (
    "Supported are transformers models whose decoder is a list of self-attention layers fed by one sequence of text "
    "and visual tokens, such as LlavaForConditionalGeneration."
)


@dataclass(frozen=True, eq=False)
class ModelParts:
    """The modules of a multimodal model that hooks are put on or that are called.

    Args:
        base: the model itself, without wrappers.
        roots: modules that may be called with `input_ids`, outermost first; `base` is among them.
        decoder: the module that owns the layers. layers: its decoder layers. norm: its final norm.
        head: hidden states to logits; None if there is none.
        visual_kinds: token ids that stand for visual tokens, of an "image" and of a "video".
    """

    base: Any
    roots: tuple[nn.Module, ...]
    decoder: Any
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Module | None
    visual_kinds: Mapping[str, tuple[int, ...]]

    @property
    def visual_ids(self) -> tuple[int, ...]:
        """Token ids that stand for visual tokens.

        Raises:
            UnsupportedModelError: the config names none. Only a caller who does not give a visual mask needs them.
        """
        if not any(self.visual_kinds.values()):
            looked = ", ".join(name for fields in _VISUAL_IDS.values() for name in fields)
            raise UnsupportedModelError(
                f"{type(self.base).__name__} names no visual token in its config (looked for {looked}).\nHint: pass "
                "visual_mask, True at visual tokens: to compress(...), or to EPIC in the batch."
            )
        return tuple(sorted({number for ids in self.visual_kinds.values() for number in ids}))

    @cached_property
    def norm_inside(self) -> bool:
        """Whether the final norm is a module of the decoder."""
        return any(module is self.norm for module in self.decoder.modules())

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)


def find_parts(model: nn.Module) -> ModelParts:
    """The parts of `model`, which may be wrapped by DDP, DeepSpeed, torch.compile, PEFT or FSDP2.

    Raises:
        UnsupportedModelError: names the model, what it lacks or has too much, and what is supported.

    Example:
        >>> find_parts(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        ...
        tokencurric.errors.UnsupportedModelError: Linear has no decoder layers to drop tokens in: ...
    """
    outer = unwrap(model)
    base = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    name = type(base).__name__
    decoder = _find_decoder(base, name)
    _refuse_unusual(base, decoder, name)
    layers, norm = decoder.layers, getattr(decoder, "norm", None)
    if not isinstance(norm, nn.Module):
        raise UnsupportedModelError(f"{name} has no final norm beside its decoder layers. {_SUPPORTED}")
    config = base.config
    kinds = {
        kind: tuple(sorted({value for each in fields if isinstance(value := getattr(config, each, None), int)}))
        for kind, fields in _VISUAL_IDS.items()
    }
    inner = getattr(base, "model", None)
    roots = tuple(
        dict.fromkeys((outer, base, *([inner] if isinstance(inner, nn.Module) and inner is not decoder else [])))
    )
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return ModelParts(base, roots, decoder, layers, norm, head, kinds)


def unwrap(model: nn.Module) -> Any:
    """Without DDP, DeepSpeed and torch.compile, which call what they wrap: hooks on the inner module still run.

    Raises:
        UnsupportedModelError: FSDP1 is around it.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> unwrap(torch.compile(layer)) is layer
        True
    """
    while True:
        if isinstance(model, FullyShardedDataParallel):
            raise UnsupportedModelError(
                "FullyShardedDataParallel (FSDP1) hides the layers from hooks and flattens their parameters. "
                "Use FSDP2 (fully_shard), DDP or DeepSpeed ZeRO."
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif _is_deepspeed(model):
            model = model.module  # type: ignore[assignment]
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _is_deepspeed(model: nn.Module) -> bool:
    """Whether DeepSpeed's engine is around a model, without an import of deepspeed."""
    kinds = [kind for kind in type(model).__mro__ if kind.__module__.partition(".")[0] == "deepspeed"]
    return any(kind.__name__ == "DeepSpeedEngine" for kind in kinds)


def _find_decoder(base: Any, name: str) -> Any:
    module, seen = base, set()
    while not isinstance(getattr(module, "layers", None), nn.ModuleList):
        seen.add(id(module))
        below = module.get_decoder() if hasattr(module, "get_decoder") else None
        if below is None or id(below) in seen:
            below = getattr(module, "model", None)
        if not isinstance(below, nn.Module) or id(below) in seen:
            raise UnsupportedModelError(f"{name} has no decoder layers to drop tokens in: {_SUPPORTED}")
        module = below
    return module


def _refuse_unusual(base: Any, decoder: Any, name: str) -> None:
    text = decoder.config
    kinds = set(getattr(text, "layer_types", None) or ()) - _ATTENTION
    reasons = {
        "it is an encoder-decoder": bool(getattr(base.config, "is_encoder_decoder", False)),
        "its layers read vision by cross-attention": bool(getattr(text, "cross_attention_layers", None)),
        "its upper layers share keys and values of lower ones": bool(getattr(text, "num_kv_shared_layers", 0)),
        f"it has layers of kind {', '.join(sorted(kinds))}": bool(kinds),
        "a decoder layer has no self_attn": not all(
            hasattr(inner_layer(layer), "self_attn") for layer in decoder.layers
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedModelError(
                f"{name} cannot run on fewer tokens from a layer on: {reason}. Dropping tokens there would change "
                f"more than the tokens dropped. {_SUPPORTED}"
            )


def inner_layer(layer: nn.Module) -> nn.Module:
    """The layer below torch's activation-checkpointing wrapper and below torch.compile.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> inner_layer(layer) is layer
        True
    """
    for name in ("_orig_mod", "_checkpoint_wrapped_module", "_orig_mod"):
        inner = layer._modules.get(name)  # an attribute that is missing takes long to be missed
        layer = layer if inner is None else inner
    return layer


def attention_of(layer: nn.Module) -> Any:
    """The self-attention module of a decoder layer.

    Example:
        >>> layer = torch.nn.Module()
        >>> layer.self_attn = torch.nn.Identity()
        >>> attention_of(layer) is layer.self_attn
        True
    """
    return inner_layer(layer).self_attn


def is_visual(input_ids: Tensor, visual_ids: tuple[int, ...]) -> Tensor:
    """Mask of the positions that hold visual tokens.

    Example:
        >>> is_visual(torch.tensor([[1, 32000, 2]]), (32000,)).tolist()
        [[False, True, False]]
    """
    found = torch.zeros_like(input_ids, dtype=torch.bool)
    for each in visual_ids:  # a table of them would have to go to the device in every step
        found |= input_ids == each
    return found
