"""A row keeps the same tokens alone, beside longer rows with padding on either side, in a forward and in `generate`."""

import pytest
import torch
from transformers import DynamicCache

from tests.adapters.zoo import NESTED, tiny_inputs, tiny_model
from tests.testing.discovery import compressors
from tokencurric import DART, Uniform, compress
from tokencurric.adapters.hugging_face import TransformersSeam
from tokencurric.testing.models import Recording, apart, hidden, lengthen

SEEDS, KEEP = range(20), 6
COUNTING = ["llava", "llava-qwen2", "llava-qwen3", "gemma3", "paligemma", "aya_vision", "llama4", "idefics3"]
FROM_THE_MASK = ["qwen2_vl", "qwen3_vl", "glm4v"]  # the model itself makes positions from the mask
OFTEN = ("llava", "llava-qwen2", "gemma3", "paligemma", "qwen2_vl")
FAMILIES = [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow) for name in (*COUNTING, *FROM_THE_MASK)]


class Enough(Exception):
    """The rest of the forward is not needed."""


class Everything(Recording):
    """Is shown every signal of a decoder layer, and ends the forward."""

    def __init__(self):
        super().__init__(DART())
        self.needs = frozenset({"attention", *DART.needs})

    def __call__(self, view, keep, *, seed=0):
        super().__call__(view, keep, seed=seed)
        raise Enough


def first_row(family, batch):
    """The first row of a batch, with one picture of three, as its processor makes it alone."""
    real, alone = batch["attention_mask"][0].bool(), {}
    for name, each in batch.items():
        if family in NESTED and name == "pixel_values":
            alone[name] = each[:1, :1]
        elif each.shape[:2] == batch["attention_mask"].shape:
            alone[name] = each[:1, real]
        else:
            alone[name] = each[: len(each) // 3]
    return alone


def view_of(model, inputs, verb):
    recording = Everything()
    with torch.no_grad(), compress(model, recording, keep=KEEP), pytest.raises(Enough):
        model(**inputs) if verb == "forward" else model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return recording.calls[0][0]


def views(model, family, seed):
    """What a compressor sees of the first row, by the way in which it was run; first that of the row alone."""
    left, right = (tiny_inputs(family, padding=side, seed=seed) for side in ("left", "right"))
    ways = {"alone": first_row(family, left), "left": left, "right": right}
    return {
        f"{way}, {verb}": view_of(model, inputs, verb)
        for way, inputs in ways.items()
        for verb in ("forward", "generate")
    }


def survivors(compressor, view):
    """Numbers of the first row's tokens that are kept."""
    return compressor(view, KEEP, seed=3)[0][view.mask[0]].nonzero().flatten().tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_keeps_the_same_tokens_alone_and_padded(family):
    model = tiny_model(family)
    everyone = [one for one in compressors() if one.needs <= Everything().needs]
    assert len(everyone) >= 4
    for seed in SEEDS:
        seen = views(model, family, seed)
        alone = next(iter(seen.values()))
        for how, view in seen.items():
            for name in ("tokens", "keys", "attention", "normed_tokens"):
                ours, theirs = (getattr(each, name)[0][each.mask[0]] for each in (view, alone))
                assert apart(ours, theirs) < 1e-4, (name, how)
            for one in everyone:
                assert survivors(one, view) == survivors(one, alone), (one, how, seed)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_positions_of_the_padded_sequence_would_keep_others(family, monkeypatch):
    """The control of the test above: what happens if the model's own positions are left to it."""
    monkeypatch.setattr(TransformersSeam, "place", lambda self, call, kwargs, padding: (kwargs, None))
    model, apart_in = tiny_model(family), {}
    for seed in SEEDS:
        seen = views(model, family, seed)
        for how, view in seen.items():
            other = survivors(DART(), view) != survivors(DART(), seen["alone, forward"])
            apart_in[how] = apart_in.get(how, 0) + other
    left = apart_in.pop("left, forward")
    assert left == 0 if family in FROM_THE_MASK else left >= 5
    assert not any(apart_in.values())


@pytest.mark.parametrize("given", [False, True], ids=["counted", "given"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", ["llava", "paligemma", "gemma3", "llama4"])
@torch.no_grad()
def test_calls_after_a_padded_prompt_go_on_from_its_positions(family, layer, given):
    """With a cache, and a prompt without `position_ids`; later calls may bring theirs, which count the padding too."""
    model, inputs, cache = tiny_model(family), tiny_inputs(family), DynamicCache()
    recording, new = Recording(Uniform()), torch.tensor([[7, 8, 9], [10, 11, 12]])
    whole = lengthen(inputs, torch.cat((inputs["input_ids"], new), 1), new_type=1 if family == "paligemma" else 0)
    with compress(model, recording, keep=KEEP, layer=layer):
        model(**inputs, past_key_values=cache, use_cache=True)
        later = []
        for part in (slice(0, 2), slice(2, 3)):
            mask = whole["attention_mask"][:, : inputs["input_ids"].shape[1] + part.stop]
            at = torch.arange(mask.shape[1])[None, inputs["input_ids"].shape[1] + part.start :]
            more = {"position_ids": at + (family == "paligemma")} if given else {}
            later.append(model(input_ids=new[:, part], attention_mask=mask, past_key_values=cache, **more).logits)
    dropped = torch.nn.functional.pad(recording.dropped(*inputs["input_ids"].shape), (0, 3))
    with hidden(model, dropped, layer):
        expected = model(**whole).logits[:, -3:]
    assert apart(torch.cat(later, 1), expected) < 1e-4
    assert apart(model(**whole).logits[:, -3:], expected) > 1e-2, "control"


@pytest.mark.parametrize("where", ["rows", "shared"])
@torch.no_grad()
def test_positions_of_the_caller_are_left_alone(where):
    model, inputs, seen = tiny_model("llava"), tiny_inputs("llava"), []
    given = torch.arange(inputs["input_ids"].shape[1])[None] + 3
    given = given.expand(2, -1).contiguous() if where == "rows" else given
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    with compress(model, Uniform(), keep=KEEP):
        model(**inputs, position_ids=given)
        model(**inputs)
    hook.remove()
    assert torch.equal(seen[0], given)
    assert seen[1].tolist() == [(row.cumsum(0) - 1).clamp(min=0).tolist() for row in inputs["attention_mask"]]


@pytest.mark.parametrize("family", ["llava", "paligemma"])
@torch.no_grad()
def test_where_nothing_is_dropped_positions_are_the_model_s(family):
    model, inputs = tiny_model(family), tiny_inputs(family)
    plain = model(**inputs).logits
    with compress(model, DART(), keep=10_000):
        assert torch.equal(model(**inputs).logits, plain)
    with compress(model, DART(), ratio=0.5, layer=model.config.text_config.num_hidden_layers):
        assert torch.equal(model(**inputs).logits, plain)
    with compress(model, DART(), keep=KEEP):
        assert not torch.equal(model(**inputs).logits, plain), "control"
