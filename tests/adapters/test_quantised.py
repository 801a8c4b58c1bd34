"""compress() on models whose decoder has int8 weights, against hiding tokens in the very same model."""

import copy

import pytest
import torch
from torch import nn

from tests.adapters.tiny import EVEN, IMAGE, RAGGED, tiny_batch, tiny_llava
from tests.adapters.zoo import BEGIN, END, VIDEO, tiny_inputs, tiny_model
from tests.adapters.zoo import IMAGE as ZOO_IMAGE
from tokencurric import DART, FastV, Random, compress
from tokencurric.evaluation import PromptShape, cache_bytes, count_flops, kv_bytes, prefill_flops
from tokencurric.testing import check_model, model_checks
from tokencurric.testing.models import Recording, apart, hidden, recomputed

torchao = pytest.importorskip("torchao.quantization", reason="torchao makes the quantised weights")

LAYER, KEEP = 2, 5
# Weights alone, and activations too, each token on a scale of its own: a rounding there moves a number by a whole step.
SCHEMES = {
    "weights": (torchao.Int8WeightOnlyConfig(), 1e-4),
    "activations": (torchao.Int8DynamicActivationInt8WeightConfig(), 0.03),
}


def quantised(model, scheme="weights"):
    """A copy with int8 linears in every decoder layer."""
    model = copy.deepcopy(model)
    layers = model.get_decoder().layers
    torchao.quantize_(layers, SCHEMES[scheme][0])
    weights = [each.weight for each in layers.modules() if isinstance(each, nn.Linear)]
    assert all(weight.qdata.dtype == torch.int8 for weight in weights)
    return model


@pytest.fixture(scope="module")
def plain():
    return tiny_llava()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("compressor", [FastV(), DART(), Random()], ids=lambda each: type(each).__name__)
@torch.no_grad()
def test_prefill_and_generation(plain, compressor, scheme):
    model, batch, recording = quantised(plain, scheme), tiny_batch(RAGGED), Recording(compressor)
    tolerance = SCHEMES[scheme][1]
    full = model(**batch).logits
    assert apart(full, plain(**batch).logits) > 1e-2, "control: these are other weights"
    asked = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE]}
    with compress(model, recording, keep=KEEP, layer=LAYER):
        short = model(**batch).logits
        out = model.generate(**batch, **asked, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(model(**batch).logits, full), "afterwards all is as it was"
    dropped = recording.dropped(*batch["input_ids"].shape)
    with hidden(model, dropped, LAYER):
        expected = model(**batch).logits
    kept = batch["attention_mask"].bool() & ~dropped
    assert apart(short[kept], expected[kept]) < tolerance
    assert apart(full[kept], expected[kept]) > 5 * tolerance, "control"
    again = recomputed(model, batch, dropped, LAYER, out.sequences)
    assert apart(torch.stack(out.logits), again) < tolerance
    undropped = recomputed(model, batch, torch.zeros_like(dropped), LAYER, out.sequences)
    assert apart(undropped[1:], again[1:]) > 5 * tolerance, "control"


@pytest.mark.parametrize(
    "family", ["llava", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "qwen3_vl"))]
)
def test_the_laws_of_a_compressed_model_hold(family):
    generation = {"suppress_tokens": [ZOO_IMAGE, VIDEO, BEGIN, END]}
    report = check_model(quantised(tiny_model(family)), tiny_inputs(family), generation=generation)
    assert set(report.passed) == {check.name for check in model_checks()}


@torch.no_grad()
def test_costs_are_those_of_the_shapes(plain):
    """The cache keeps the model's dtype, and operations are counted as for the plain weights."""
    model, batch, shape = quantised(plain), tiny_batch(EVEN), PromptShape(16, 8)
    cut = {"keep": KEEP, "layer": LAYER, "batch": 2}
    with compress(model, Random(), keep=KEEP, layer=LAYER):
        cache = model(**batch, use_cache=True).past_key_values
        counted = count_flops(model, batch)
    assert cache_bytes(cache) == kv_bytes(model, shape, **cut)
    assert counted == prefill_flops(model, shape, **cut) == prefill_flops(plain, shape, **cut)
    with compress(quantised(plain, "activations"), Random(), keep=KEEP, layer=LAYER) as other:
        assert count_flops(other, batch).decoder < counted.decoder, "what count_flops says it leaves out"
