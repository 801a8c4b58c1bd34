"""A cache that a context shortened, and the plain model."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.adapters.tiny import ONE, RAGGED, tiny_batch, tiny_llava
from tokencurric import Uniform, compress
from tokencurric.errors import StateError

CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=60),
}
each_cache = pytest.mark.parametrize("kind", CACHES)


def step(model, batch, cache):
    ones = torch.ones(len(batch["input_ids"]), 1, dtype=torch.long)
    mask = torch.cat((batch["attention_mask"], ones), 1)
    with torch.no_grad():
        return model(input_ids=7 * ones, attention_mask=mask, past_key_values=cache).logits


def filled(model, batch, kind, layer):
    cache = CACHES[kind](model.config.text_config)
    with torch.no_grad(), compress(model, Uniform(), keep=5, layer=layer):
        model(**batch, past_key_values=cache, use_cache=True)
    return cache


@each_cache
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [ONE, RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("layer", [0, 2])
def test_it_is_refused_by_the_plain_model(kind, attention, rows, layer):
    model, batch = tiny_llava(attention=attention), tiny_batch(rows)
    cache = filled(model, batch, kind, layer)
    for each in (cache, copy.deepcopy(cache)):
        with pytest.raises(StateError, match=r"cache holds a compressed prompt, and the context .* is closed"):
            step(model, batch, each)


@each_cache
def test_another_context_goes_on(kind):
    model, batch = tiny_llava(), tiny_batch(RAGGED)
    cache = CACHES[kind](model.config.text_config)
    with torch.no_grad(), compress(model, Uniform(), keep=5, layer=2):
        model(**batch, past_key_values=cache, use_cache=True)
        expected = step(model, batch, copy.deepcopy(cache))
    with compress(model, Uniform(), keep=9, layer=3):
        torch.testing.assert_close(step(model, batch, cache), expected)
    with pytest.raises(StateError, match="is closed"):
        step(model, batch, cache)


@each_cache
def test_after_a_reset_it_is_a_cache_like_any(kind):
    model, batch = tiny_llava(), tiny_batch(RAGGED)
    cache, fresh = filled(model, batch, kind, 0), CACHES[kind](model.config.text_config)
    cache.reset()
    with torch.no_grad():
        for each in (cache, fresh):
            model(**batch, past_key_values=each, use_cache=True)
    torch.testing.assert_close(step(model, batch, cache), step(model, batch, fresh))
    assert "update" not in vars(cache)


def test_a_prompt_of_which_nothing_was_dropped_is_no_matter():
    model, batch = tiny_llava(), tiny_batch(RAGGED)
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad(), compress(model, Uniform(), keep=1000, layer=2):
        model(**batch, past_key_values=cache, use_cache=True)
    step(model, batch, cache)
