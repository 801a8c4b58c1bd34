"""Arguments of a call are found wherever they stand."""

import pytest
import torch
import transformers as hf

from tests.adapters.tiny import IMAGE, RAGGED, VOCAB, tiny_batch, tiny_llava
from tokencurric import FastV, Uniform, compress
from tokencurric.errors import UnsupportedModelError


@torch.no_grad()
def test_arguments_in_place_are_those_by_name():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.3}
    config = hf.LlamaConfig(**sizes, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    config.image_token_id = IMAGE
    model, batch = hf.LlamaForCausalLM(config).eval(), tiny_batch(RAGGED, padding="right")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with compress(model, FastV(), keep=4, layer=2):
        by_name = model(input_ids=ids, attention_mask=mask).logits
        in_place = model(ids, mask).logits
        without = model(ids).logits
    real = mask.bool()
    torch.testing.assert_close(in_place[real], by_name[real])
    assert not torch.allclose(without[real], by_name[real], atol=1e-2), "control: the mask matters"


@torch.no_grad()
def test_tensors_of_an_unknown_argument_are_refused_wherever_they_are():
    model, batch = tiny_llava(), tiny_batch(RAGGED)
    assert batch["input_ids"].shape[1] == 40
    aligned, other = torch.zeros(1, 40, 8), torch.zeros(1, 7, 8)
    with compress(model, Uniform(), keep=4, layer=2):
        for value in (aligned, (aligned, aligned), {"cosine": aligned}, [(other, aligned)]):
            with pytest.raises(UnsupportedModelError, match=r"passes turns of shape \(1, 40, 8\) to its layers"):
                model(**batch, turns=value)
        assert model(**batch, turns=(other,)).logits.isfinite().all(), "control"
