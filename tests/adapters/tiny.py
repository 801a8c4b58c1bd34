"""Small random models and batches to hold the adapters against."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE, VOCAB, PATCHES, DEPTH = 99, 100, 16, 6


def tiny_llava(*, attention="sdpa", depth=DEPTH, dtype=torch.float32, seed=0, **text):
    """A LLaVA of random weights, large enough in scale that every token matters."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=24,
            patch_size=6,
        ),
        text_config=LlamaConfig(**{**settings, **text}),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(0, 1.0)
            elif parameter.ndim >= 2:
                parameter.normal_(0, 1.0 / parameter.shape[-1] ** 0.5)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    batch = tiny_batch(ONE)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    with torch.no_grad():
        model(**batch)  # transformers notes things at a module's first call, which compression did not do
    return model


# Rows as (text, pictures, text, ...): counts of text tokens and "I" for a picture.
ONE = ((3, "I", 5),)
EVEN = ((3, "I", 5), (3, "I", 5))
RAGGED = ((3, "I", 5), (2, "I", 2, "I", 4), (6,))
LAYOUTS = {"one": ONE, "even": EVEN, "ragged": RAGGED}


def tiny_batch(rows=RAGGED, *, padding="left", seed=1, answers=0):
    """A batch as a processor makes it; with `answers`, labels on the last tokens of each row."""
    generator = torch.Generator().manual_seed(seed)
    sequences, pictures = [], 0
    for row in rows:
        ids = []
        for part in row:
            if part == "I":
                ids += [IMAGE] * PATCHES
                pictures += 1
            else:
                ids += torch.randint(5, 90, (part,), generator=generator).tolist()
        sequences.append(ids)
    width = max(map(len, sequences))

    def pad(ids, value):
        filler = [value] * (width - len(ids))
        return filler + ids if padding == "left" else ids + filler

    batch = {
        "input_ids": torch.tensor([pad(ids, 0) for ids in sequences]),
        "attention_mask": torch.tensor([pad([1] * len(ids), 0) for ids in sequences]),
    }
    if pictures:
        batch["pixel_values"] = torch.randn(pictures, 3, 24, 24, generator=generator)
    if answers:
        batch["labels"] = torch.tensor([pad([-100] * (len(ids) - answers) + ids[-answers:], -100) for ids in sequences])
    return batch
