"""What a class does after its output head: looked at by calling it, and refused by name unless it is nothing."""

from unittest import mock

import pytest
import torch
import transformers as hf
from torch import nn

from examples.custom_mllm import Adapter, HandwrittenMLLM
from tests.adapters.fingerprint import Unchanged
from tests.adapters.test_handwritten import batch_of_rows, with_labels
from tests.adapters.tiny import RAGGED, tiny_batch, tiny_llava
from tests.adapters.zoo import (
    CLIP,
    HALVES,
    IMAGE,
    INDEX,
    QWEN,
    SIGLIP,
    TEXT,
    VIDEO,
    VOCAB,
    WIDTH,
    llava,
    scaled,
    text,
    tiny_model,
)
from tokencurric import EPIC, Uniform, compress, tcd
from tokencurric.adapters.after_head import change, ramp, text_tokens
from tokencurric.adapters.discovery import find_parts
from tokencurric.curriculum import constant
from tokencurric.errors import StateError, UnsupportedModelError

PATCH = {"image_size": 32, "patch_size": 4}
KEPT = {"num_kv_shared_layers": 0, "layer_types": HALVES}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def paligemma(cap):
    return hf.PaliGemmaConfig(
        vision_config=SIGLIP,
        text_config=text("gemma2", final_logit_softcapping=cap, sliding_window=12),
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        vocab_size=VOCAB,
        **INDEX,
    )


def llava_next(backbone, **more):
    return hf.LlavaNextConfig(
        vision_config=CLIP,
        text_config=text(backbone, **more),
        image_grid_pinpoints=[[24, 24]],
        image_seq_length=16,
        **INDEX,
    )


def cohere2_vision():
    return hf.Cohere2VisionConfig(
        vision_config={**SIGLIP, **PATCH},
        text_config=text("cohere2", sliding_window=12, layer_types=HALVES),
        downsample_factor=2,
        alignment_intermediate_size=32,
        image_token_id=IMAGE,
    )


def gemma3(cap):
    small = text("gemma3_text", sliding_window=12, layer_types=HALVES, query_pre_attn_scalar=8)
    return hf.Gemma3Config(
        vision_config={**SIGLIP, **PATCH},
        text_config={**small, "final_logit_softcapping": cap},
        mm_tokens_per_image=16,
        **INDEX,
    )


def chameleon():
    codes = {f"IMGIMG{chr(65 + number)}Z": 100 + number for number in range(8)}
    tower = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "resolution": 32, "base_channels": 32}
    plain = {"channel_multiplier": [1], "num_res_blocks": 1, "attn_type": "none"}
    return hf.ChameleonConfig(**TEXT, vq_config=tower | plain, vocabulary_map={"<image>": IMAGE, **codes})


def granite_docling():
    tower = {**TOWER, "out_hidden_size": WIDTH, "num_heads": 2, "depth": 1}
    return hf.GraniteDoclingConfig(
        text_config={**TEXT, "logits_scaling": 4.0}, vision_config=tower, image_token_id=IMAGE
    )


def gemma4_unified():
    small = {**TEXT, **KEPT, "model_type": "gemma4_unified_text", "final_logit_softcapping": 2.0}
    return hf.Gemma4UnifiedConfig(text_config=small, vision_config=TOWER, image_token_id=IMAGE)


