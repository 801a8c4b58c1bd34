"""Generation under compress(): logits against a cache-free recompute at full length, with controls."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.adapters.tiny import IMAGE, LAYOUTS, RAGGED, tiny_batch, tiny_llava
from tokencurric import DART, FastV, Random, StateError, Uniform, compress
from tokencurric.testing.models import Recording, hidden, recomputed

NEW = 5
ARGUMENTS = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
    "suppress_tokens": [IMAGE],  # the recompute would take it for a picture
}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return tiny_llava(attention=request.param)


def without_cache(model, batch, recording, layer, sequences):
    dropped = recording.dropped(*batch["input_ids"].shape)
    return recomputed(model, batch, dropped, layer, sequences)


@pytest.mark.parametrize("compressor", [FastV(), DART(), Random()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_logits_equal_a_cache_free_recompute(model, layout, compressor):
    batch = tiny_batch(LAYOUTS[layout])
    recording = Recording(compressor)
    with compress(model, recording, keep=5, layer=2):
        out = model.generate(**batch, **ARGUMENTS)
    expected = without_cache(model, batch, recording, 2, out.sequences)
    torch.testing.assert_close(torch.stack(out.logits), expected, rtol=1e-4, atol=1e-4)
    plain = model.generate(**batch, **ARGUMENTS)
    assert (plain.logits[0] - expected[0]).abs().max() > 0.05, "control"


@pytest.mark.parametrize("layer", [0, 1, 5])
@torch.no_grad()
def test_other_layers(model, layer):
    batch, recording = tiny_batch(RAGGED), Recording(Uniform())
    with compress(model, recording, keep=5, layer=layer):
        out = model.generate(**batch, **ARGUMENTS)
    expected = without_cache(model, batch, recording, layer, out.sequences)
    torch.testing.assert_close(torch.stack(out.logits), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_cache_is_smaller(model):
    batch = tiny_batch(LAYOUTS["even"])
    with compress(model, FastV(), keep=4, layer=2):
        out = model.generate(**batch, **ARGUMENTS)
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    full = batch["input_ids"].shape[1] + NEW - 1
    assert lengths == [full, full, *[full - 12] * 4]


@torch.no_grad()
def test_a_reset_cache_forgets_the_prompt_before(model):
    cache = DynamicCache(config=model.config.text_config)
    first, second = tiny_batch(RAGGED), tiny_batch(LAYOUTS["even"], seed=7)
    with compress(model, Uniform(), keep=5, layer=2):
        model.generate(**first, **ARGUMENTS, past_key_values=cache)
        cache.reset()
        again = model.generate(**second, **ARGUMENTS, past_key_values=cache)
        fresh = model.generate(**second, **ARGUMENTS)
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(fresh.logits))
    cache.reset()
    plain = model.generate(**second, **ARGUMENTS, past_key_values=cache)
    assert not torch.allclose(plain.logits[0], fresh.logits[0])


@torch.no_grad()
def test_a_conversation_goes_on_in_the_same_cache(model):
    batch, recording = tiny_batch(RAGGED), Recording(Uniform())
    more = torch.randint(5, 90, (3, 4), generator=torch.Generator().manual_seed(5))
    cache = DynamicCache(config=model.config.text_config)
    mask = torch.cat((batch["attention_mask"], torch.ones(3, 4, dtype=torch.long)), 1)
    with compress(model, recording, keep=5, layer=2):
        model(**batch, past_key_values=cache, use_cache=True)
        positions = torch.arange(batch["input_ids"].shape[1], mask.shape[1])[None]
        later = model(input_ids=more, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        with pytest.raises(StateError, match="all pictures in the first call"):
            model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], past_key_values=cache)
    ids = torch.cat((batch["input_ids"], more), 1)
    dropped = torch.nn.functional.pad(recording.dropped(*batch["input_ids"].shape), (0, 4))
    with hidden(model, dropped, 2):
        full = model(**{**batch, "input_ids": ids, "attention_mask": mask}).logits[:, -4:]
    torch.testing.assert_close(later, full, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_of_a_later_turn_is_not_seen(model):
    batch = tiny_batch(RAGGED)
    more = torch.randint(5, 90, (3, 4), generator=torch.Generator().manual_seed(5))
    padded = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    mask = torch.cat((batch["attention_mask"], padded), 1)
    found = []
    for filler in (3, 44):
        for hole in (True, False):
            cache = DynamicCache(config=model.config.text_config)
            ids = torch.where(padded.bool() | (not hole), more, filler)
            if not hole:
                ids[:, 2] = filler
            with compress(model, Uniform(), keep=5, layer=2):
                model(**batch, past_key_values=cache, use_cache=True)
                first = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[:, -1]
                longer = torch.cat((mask, mask.new_ones(3, 1)), 1)
                second = model(input_ids=more[:, :1], attention_mask=longer, past_key_values=cache).logits[:, -1]
            found.append(torch.stack((first, second)))
    torch.testing.assert_close(found[0], found[2])
    assert not torch.allclose(found[1], found[3], atol=1e-2), "control: tokens are seen"


@torch.no_grad()
def test_static_cache(model):
    batch, recording = tiny_batch(RAGGED), Recording(Uniform())
    with compress(model, recording, keep=5, layer=2):
        cache = StaticCache(config=model.config.text_config, max_cache_len=64)
        out = model.generate(**batch, **ARGUMENTS, past_key_values=cache, disable_compile=True)
    expected = without_cache(model, batch, recording, 2, out.sequences)
    torch.testing.assert_close(torch.stack(out.logits), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_beams_of_a_prompt_share_a_random_choice(model):
    batch, recording = tiny_batch(RAGGED), Recording(Random())
    with compress(model, recording, keep=5, layer=2):
        model.generate(**batch, max_new_tokens=3, num_beams=3, do_sample=False, suppress_tokens=[IMAGE])
    mask = recording.calls[-1][1].view(3, 3, -1)
    assert torch.equal(mask[:, :1].expand_as(mask), mask)
    assert not torch.equal(mask[0, 0], mask[1, 0])
