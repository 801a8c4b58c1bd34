"""What is refused when compression is attached, before any forward."""

import pytest
import torch
import transformers as hf
from torch import nn

from tests.adapters.tiny import RAGGED, tiny_batch, tiny_llava
from tests.adapters.zoo import FAMILIES, HALVES, IMAGE, ROPE, SIGLIP, TEXT, VOCAB
from tokencurric import DART, EPIC, FastV, Uniform, compress, tcd
from tokencurric.adapters.discovery import find_parts
from tokencurric.adapters.door import refuse_at_the_door
from tokencurric.errors import UnsupportedModelError


def on_meta(config):
    with torch.device("meta"):
        return hf.AutoModelForImageTextToText.from_config(config)


def gemma4(width):
    text = {
        **TEXT,
        "model_type": "gemma4_text",
        "hidden_size_per_layer_input": width,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 0,
        "layer_types": HALVES,
    }
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return on_meta(hf.Gemma4Config(text_config=text, vision_config=tower, image_token_id=IMAGE))


def ernie():
    experts = {"moe_num_experts": 4, "moe_intermediate_size": [16, 16], "moe_k": 2}
    text = {**TEXT, **experts, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}
    tower = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    config = hf.Ernie4_5_VLMoeConfig(text_config=text, vision_config=tower, image_token_id=IMAGE)
    return hf.AutoModelForImageTextToText.from_config(config)


def granite4():
    config = hf.Granite4VisionConfig(
        text_config={**TEXT, "model_type": "granite4_vision_text"},
        vision_config={**SIGLIP, "hidden_size": 64},
        deepstack_layer_map=[[0, 0]],
        use_spatial_sampling=False,
        downsample_rate="1/2",
        image_token_index=IMAGE,
    )
    return on_meta(config)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: gemma4(8), "Gemma4ForConditionalGeneration hands per_layer_inputs to its decoder, Gemma4TextModel"),
        (lambda: gemma4(0), "Gemma4ForConditionalGeneration hands per_layer_inputs"),  # its layers take two in place
        (ernie, "Ernie4_5_VLMoeForConditionalGeneration hands moe_mm_token_type_ids to its decoder"),
        (granite4, "Granite4VisionForConditionalGeneration hands deepstack_features to its decoder"),
    ],
)
def test_decoders_that_are_handed_something_unknown(make, text):
    model = make()
    with pytest.raises(UnsupportedModelError, match=text), compress(model, Uniform(), keep=4):
        pass
    with pytest.raises(UnsupportedModelError, match=text):
        EPIC(Uniform(), tcd()).attach(model)
    with pytest.raises(UnsupportedModelError, match=text):
        EPIC(Uniform(), tcd()).preflight(model, total=10)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_work_come_in(family):
    with torch.device("cpu" if family == "llama4" else "meta"):
        model = hf.AutoModelForImageTextToText.from_config(FAMILIES[family]())
    refuse_at_the_door(find_parts(model))


class Decoder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.layers, self.norm, self.config = inner.layers, inner.norm, inner.config

    def forward(self, inputs_embeds=None, attention_mask=None, head_mask=None, gates=None, **kwargs):
        raise NotImplementedError


class Around(nn.Module):
    def __init__(self, model, inner):
        super().__init__()
        self.model, self.config = inner, model.config


class Passing(Around):
    def forward(self, input_ids, **kwargs):
        return self.model(inputs_embeds=input_ids, gates=input_ids > 3, **kwargs)


class Silent(Around):
    def forward(self, input_ids, **kwargs):
        return self.model(inputs_embeds=input_ids, **kwargs)


def test_only_what_the_model_hands_over_is_refused():
    model = tiny_llava()
    inner = Decoder(model.get_decoder())
    refuse_at_the_door(find_parts(Silent(model, inner)))  # `head_mask` and `gates` are set by nobody
    with pytest.raises(UnsupportedModelError, match="Passing hands gates to its decoder, Decoder; what"):
        refuse_at_the_door(find_parts(Passing(model, inner)))


# flex_attention


@pytest.mark.parametrize("compressor", [Uniform(), FastV()])
def test_flex_attention_is_refused_by_name(compressor):
    model = tiny_llava()
    model.get_decoder().config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="runs flex_attention"), compress(model, compressor, keep=4):
        pass
    with pytest.raises(UnsupportedModelError, match="runs flex_attention"):
        EPIC(compressor, tcd()).attach(model)


def test_flex_attention_chosen_later_is_refused_in_the_forward():
    model = tiny_llava()
    with compress(model, DART(), keep=4):
        model.get_decoder().config._attn_implementation = "flex_attention"
        with pytest.raises(UnsupportedModelError, match="runs flex_attention"):
            model(**tiny_batch(RAGGED))
