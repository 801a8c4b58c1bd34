"""The tiny LLaVA that the example starts from: tokenizer, processor and model, with random weights."""

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .data import COLORS, NUMBERS, PLACES, SHAPES, TILE

PATCH = 6
IMAGE_TOKENS = (3 * TILE // PATCH) ** 2
MAX_LENGTH = 512
TOWER_WIDTH = 64

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set items = [{'type': 'text', 'text': message['content']}] -%}
{%- else -%}
{%- set items = message['content'] -%}
{%- endif -%}
{{- 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{%- for item in items if item['type'] == 'text' -%}{{- item['text'] -}}{%- endfor -%}
{{- eos_token -}}
{%- endgeneration -%}
{%- else -%}
{%- for item in items -%}
{{- '<image>\n' if item['type'] == 'image' else item['text'] -}}
{%- endfor -%}
{{- ' ' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
"""LLaVA-1.5's conversation without system sentence; answers and their end tokens are marked as generated."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: everything that the questions, answers and captions can say."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    lines = ["bottom", "column", "left", "middle", "right", "row", "top"]
    things = [*COLORS, *SHAPES, *(f"{shape}s" for shape in SHAPES), "shape", "shapes"]
    asking = ["What", "How", "Is", "Describe", "color", "there", "many", "are", "is", "a", "at", "in", "the", "picture"]
    speech = ["USER:", "ASSISTANT:", *asking, "?", ".", ",", "yes", "no"]
    words = dict.fromkeys([*special, *speech, *things, *PLACES, *lines, *NUMBERS])
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?.,]"), behavior="isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """A processor that makes 144 image tokens of one picture."""
    side = 3 * TILE
    pictures = CLIPImageProcessorPil(
        size={"height": side, "width": side},
        crop_size={"height": side, "width": side},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlavaForConditionalGeneration:
    """CLIP tower, two-layer projector and Llama decoder, freshly drawn."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=3 * TILE,
        patch_size=PATCH,
        projection_dim=TOWER_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.vocab["<image>"],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)
