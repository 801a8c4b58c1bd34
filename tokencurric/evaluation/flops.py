"""Multiply-adds of a prefill, in closed form and counted while it runs.

Both are true figures of what is executed: layers below the cut run on every token. Papers' figures differ where they
take the kept count for all layers; `prefill_flops(..., layer=0)` gives those.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokencurric.adapters import find_parts
from tokencurric.adapters.discovery import attention_of
from tokencurric.errors import UnsupportedModelError
from tokencurric.evaluation.tokens import PromptShape, tokens_per_layer


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a prefill, two for each multiply-add.

    Args:
        layers: of each decoder layer. tower: of the vision tower. projector: of what maps its features to the
            decoder. head: of the logits. other: counted outside of all these; 0 in the closed form.

    Example:
        >>> Flops(layers=(4, 2), tower=3, projector=1, head=1).total
        11
    """

    layers: tuple[int, ...]
    tower: int
    projector: int
    head: int
    other: int = 0

    @property
    def decoder(self) -> int:
        """All decoder layers."""
        return sum(self.layers)

    @property
    def total(self) -> int:
        """Everything."""
        return self.decoder + self.tower + self.projector + self.head + self.other


def prefill_flops(
    model: Any,
    shape: PromptShape,
    *,
    keep: int | Sequence[int],
    layer: int | Sequence[int],
    images: int = 1,
    batch: int = 1,
) -> Flops:
    """FLOPs of a prompt up to its last logits, in closed form.

    A layer on n tokens takes 2n·(weights of its linear maps) + 4n²·heads·(head width). The n² is the whole square, as
    kernels are counted, though a causal kernel may skip half of it. Norms and activations are not counted.

    Args:
        model: a model with dense decoder layers and a CLIP-like tower. Its weights are not touched, so it may live on
            the meta device. shape: of one prompt. keep, layer: as for `tokens_per_layer`.
        images: pictures a row. batch: rows.

    Raises:
        UnsupportedModelError: the tower is not one whose operations this formula knows.
        RangeError: the cuts make no sense.

    Example:
        >>> prefill_flops(llava_7b, PromptShape(576, 40), keep=64, layer=2).decoder / 1e12  # doctest: +SKIP
        1.7
    """
    parts = find_parts(model)
    visual = tokens_per_layer(parts.depth, shape.visual, keep=keep, layer=layer)
    layers = tuple(
        batch * _block(module, shape.text + count, _heads_width(attention_of(module)))
        for module, count in zip(parts.layers, visual, strict=True)
    )
    tower, projector = _vision_modules(parts.base)
    head = parts.base.get_output_embeddings()
    return Flops(
        layers=layers,
        tower=batch * images * _tower(tower),
        projector=batch * shape.visual * 2 * _weights(projector),
        head=batch * 2 * _weights(head),
    )


def count_flops(model: Any, inputs: Mapping[str, Any]) -> Flops:
    """FLOPs of a real prefill, counted operation by operation. Open `compress` around it to count a compressed one.

    What a compressor computes to choose is counted in the layer where it happens, so FastV and DART come out a little
    above the closed form, which leaves the choice out. Products of quantised activations are not counted; the closed
    form has them.

    Args:
        model: a model that can be compressed. inputs: what it is called with; logits of the last position are made.

    Raises:
        UnsupportedModelError: the model's parts are not found.

    Example:
        >>> with compress(model, Uniform(), keep=64):  # doctest: +SKIP
        ...     count_flops(model, inputs).decoder == prefill_flops(model, shape, keep=64, layer=2).decoder
        True

    Source: torch's FlopCounterMode, which knows no count for attention on a CPU; it is given one here.
    """
    parts = find_parts(model)
    tower, projector = _vision_modules(parts.base)
    names = {module: name for name, module in parts.base.named_modules()}
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with torch.no_grad(), counter:
        parts.base(**inputs, use_cache=False, logits_to_keep=1)
    found = counter.get_flop_counts()

    def of(module: nn.Module) -> int:
        return sum(found.get(f"{type(parts.base).__name__}.{names[module]}", {}).values())

    layers = tuple(of(module) for module in parts.layers)
    known = (of(tower), of(projector), of(parts.base.get_output_embeddings()))
    return Flops(layers, *known, other=counter.get_total_flops() - sum(layers) - sum(known))


def _attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *args: Any, **kwargs: Any
) -> int:
    """Of softmax(q·kᵀ)·v, from the shapes [batch heads seq width]."""
    scores = math.prod(query[:-1]) * key[-2]
    return 2 * scores * (query[-1] + value[-1])


_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def _block(module: nn.Module, tokens: int, width: int) -> int:
    """Linear maps of a transformer layer on each token, and attention between all of them."""
    return 2 * tokens * _weights(module) + 4 * tokens**2 * width


def _weights(module: nn.Module) -> int:
    """Weights of all linear maps, biases left out: a multiply-add each a token."""
    return sum(each.in_features * each.out_features for each in module.modules() if isinstance(each, nn.Linear))


def _heads_width(attention: Any) -> int:
    heads = getattr(attention, "num_heads", None) or attention.config.num_attention_heads
    return int(heads * attention.head_dim)


def _vision_modules(base: Any) -> tuple[Any, Any]:
    inner = getattr(base, "model", base)
    tower, projector = getattr(inner, "vision_tower", None), getattr(inner, "multi_modal_projector", None)
    if tower is None or projector is None:
        raise UnsupportedModelError(
            f"FLOPs of a {type(base).__name__} cannot be told apart: it has no vision_tower and multi_modal_projector. "
            "The formula is for models built as LLaVA is. Count the whole with torch's FlopCounterMode instead."
        )
    return tower, projector


def _tower(tower: Any) -> int:
    """One picture through a vision transformer with patches cut by a convolution."""
    embeddings, layers = getattr(tower, "embeddings", None), getattr(getattr(tower, "encoder", None), "layers", None)
    patcher = getattr(embeddings, "patch_embedding", None)
    if not isinstance(patcher, nn.Conv2d) or not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(
            f"The closed form does not know the operations of a {type(tower).__name__}. It knows CLIP-like towers: "
            "encoder.layers behind a convolution that cuts patches. Use count_flops."
        )
    config = tower.config
    patches = (config.image_size // config.patch_size) ** 2
    tokens = patches + (getattr(embeddings, "class_embedding", None) is not None)
    cut = 2 * patches * patcher.weight.numel()
    return int(cut) + sum(_block(layer, tokens, config.hidden_size) for layer in layers)