def hyperclovax():
    return hf.HyperCLOVAXVisionV2Config(
        text_config={**TEXT, "model_type": "hyperclovax", "logits_scaling": 4.0},
        vision_config={**QWEN, "model_type": "qwen2_5_vl_vision", "out_hidden_size": WIDTH},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def muse_glimmer():
    small = {**TEXT, "output_multiplier": 0.196, "final_logit_softcapping": 20.0}
    tower = {**TOWER, "layer_types": ["full_attention"]}
    return hf.MuseGlimmerConfig(text_config=small, vision_config=tower, image_token_id=IMAGE)


# Classes that leave logits alone, whatever fields their text configs have; and those that do not.
ALIKE = {
    "llava on gemma2": lambda: llava("gemma2", final_logit_softcapping=2.0, sliding_window=12),
    "llava on granite": lambda: llava("granite", logits_scaling=4.0),
    "llava on cohere2": lambda: llava("cohere2", logit_scale=0.25, sliding_window=12),
    "llava_next on granite": lambda: llava_next("granite", logits_scaling=4.0),
    "cohere2_vision": cohere2_vision,
    "gemma3 with a cap in its config": lambda: gemma3(2.0),
    "paligemma without a cap": lambda: paligemma(None),
}
CHANGED = {
    "paligemma": (lambda: paligemma(2.0), "PaliGemmaForConditionalGeneration, which caps logits at 2 after its"),
    "chameleon": (chameleon, "ChameleonForConditionalGeneration, which hides 8 of 160 columns after its"),
    "granite_docling": (granite_docling, "which multiplies logits by 0.25 after its output head"),
    "gemma4_unified": (gemma4_unified, "which caps logits at 2 after its output head"),
    "hyperclovax_vision_v2": (hyperclovax, "which multiplies logits by 4 after its output head"),
    "muse_glimmer": (muse_glimmer, "which caps logits at 20 after a factor of 0.196 after its output head"),
}


def built(config, dtype=torch.float32):
    torch.manual_seed(0)
    return scaled(hf.AutoModelForImageTextToText.from_config(config, dtype=dtype).eval())


def text_batch():
    ids = torch.arange(5, 17)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def loss_of(model):
    objective = EPIC(Uniform(), constant(0.5, layer=1))
    try:
        return objective.uncompressed(model, text_batch()).loss.detach()
    finally:
        objective.detach()


@pytest.mark.parametrize("name", ALIKE)
def test_classes_that_return_what_their_head_gives_come_in(name):
    model = built(ALIKE[name]())
    logits = model(**text_batch()).logits
    assert float(logits.detach().std()) > 0.1, "control: logits are no zeros"
    torch.testing.assert_close(loss_of(model), model(**text_batch()).loss.detach())


@pytest.mark.parametrize("name", CHANGED)
def test_classes_that_change_logits_are_refused_by_what_they_do(name):
    make, found = CHANGED[name]
    model = built(make())
    for use in (EPIC(Uniform(), tcd()).attach, lambda model: EPIC(Uniform(), tcd()).preflight(model, total=10)):
        with Unchanged(model), pytest.raises(UnsupportedModelError, match=found):
            use(model)
    with pytest.raises(UnsupportedModelError, match=found):
        EPIC(Uniform(), tcd(), teacher=model).attach(tiny_model("llava"))


@pytest.mark.parametrize("name", ["hyperclovax_vision_v2", "muse_glimmer", "paligemma"])
def test_control_let_in_they_would_have_another_loss(name):
    model = built(CHANGED[name][0]())
    with mock.patch("tokencurric.adapters.hugging_face.refuse_changed_logits"):
        ours = loss_of(model)
    assert not torch.allclose(ours, model(**text_batch()).loss.detach(), rtol=1e-2)


def test_control_let_in_chameleon_would_break():
    with mock.patch("tokencurric.adapters.hugging_face.refuse_changed_logits"), pytest.raises(IndexError):
        loss_of(built(chameleon()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    EPIC(Uniform(), tcd()).attach(built(llava("granite", logits_scaling=4.0), dtype))
    for name in ("paligemma", "chameleon", "hyperclovax_vision_v2"):
        make, found = CHANGED[name]
        with pytest.raises(UnsupportedModelError, match=found):
            EPIC(Uniform(), tcd()).attach(built(make(), dtype))


# The function that is found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [40, 1000, 150_000])
def test_what_was_done_is_named(dtype, vocabulary):
    given = ramp(torch.zeros(1, 2, vocabulary, dtype=dtype))
    hidden = given.clone()
    hidden[..., 3:7] = torch.finfo(dtype).min
    both = torch.where(hidden > torch.finfo(dtype).min, given / 4, hidden)[..., :-5]
    infinite = given.float().clone()
    infinite[..., 3:7] = float("-inf")
    for got, expected in (
        (given, None),
        (given.float(), None),
        (given.bfloat16(), None),  # mixed precision casts on the way out
        (given * 0.0625, "multiplies logits by 0.0625"),
        (given * 4, "multiplies logits by 4"),
        (30 * torch.tanh(given / 30), "caps logits at 30"),
        (500 * torch.tanh(given / 500), "caps logits at 500"),
        (20 * torch.tanh(0.25 * given / 20), "caps logits at 20 after a factor of 0.25"),
        (hidden, f"hides 4 of {vocabulary} columns"),
        (infinite, f"hides 4 of {vocabulary} columns"),
        (given[..., :-5], f"cuts off 5 of {vocabulary} columns"),
        (both, f"cuts off 5 of {vocabulary} columns and hides 4 of"),
        (torch.cat([given, given[..., :3]], -1), f"adds 3 of {vocabulary + 3} columns"),
        (given + 1, "changes logits by up to"),
        (given.flip(1), "multiplies logits by -1"),  # the other token's
        (given[:, :1], "returns logits of shape"),
    ):
        found = change(given, got)
        assert (found is None) == (expected is None), (found, expected)
        assert expected is None or found.startswith(expected), (found, expected)


def test_tokens_are_text():
    model = tiny_model("qwen2_vl")
    ids = text_tokens(find_parts(model)).tolist()[0]
    config = model.config
    special = {config.image_token_id, config.video_token_id, config.vision_start_token_id, 0, 1, 2}
    assert len(set(ids)) == 2
    assert not special & set(ids)
    assert max(ids) < VOCAB


# What it leaves behind: nothing


def test_the_look_leaves_no_trace():
    model = tiny_llava(attention_dropout=0.5).train()
    model.get_decoder().layers[2].eval()  # a mixture of modes
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
    with Unchanged(model):
        objective = EPIC(Uniform(), tcd())
        objective.attach(model)
        objective.detach()
    handle.remove()
    assert torch.equal(torch.rand(4), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(weight.grad is None for weight in model.parameters())
    (output,) = seen
    assert output.shape == (1, 2, 100)
    assert change(ramp(output), output) is not None, "somebody else's hook sees logits of the head, not the ramp"
    assert torch.is_grad_enabled()


def test_nothing_is_compiled_for_it():
    model, graphs = tiny_llava(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.get_decoder().layers[0].mlp.compile(backend=backend)
    EPIC(Uniform(), tcd()).attach(model)
    assert not graphs
    model(**tiny_batch(RAGGED))
    assert graphs, "control"


def test_another_compression_at_work_has_no_part_in_it():
    model = tiny_llava()
    visual = torch.ones(1, 24, dtype=torch.bool)
    with (
        compress(model, Uniform(), keep=4, visual_mask=visual),
        pytest.raises(StateError, match="Only one compression can be at work"),
    ):
        EPIC(Uniform(), tcd()).attach(model)


# Models that cannot be looked at


def test_a_class_that_cannot_be_called_on_text():
    model = tiny_llava()
    model.register_forward_pre_hook(lambda module, args, kwargs: kwargs["pixel_values"] and None, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match=r"fails on two text tokens: KeyError\.\nHint: EPIC calls it"):
        EPIC(Uniform(), tcd()).attach(model)
    assert not model.lm_head._forward_hooks


def test_a_model_whose_head_is_not_called_as_a_module():
    model = tiny_llava()
    model.get_output_embeddings = lambda: nn.Linear(32, 100)  # not the one that makes its logits
    with pytest.raises(UnsupportedModelError, match="calls its output head as a module and returns its logits; Llava"):
        EPIC(Uniform(), tcd()).attach(model)


def test_a_lora_head_is_looked_at_whole():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["lm_head", "q_proj"], r=2)
    EPIC(Uniform(), tcd()).attach(peft.get_peft_model(tiny_llava(), settings))
    capped = peft.get_peft_model(built(paligemma(2.0)), settings)
    with pytest.raises(UnsupportedModelError, match="caps logits at 2"):
        EPIC(Uniform(), tcd()).attach(capped)


# Models with an adapter


class Capping(HandwrittenMLLM):
    def forward(self, ids, pictures=None, cache=None):
        return 30 * torch.tanh(super().forward(ids, pictures, cache) / 30)


class Hiding(HandwrittenMLLM):
    def forward(self, ids, pictures=None, cache=None):
        logits = super().forward(ids, pictures, cache)
        logits[:, :, torch.tensor([3, 4])] = float("-inf")
        return {"logits": logits, "ids": ids}


class Last(HandwrittenMLLM):
    def forward(self, ids, pictures=None, cache=None):
        return super().forward(ids, pictures, cache)[:, -1], None


class Silent(HandwrittenMLLM):
    def forward(self, ids, pictures=None, cache=None):
        return {"loss": super().forward(ids, pictures, cache).square().mean()}


def handwritten(kind):
    torch.manual_seed(0)
    return kind(width=32, depth=4, heads=2).double().eval()


def step(model, objective=None):
    batch = with_labels(batch_of_rows(text=(7, 5, 9)))
    objective = EPIC(Uniform(), constant(0.5, layer=1), adapter=Adapter) if objective is None else objective
    return objective(model, batch, step=0, total=1).loss.detach()


@pytest.mark.parametrize(
    ("kind", "found"),
    [(Capping, "model is a Capping, which caps logits at 30 after"), (Hiding, "model is a Hiding, which hides 2 of")],
)
def test_a_model_with_an_adapter_is_looked_at_on_its_first_batch(kind, found):
    model = handwritten(kind)
    objective = EPIC(Uniform(), constant(0.5, layer=1), adapter=Adapter)
    with Unchanged(model):
        with pytest.raises(UnsupportedModelError, match=found):
            step(model, objective)
        objective.detach()
    with pytest.raises(UnsupportedModelError, match=found):
        step(handwritten(HandwrittenMLLM), EPIC(Uniform(), tcd(), teacher=model, adapter=Adapter))


@pytest.mark.parametrize("kind", [Last, Silent])
def test_models_with_an_adapter_that_come_in(kind):
    assert torch.equal(step(handwritten(kind)), step(handwritten(HandwrittenMLLM)))


def test_a_model_with_an_adapter_is_looked_at_once():
    model, calls = handwritten(HandwrittenMLLM), []
    model.register_forward_pre_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    objective = EPIC(Uniform(), constant(0.5, layer=1), adapter=Adapter, weight=0.0)
    step(model, objective)
    step(model, objective)
    assert calls == [False, True, True]
