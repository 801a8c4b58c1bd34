"""Small random models of every family that the adapters are held against, built from configs, and batches for them."""

import torch
import transformers as hf

VOCAB, WIDTH, DEPTH = 160, 32, 6
IMAGE, VIDEO, BEGIN, END = 150, 151, 148, 149

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {**TOWER, "model_type": "clip_vision_model", "image_size": 24, "patch_size": 6, "projection_dim": 16}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False}
LARGER = {**TOWER, "image_size": 32, "patch_size": 4}
QWEN = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
HALVES = ["sliding_attention", "full_attention"] * (DEPTH // 2)
INDEX = {"image_token_index": IMAGE}
BOTH_INDICES = {"image_token_index": IMAGE, "video_token_index": VIDEO}
BOTH_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
BORDERS = {"vision_start_token_id": BEGIN, "vision_end_token_id": END}


def text(model_type, **more):
    return {**TEXT, "model_type": model_type, **more}


def gemma3(layer_types):
    return hf.Gemma3Config(
        vision_config={**SIGLIP, "image_size": 32, "patch_size": 4},
        text_config=text("gemma3_text", sliding_window=12, layer_types=layer_types, query_pre_attn_scalar=8),
        mm_tokens_per_image=16,
        boi_token_index=BEGIN,
        eoi_token_index=END,
        **INDEX,
    )


def llava(backbone, **more):
    return hf.LlavaConfig(vision_config=CLIP, text_config=text(backbone, **more), image_seq_length=16, **INDEX)


# Family -> its config. What looks arbitrary is the smallest that the class accepts.
FAMILIES = {
    "llava": lambda: llava("llama"),
    "llava-qwen2": lambda: llava("qwen2"),
    "llava-qwen3": lambda: llava("qwen3"),
    "llava-mistral-sliding": lambda: llava("mistral", sliding_window=12),
    "vipllava": lambda: hf.VipLlavaConfig(
        vision_config=CLIP, text_config=text("llama"), vision_feature_layers=[-1, -2], image_seq_length=16, **INDEX
    ),
    "llava_next": lambda: hf.LlavaNextConfig(
        vision_config=CLIP, text_config=text("mistral"), image_grid_pinpoints=[[24, 24]], image_seq_length=16, **INDEX
    ),
    "llava_next_video": lambda: hf.LlavaNextVideoConfig(
        vision_config=CLIP,
        text_config=text("llama"),
        image_grid_pinpoints=[[24, 24]],
        image_seq_length=16,
        **BOTH_INDICES,
    ),
    "video_llava": lambda: hf.VideoLlavaConfig(
        vision_config=CLIP, text_config=text("llama"), image_seq_length=17, **BOTH_INDICES
    ),
    "llava_onevision": lambda: hf.LlavaOnevisionConfig(
        vision_config=SIGLIP, text_config=text("qwen2"), image_grid_pinpoints=[[24, 24]], **BOTH_INDICES
    ),
    "internvl": lambda: hf.InternVLConfig(
        vision_config={**TOWER, "image_size": [32, 32], "patch_size": [4, 4]},
        text_config=text("qwen2"),
        image_token_id=IMAGE,
        image_seq_length=16,
        downsample_ratio=0.5,
    ),
    "idefics3": lambda: hf.Idefics3Config(
        vision_config=LARGER, text_config=text("llama"), image_token_id=IMAGE, scale_factor=2
    ),
    "smolvlm": lambda: hf.SmolVLMConfig(
        vision_config=LARGER, text_config=text("llama"), image_token_id=IMAGE, scale_factor=2
    ),
    "gemma3": lambda: gemma3(HALVES),
    "gemma3-five-to-one": lambda: gemma3(["sliding_attention"] * (DEPTH - 1) + ["full_attention"]),
    "paligemma": lambda: hf.PaliGemmaConfig(
        vision_config=SIGLIP,
        text_config=text("gemma"),
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        vocab_size=VOCAB,
        **INDEX,
    ),
    "mistral3": lambda: hf.Mistral3Config(
        vision_config={**LARGER, "model_type": "pixtral"},
        text_config=text("mistral"),
        spatial_merge_size=2,
        **INDEX,
    ),
    "aya_vision": lambda: hf.AyaVisionConfig(
        vision_config={**SIGLIP, "image_size": 32, "patch_size": 4},
        text_config=text("cohere2", sliding_window=12, layer_types=HALVES),
        downsample_factor=2,
        **INDEX,
    ),
    "ovis2": lambda: hf.Ovis2Config(
        vision_config={**LARGER, "vocab_size": 20, "hidden_stride": 2},
        text_config=text("qwen2"),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[141, 142, 143, 144, 145],
        vocab_size=VOCAB,
        hidden_size=WIDTH,
    ),
    "qwen2_vl": lambda: hf.Qwen2VLConfig(
        vision_config={
            **{name: QWEN[name] for name in QWEN if name not in ("hidden_size", "intermediate_size")},
            "embed_dim": 16,
            "hidden_size": WIDTH,
            "mlp_ratio": 1,
        },
        text_config=text("qwen2_vl_text", rope_parameters=ROPE),
        **BOTH_IDS,
        **BORDERS,
    ),
    "qwen2_5_vl": lambda: hf.Qwen2_5_VLConfig(
        vision_config={**QWEN, "out_hidden_size": WIDTH, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config=text("qwen2_5_vl_text", rope_parameters=ROPE),
        **BOTH_IDS,
        **BORDERS,
    ),
    "qwen3_vl": lambda: hf.Qwen3VLConfig(
        vision_config={
            **QWEN,
            "depth": 3,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        text_config=text("qwen3_vl_text", rope_parameters=ROPE),
        **BOTH_IDS,
        **BORDERS,
    ),
    "glm4v": lambda: hf.Glm4vConfig(
        vision_config={**QWEN, "image_size": 32, "out_hidden_size": WIDTH},
        text_config=text("glm4v_text", rope_parameters={**ROPE, "partial_rotary_factor": 1.0}),
        image_start_token_id=BEGIN,
        image_end_token_id=END,
        video_start_token_id=146,
        video_end_token_id=147,
        **BOTH_IDS,
    ),
    "llama4": lambda: hf.Llama4Config(
        vision_config={
            **LARGER,
            "intermediate_size": 64,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        text_config=text(
            "llama4_text",
            intermediate_size_mlp=48,
            num_local_experts=2,
            attention_chunk_size=16,
            no_rope_layers=[1, 1, 1, 0, 1, 1],
        ),
        boi_token_index=BEGIN,
        eoi_token_index=END,
        **INDEX,
    ),
}
GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")  # positions by picture and place: pixels come as patches
NESTED = ("idefics3", "smolvlm")  # pixels come as [batch pictures ...]
TILED = ("llava_next", "llava_next_video", "llava_onevision")


def tiny_model(family, *, attention="sdpa", dtype=torch.float32, seed=0):
    """A model of random weights, large enough in scale that every token matters."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    return scaled(hf.AutoModelForImageTextToText.from_config(config, attn_implementation=attention, dtype=dtype).eval())


def scaled(model):
    """`model` with weights so large that every token matters, and a `generate` that does not end early."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(0, 1.0)
            elif parameter.ndim >= 2:
                parameter.normal_(0, 1.0 / parameter.shape[-1] ** 0.5)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def tokens_of_a_picture(family):
    """Visual tokens that a family makes of one picture here."""
    return 36 if family in TILED else 16


ONE = ((3, "I", 5),)
RAGGED = ((3, "I", 5), (2, "I", 2, "I", 4))
LAYOUTS = {"one": ONE, "ragged": RAGGED}


def tiny_inputs(family, rows=RAGGED, *, padding="left", seed=1):
    """A batch as the family's processor makes it."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for row in rows:
        ids = []
        for part in row:
            if part == "I":
                ids += [BEGIN, *[IMAGE] * tokens_of_a_picture(family), END]
            else:
                ids += torch.randint(5, 140, (part,), generator=generator).tolist()
        sequences.append(ids)
    width = max(map(len, sequences))

    def pad(ids):
        filler = [0] * (width - len(ids))
        return filler + ids if padding == "left" else ids + filler

    ids = torch.tensor([pad(ids) for ids in sequences])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([pad([1] * len(ids)) for ids in sequences])}
    inputs |= _pixels(family, [row.count("I") for row in rows], generator)
    if family in GRIDS:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    if family.startswith("gemma3"):
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if family == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(ids)  # all of it is prompt, which attends both ways
    return inputs


def _pixels(family, pictures, generator):
    total = sum(pictures)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    if family in GRIDS:
        return {"pixel_values": noise(total * 64, 96), "image_grid_thw": torch.tensor([[1, 8, 8]] * total)}
    if family in TILED:
        return {"pixel_values": noise(total, 2, 3, 24, 24), "image_sizes": torch.tensor([[24, 24]] * total)}
    if family == "video_llava":
        return {"pixel_values_images": noise(total, 3, 24, 24)}
    if family in NESTED:
        pixels = torch.zeros(len(pictures), max(pictures), 3, 32, 32)
        for row, count in enumerate(pictures):
            pixels[row, :count] = noise(count, 3, 32, 32)
        return {"pixel_values": pixels}
    clip = family.startswith(("llava", "vipllava", "paligemma"))
    pixels = {"pixel_values": noise(total, 3, *[24 if clip else 32] * 2)}
    return pixels | ({"image_sizes": torch.tensor([[32, 32]] * total)} if family == "mistral3" else {})


# Families that take videos apart from pictures, and the visual tokens of one video here: two steps of time, or four
# frames, or eight.
VIDEOS = {
    "llava_next_video": 16,
    "video_llava": 136,
    "llava_onevision": 17,
    "qwen2_vl": 32,
    "qwen2_5_vl": 32,
    "qwen3_vl": 32,
}


def tiny_videos(family, *, seed=1):
    """A batch of two rows, each with a video and the first with more text."""
    generator, tokens = torch.Generator().manual_seed(seed), VIDEOS[family]
    steps = 2 if family == "qwen3_vl" else 1  # which marks each step of time by itself
    film = [BEGIN, *[VIDEO] * (tokens // steps), END] * steps
    before, after = (torch.randint(5, 140, (8,), generator=generator).tolist() for _ in range(2))
    sequences = [[*before, *film, *after], [*after[:2], *film, *before[:5]]]
    width = len(sequences[0])
    ids = torch.tensor([[0] * (width - len(row)) + row for row in sequences])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    if family in GRIDS:
        inputs["pixel_values_videos"] = torch.randn(2 * 128, 96, generator=generator)
        inputs["video_grid_thw"] = torch.tensor([[2, 8, 8]] * 2)
        inputs["mm_token_type_ids"] = (ids == VIDEO).int() * 2
    else:
        frames = 8 if family == "video_llava" else 4
        inputs["pixel_values_videos"] = torch.randn(2, frames, 3, 24, 24, generator=generator)
    return inputs
