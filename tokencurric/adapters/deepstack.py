"""Qwen3-VL and its kin add visual features to the hidden states between their first layers (DeepStack).

Their decoder does so itself, at full length. Here the features are taken from its arguments and added on the way into
the next layer, to as many tokens as that layer has.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from tokencurric.errors import UnsupportedModelError
from tokencurric.selection import Selection

_MASK, _FEATURES = "visual_pos_masks", "deepstack_visual_embeds"

# Arguments of a decoder whose meaning for its layers is known, or that have nothing for each token.
KNOWN = frozenset(
    {
        *("self", "args", "kwargs", _MASK, _FEATURES),
        *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position"),
        *("past_key_values", "cache", "use_cache", "output_attentions", "output_hidden_states", "return_dict"),
        *("logits_to_keep", "labels", "pixel_values", "pixel_values_videos", "image_sizes", "mm_encoder_outputs"),
    }
)


@dataclass(frozen=True, eq=False)
class Deepstack:
    """Features to add.

    Args:
        visual: where, on the full sequence. features: what, by the layer whose input it is added to.
    """

    visual: Bool[Tensor, "batch seq"]
    features: Mapping[int, Float[Tensor, "visual dim"]]

    def add(
        self, layer: int, hidden: Float[Tensor, "batch slots dim"], selection: Selection | None
    ) -> Float[Tensor, "batch slots dim"]:
        """The input of `layer` with its features.

        Args:
            layer: its number. hidden: without them. selection: the slots of `hidden`; None means the full sequence.

        Example:
            >>> import torch
            >>> deepstack = Deepstack(torch.tensor([[False, True]]), {1: torch.ones(1, 2)})
            >>> deepstack.add(1, torch.zeros(1, 2, 2), None).tolist()
            [[[0.0, 0.0], [1.0, 1.0]]]
        """
        if layer not in self.features:
            return hidden
        visual, feature = self.visual.to(hidden.device), self.features[layer].to(hidden)
        full = hidden.new_zeros(*visual.shape, hidden.shape[-1]).masked_scatter(visual[..., None], feature)
        return hidden + (full if selection is None else selection.gather(full))

    def above(self, layer: int) -> "Deepstack":
        """What is still to be added to hidden states that are ready to enter `layer`."""
        return replace(self, features={number: each for number, each in self.features.items() if number > layer})


def take_over(decoder: Any, kwargs: dict[str, Any], depth: int) -> tuple[dict[str, Any], Deepstack | None]:
    """The decoder's arguments without features that it would add itself, and those.

    Raises:
        UnsupportedModelError: the decoder has another argument that is aligned with the sequence.
    """
    visual, features = kwargs.get(_MASK), kwargs.get(_FEATURES)
    _refuse_unknown(decoder, kwargs)
    if visual is None or features is None or len(features) == 0:
        return kwargs, None
    if len(features) >= depth:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} adds visual features after {len(features)} of its {depth} layers, the last "
            "among them. Here they are added on the way into the next layer, and the last has none. Models that stop "
            "adding before it are supported."
        )
    return {**kwargs, _FEATURES: None}, Deepstack(visual, {number + 1: each for number, each in enumerate(features)})


def _refuse_unknown(decoder: Any, kwargs: dict[str, Any]) -> None:
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        return
    for name in inspect.signature(decoder.forward).parameters.keys() - KNOWN:
        value = kwargs.get(name)
        if isinstance(value, Tensor) and value.shape[:2] == embeds.shape[:2]:
            raise UnsupportedModelError(
                f"{type(decoder).__name__} takes {name} of shape {tuple(value.shape)}, which looks aligned with the "
                f"sequence of {embeds.shape[1]} tokens. What it does with it between its layers is not known, and they "
                "may have fewer tokens. Models whose decoder takes only masks, positions and a cache are supported."
            )
