"""compress(): against a masking oracle at full length, with controls."""

import pytest
import torch

from tests.adapters.tiny import DEPTH, LAYOUTS, RAGGED, tiny_batch, tiny_llava
from tokencurric import DART, FastV, Random, Uniform, compress
from tokencurric.errors import RangeError, UnsupportedModelError
from tokencurric.testing.models import Recording, hidden

COMPRESSORS = [Random(), Uniform(), FastV(), DART()]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return tiny_llava(attention=request.param)


def oracle(model, batch, recording, layer):
    real = batch["attention_mask"].bool()
    dropped = recording.dropped(*batch["input_ids"].shape)
    with hidden(model, dropped, layer):
        logits = model(**batch).logits
    return logits, real & ~dropped


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_equal_those_of_hidden_keys(model, layout, padding, compressor):
    batch = tiny_batch(LAYOUTS[layout], padding=padding)
    recording = Recording(compressor)
    with compress(model, recording, keep=5, layer=2):
        short = model(**batch).logits
    full, kept = oracle(model, batch, recording, 2)
    plain = model(**batch).logits
    torch.testing.assert_close(short[kept], full[kept], rtol=1e-4, atol=1e-4)
    assert (plain - full)[kept].abs().max() > 0.05, "control: dropping has to change the answer"


@pytest.mark.parametrize("layer", range(DEPTH))
@torch.no_grad()
def test_every_layer(model, layer):
    batch = tiny_batch(RAGGED)
    recording = Recording(Uniform())
    with compress(model, recording, ratio=0.7, layer=layer):
        short = model(**batch).logits
    full, kept = oracle(model, batch, recording, layer)
    torch.testing.assert_close(short[kept], full[kept], rtol=1e-4, atol=1e-4)
    assert int(recording.calls[-1][1].sum(1)[1]) == 32 - 23  # ceil(32·0.7) = 23 removed


@torch.no_grad()
def test_dropping_nothing_is_bit_identical(model):
    batch = tiny_batch()
    plain = model(**batch).logits
    for arguments in ({"keep": 32}, {"ratio": 0.0}, {"keep": 1, "layer": DEPTH}):
        with compress(model, DART(), **{"layer": 2, **arguments}):
            assert torch.equal(model(**batch).logits, plain)
    with compress(model, DART(), keep=31, layer=2):
        assert not torch.equal(model(**batch).logits, plain)


@torch.no_grad()
def test_attention_signal_equals_the_model_s_own_attention():
    model = tiny_llava(attention="eager")
    batch = tiny_batch(RAGGED, padding="right", answers=2)
    recording = Recording(FastV())
    with compress(model, recording, keep=4, layer=3):
        model(**batch)
    view = recording.calls[-1][0]
    labels = batch.pop("labels")
    maps = model(**batch, output_attentions=True).attentions[2].mean(1)
    for row in range(3):
        query = int((labels[row] != -100).int().argmax()) - 1
        n = int(view.valid[row].sum())
        torch.testing.assert_close(view.attention[row, :n], maps[row, query, view.positions[row, :n]])
        assert row == 2 or not torch.allclose(view.attention[row, :n], maps[row, -1, view.positions[row, :n]])


@torch.no_grad()
def test_a_decoder_that_keeps_its_arguments_to_itself_is_refused():
    model = tiny_llava()
    decoder, forward = model.get_decoder(), model.get_decoder().forward
    known = ("attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")
    decoder.forward = lambda *args, **kwargs: forward(*args, **{k: v for k, v in kwargs.items() if k in known})
    with (
        pytest.raises(UnsupportedModelError, match="does not pass its keyword arguments on"),
        compress(model, Uniform(), keep=1, layer=1),
    ):
        model(**tiny_batch())


@torch.no_grad()
def test_a_row_has_to_keep_a_token():
    model, batch = tiny_llava(), tiny_batch((("I",),))
    with pytest.raises(RangeError, match="at least one token left"), compress(model, Uniform(), keep=0):
        model(**batch)
    with compress(model, Uniform(), keep=1):
        assert model(**batch).logits.isfinite().all()
