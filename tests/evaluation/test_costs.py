"""FLOPs, cache bytes and times of a tiny LLaVA: what is computed against what is counted and measured."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from tests.adapters.tiny import DEPTH, EVEN, IMAGE, PATCHES, RAGGED, tiny_batch, tiny_llava
from tokencurric import DART, FastV, Random, Uniform, compress
from tokencurric.errors import RangeError, ShapeError, StateError, UnsupportedModelError
from tokencurric.evaluation import (
    PromptShape,
    cache_bytes,
    count_flops,
    kv_bytes,
    measure_efficiency,
    paper_kv_bytes,
    peak_memory,
    prefill_flops,
    time_generation,
    tokens_per_layer,
)

SHAPE = PromptShape(visual=PATCHES, text=8)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return tiny_llava(attention=request.param)


def naive_layer(config, tokens):
    """A Llama layer written out: projections, scores, values, gated unit."""
    width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    head = width // heads
    projections = 2 * tokens * width * head * (2 * heads + 2 * kv_heads)
    attention = 2 * (2 * heads * tokens * tokens * head)
    return projections + attention + 3 * 2 * tokens * width * config.intermediate_size


@pytest.mark.parametrize("keep", [0, 5, PATCHES])
@pytest.mark.parametrize("layer", [0, 2, DEPTH - 1, DEPTH])
def test_counted_flops_equal_the_closed_form(model, keep, layer):
    inputs = tiny_batch(EVEN)
    with compress(model, Uniform(), keep=keep, layer=layer):
        counted = count_flops(model, inputs)
    assert counted == prefill_flops(model, SHAPE, keep=keep, layer=layer, batch=2)
    visual = tokens_per_layer(DEPTH, PATCHES, keep=keep, layer=layer)
    assert counted.layers == tuple(2 * naive_layer(model.config.text_config, 8 + n) for n in visual)
    full = prefill_flops(model, SHAPE, keep=PATCHES, layer=layer, batch=2)
    fewer = keep < PATCHES and layer < DEPTH
    assert (counted.decoder < full.decoder) == fewer, "control: dropping lowers the count, and nothing else does"
    assert (counted.tower, counted.projector, counted.head) == (full.tower, full.projector, full.head)


@pytest.mark.parametrize("compressor", [FastV(), DART()], ids=repr)
def test_choosing_is_counted_where_it_happens(model, compressor):
    with compress(model, compressor, keep=5, layer=2):
        counted = count_flops(model, tiny_batch(EVEN))
    formula = prefill_flops(model, SHAPE, keep=5, layer=2, batch=2)
    assert counted.decoder > formula.decoder
    assert [n for n, (a, b) in enumerate(zip(counted.layers, formula.layers, strict=True)) if a != b] in ([1], [1, 2])


def test_the_closed_form_needs_no_weights(model):
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert prefill_flops(empty, SHAPE, keep=5, layer=2) == prefill_flops(model, SHAPE, keep=5, layer=2)


def test_models_of_another_build_are_refused():
    model = tiny_llava()
    model.model.vision_tower.embeddings.patch_embedding = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match="CLIP-like towers"):
        prefill_flops(model, SHAPE, keep=5, layer=2)
    del model.model.multi_modal_projector
    with pytest.raises(UnsupportedModelError, match="no vision_tower and multi_modal_projector"):
        prefill_flops(model, SHAPE, keep=5, layer=2)


@pytest.mark.parametrize("keep", [0, 5, PATCHES])
@pytest.mark.parametrize("layer", [0, 2, DEPTH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_cache_bytes_equal_the_closed_form(keep, layer, dtype):
    model = tiny_llava(dtype=dtype)
    with torch.no_grad(), compress(model, Random(), keep=keep, layer=layer):
        cache = model(**tiny_batch(EVEN), use_cache=True).past_key_values
    assert cache_bytes(cache) == kv_bytes(model, SHAPE, keep=keep, layer=layer, batch=2)
    full = kv_bytes(model, SHAPE, keep=PATCHES, layer=layer, batch=2)
    assert (cache_bytes(cache) < full) == (keep < PATCHES and layer < DEPTH)


def test_paper_style_bytes_leave_out_text_and_the_layers_below():
    model = tiny_llava()
    each = 2 * 2 * 8 * 4  # keys and values, two heads, eight wide, four bytes
    assert paper_kv_bytes(model, keep=5) == DEPTH * 5 * each
    assert kv_bytes(model, PromptShape(5, 0), keep=5, layer=0) == paper_kv_bytes(model, keep=5)
    assert kv_bytes(model, SHAPE, keep=5, layer=2) > paper_kv_bytes(model, keep=5)
    assert paper_kv_bytes(model, keep=5, dtype=torch.float16) == paper_kv_bytes(model, keep=5) // 2


def test_an_empty_cache_is_refused():
    with pytest.raises(StateError, match="filled cache"):
        cache_bytes(DynamicCache(config=tiny_llava().config.text_config))


def test_peak_memory_is_the_allocators_since_the_call_began(monkeypatch):
    """A stand-in for CUDA's allocator; what a real one holds is looked at below."""
    held = {"now": 70, "most": 900}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.update(most=held["now"]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["most"])
    assert peak_memory(lambda: held.update(most=150), torch.device("cuda", 0)) == 150
    assert peak_memory(lambda: None, "cuda") == 70, "what was reached before the call does not count"


