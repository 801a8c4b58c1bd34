"""The cache's argument under each of its names: `past_key_values` up to transformers 5.23, `cache` from 5.24 on.

One of the two is the installed release's own; a shim gives models the other. Logits are held against a recompute
without a cache.
"""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.adapters.test_families import GREEDY, KEEP, MOVES, TOLERANCE
from tests.adapters.zoo import ONE, RAGGED, tiny_inputs, tiny_model
from tests.hosts.renamed import rename_cache, renamed_model
from tokencurric import EPIC, FastV, Uniform, compress
from tokencurric.adapters import find_parts
from tokencurric.curriculum import constant
from tokencurric.errors import StateError, UnsupportedModelError
from tokencurric.hosts.names import CACHE
from tokencurric.testing.models import Recording, apart, recomputed

NAMES = list(CACHE.names)
CACHES = {
    "none given": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=80),
}
# Where a name that is not read was seen as a crash, and where as other logits.
CASES = [
    ("llava", "eager", "ragged", "none given", 2),
    ("llava", "sdpa", "ragged", "dynamic", 0),
    ("llava", "sdpa", "one", "static", 2),
    ("llava", "eager", "ragged", "static", 0),
    ("llava-mistral-sliding", "sdpa", "one", "none given", 2),
    ("llava-mistral-sliding", "sdpa", "one", "dynamic", 0),
    ("gemma3", "sdpa", "ragged", "dynamic", 1),
    ("gemma3", "eager", "one", "static", 2),
    ("qwen2_5_vl", "sdpa", "ragged", "dynamic", 2),
]
LAYOUTS = {"one": ONE, "ragged": RAGGED}


def first_seen(module):
    """The names that a module's hooks see its cache by, filled at its next call."""
    seen = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.extend(set(kwargs) & {*NAMES, "memory"}), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize(("family", "attention", "layout", "cache", "layer"), CASES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_generate_reads_the_cache_by_either_name(name, family, attention, layout, cache, layer):
    model = renamed_model(family, name, attention=attention)
    parts = find_parts(model)
    seen = [first_seen(parts.decoder), first_seen(parts.layers[0])]
    inputs, recording = tiny_inputs(family, LAYOUTS[layout]), Recording(Uniform())
    given = CACHES[cache](parts.decoder.config)
    more = {} if given is None else {CACHE.name_in(type(model).forward): given, "disable_compile": True}
    with compress(model, recording, keep=KEEP, layer=layer):
        ours = model.generate(**inputs, **GREEDY, **more)
    assert [set(each) for each in seen] == [{name}] * 2, "control: the shim renames"
    dropped = recording.dropped(*inputs["input_ids"].shape)
    full = recomputed(model, inputs, dropped, layer, ours.sequences)
    assert apart(torch.stack(ours.logits), full) < TOLERANCE
    undropped = recomputed(model, inputs, torch.zeros_like(dropped), layer, ours.sequences)
    assert apart(undropped, full) > MOVES, "control"


@pytest.mark.parametrize("name", NAMES)
def test_epic_gives_the_same_loss_by_either_name(name):
    inputs = tiny_inputs("llava", padding="right")
    ids = inputs["input_ids"]
    inputs["labels"] = torch.where((inputs["attention_mask"].cumsum(1) > 20) & (ids < 140) & (ids > 0), ids, -100)
    losses = []
    for model in (tiny_model("llava"), renamed_model("llava", name)):
        objective = EPIC(FastV(), constant(0.8, margin=0.4, layer=2), allow_unnested=True)
        losses.append(objective(model, inputs, step=0, total=1).loss)
        objective.detach()
    assert torch.equal(*losses)


@pytest.mark.parametrize("where", ["decoder", "layers"])
def test_a_cache_of_an_unknown_name_is_refused(where):
    model = rename_cache(tiny_model("llava"), "memory", **{each: each == where for each in ("decoder", "layers")})
    takes = r"that takes cache or past_key_values; its forward takes neither\.\nHint: It takes .*memory"
    with pytest.raises(UnsupportedModelError, match=takes), compress(model, Uniform(), keep=KEEP):
        pass
    with pytest.raises(UnsupportedModelError, match=takes):
        EPIC(Uniform(), constant(0.8)).attach(model)


@torch.no_grad()
def test_two_caches_in_one_call_are_refused():
    model = tiny_model("llava")
    decoder, layers = find_parts(model).decoder, find_parts(model).layers
    rotation = (torch.ones(1, 3, 8), torch.zeros(1, 3, 8))
    two = {name: DynamicCache(config=decoder.config) for name in NAMES}
    with compress(model, Uniform(), keep=KEEP), pytest.raises(StateError, match="one of cache, past_key_values; got"):
        decoder(inputs_embeds=torch.zeros(1, 3, 32), **two)
    assert layers[0](torch.zeros(1, 3, 32), position_embeddings=rotation)[0].shape[-1] == 32, "control: it runs"