def test_peak_memory_is_not_made_up_where_nothing_counts_it():
    called = []
    assert peak_memory(lambda: called.append(1), "cpu") is None
    assert called == [1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_a_device():
    held = torch.zeros(2**20, device="cuda")
    before = torch.cuda.memory_allocated()
    assert before >= held.nbytes
    assert peak_memory(lambda: torch.zeros(2**20, device="cuda").sum().item(), "cuda") >= before + held.nbytes
    model, inputs = tiny_llava().cuda(), {name: each.cuda() for name, each in tiny_batch(EVEN).items()}
    (row,) = measure_efficiency(model, inputs, FastV(), [5], new_tokens=1, repeats=1)
    assert row.peak_memory > sum(weight.nbytes for weight in model.parameters())


def test_a_row_holds_what_was_measured(model):
    whole, short = measure_efficiency(model, tiny_batch(EVEN), FastV(), [PATCHES, 5], layer=2, new_tokens=1, repeats=1)
    assert (whole.kept, short.kept, short.batch) == (PATCHES, 5, 2)
    assert short.tokens == (16, 16, 5, 5, 5, 5)
    assert short.layer_average == pytest.approx(52 / 6)
    for row in (whole, short):
        assert row.kv_bytes == row.formula_kv_bytes
        assert row.peak_memory is None, "there is no such count of a CPU"
        assert row.timing.prefill > 0
    assert whole.flops == whole.counted_flops
    assert short.flops.decoder < short.counted_flops.decoder < whole.flops.decoder
    assert short.kv_bytes < whole.kv_bytes
    plain = short.plain()
    assert plain["flops_total"] == short.flops.total
    assert plain["timing"]["prefill"] == short.timing.prefill


def test_prompts_of_several_lengths_have_no_one_cost(model):
    with pytest.raises(ShapeError, match="prompts of one length"):
        measure_efficiency(model, tiny_batch(RAGGED), Uniform(), [5])


def test_timing_generates_the_tokens_it_divides_by(model):
    asked = []
    original = model.generate

    def generate(**kwargs):
        asked.append((kwargs["max_new_tokens"], kwargs["min_new_tokens"]))
        return original(**kwargs)

    model.generate = generate
    try:
        timing = time_generation(model, tiny_batch(EVEN), nullcontext, new_tokens=3, repeats=1)
    finally:
        del model.generate
    assert asked == [(1, 1)] * 2 + [(4, 4)] * 2
    assert timing.prefill > 0
    with pytest.raises(RangeError, match="repeats >= 1"):
        time_generation(model, {"input_ids": torch.tensor([[IMAGE]])}, nullcontext, repeats=0)


def test_several_cuts_cost_what_the_formulas_say():
    model, inputs = tiny_llava(), tiny_batch(EVEN)
    one, two = measure_efficiency(model, inputs, Uniform(), [[5, 5], [9, 5]], layer=[2, 4], new_tokens=1, repeats=1)
    for row in (one, two):
        assert row.kv_bytes == row.formula_kv_bytes
        assert row.counted_flops.layers == row.flops.layers
        assert row.kept == 5
    assert two.tokens == (PATCHES, PATCHES, 9, 9, 5, 5)
    assert two.kv_bytes > one.kv_bytes, "control"
