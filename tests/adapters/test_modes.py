"""Ways to generate under compress(): their scores against a cache-free recompute, with controls."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from tests.adapters.zoo import BEGIN, END, IMAGE, LAYOUTS, TEXT, VIDEO, tiny_inputs, tiny_model
from tokencurric import FastV, Random, compress
from tokencurric.testing.models import Recording, apart, hidden, lengthen, recomputed

TOLERANCE, MOVES, LAYER, KEEP = 1e-4, 1e-2, 2, 5
SETTINGS = {
    "max_new_tokens": 6,
    "output_logits": True,
    "output_scores": True,
    "return_dict_in_generate": True,
    "suppress_tokens": [IMAGE, VIDEO, BEGIN, END],
}


def kinds(*more):
    """One family of each kind: plain, and by default left out, sliding windows, chunks, positions by place."""
    return ["llava", *(pytest.param(family, marks=pytest.mark.slow) for family in more)]


def generated(model, inputs, compressor=None, **settings):
    """What generate returns under compression, and which positions of its rows were dropped."""
    recording = Recording(FastV() if compressor is None else compressor)
    with torch.no_grad(), compress(model, recording, keep=KEEP, layer=LAYER):
        out = model.generate(**inputs, **SETTINGS, **settings)
    width = inputs["input_ids"].shape[1]
    return out, recording.dropped(len(recording.calls[-1][1]), width)


def repeated(inputs, times):
    """Every row as often as it is generated from; each has one picture here."""
    return {name: each.repeat_interleave(times, 0) for name, each in inputs.items()}


def two_rows(family):
    """A picture a row, so that rows and pictures repeat alike."""
    return tiny_inputs(family, ((3, "I", 5), (2, "I", 4)))


@torch.no_grad()
def check(model, inputs, dropped, out):
    logits, again = torch.stack(out.logits), recomputed(model, inputs, dropped, LAYER, out.sequences)
    assert apart(logits, again) < TOLERANCE
    plain = recomputed(model, inputs, torch.zeros_like(dropped), LAYER, out.sequences)
    assert apart(plain[1:], again[1:]) > MOVES, "control"


# Llama 4 itself fails to repeat pictures.
@pytest.mark.parametrize("family", kinds("gemma3", "qwen3_vl"))
@pytest.mark.parametrize("compressor", [FastV(), Random()], ids=lambda each: type(each).__name__)
def test_sampling_several_answers(family, compressor):
    model, inputs = tiny_model(family), two_rows(family)
    if family == "qwen3_vl":
        inputs["pixel_values"] = inputs["pixel_values"].view(2, -1)
    many = repeated(inputs, 2)
    if family == "qwen3_vl":
        inputs["pixel_values"], many["pixel_values"] = (each["pixel_values"].view(-1, 96) for each in (inputs, many))
    torch.manual_seed(0)
    out, dropped = generated(model, inputs, compressor, do_sample=True, temperature=9.0, num_return_sequences=2)
    check(model, many, dropped, out)
    assert not torch.equal(out.sequences[0], out.sequences[1]), "control: they are different answers"
    assert torch.equal(dropped[0], dropped[1])
    assert not torch.equal(dropped[0], dropped[2])


@pytest.mark.parametrize("family", kinds("gemma3"))
@pytest.mark.parametrize("compressor", [FastV(), Random()], ids=lambda each: type(each).__name__)
@torch.no_grad()
def test_beams(family, compressor):
    model, inputs = tiny_model(family), two_rows(family)
    out, dropped = generated(model, inputs, compressor, do_sample=False, num_beams=3, num_return_sequences=3)
    many, width = repeated(inputs, 3), inputs["input_ids"].shape[1]
    scores = []
    for gone in (dropped, torch.zeros_like(dropped)):
        logits = recomputed(model, many, gone, LAYER, out.sequences)
        new = out.sequences[:, width:].T[..., None]
        scores.append(logits.log_softmax(-1).gather(2, new).mean(0)[:, 0])
    assert apart(out.sequences_scores, scores[0]) < TOLERANCE
    assert apart(out.sequences_scores, scores[1]) > MOVES, "control"


@pytest.mark.parametrize("family", kinds("gemma3", "llama4", "qwen3_vl"))
@pytest.mark.parametrize("compressor", [FastV(), Random()], ids=lambda each: type(each).__name__)
def test_prompt_lookup(family, compressor):
    model, inputs = tiny_model(family), tiny_inputs(family, LAYOUTS["one"])
    inputs["input_ids"][0, -5:] = torch.tensor([7, 8, 9, 7, 8])  # a draft is found at once, and goes with the prompt
    greedy, chosen = generated(model, inputs, compressor, do_sample=False)
    out, dropped = generated(model, inputs, compressor, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(dropped, chosen), "the draft must not take part in the choice"
    assert torch.equal(out.sequences, greedy.sequences)
    check(model, inputs, dropped, out)


def assistant():
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": 1})).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("draft_by", ["another", "itself"])
def test_assisted(draft_by):
    model, inputs = tiny_model("llava"), tiny_inputs("llava", LAYOUTS["one"])
    helper = assistant()
    if draft_by == "itself":  # drafts are right often, as both have the same weights but one sees no picture
        helper = LlamaForCausalLM(model.config.text_config).eval()
        helper.load_state_dict(
            {name.replace("model.language_model.", "model."): each for name, each in model.state_dict().items()},
            strict=False,
        )
        helper.generation_config.eos_token_id = None
    greedy, chosen = generated(model, inputs, do_sample=False)
    out, dropped = generated(model, inputs, do_sample=False, assistant_model=helper)
    assert torch.equal(dropped, chosen)
    assert torch.equal(out.sequences, greedy.sequences)
    check(model, inputs, dropped, out)


@pytest.mark.parametrize("family", kinds("gemma3", "llama4", "qwen3_vl"))
@torch.no_grad()
def test_static_cache(family):
    model, inputs = tiny_model(family), tiny_inputs(family)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    out, dropped = generated(model, inputs, do_sample=False, past_key_values=cache, disable_compile=True)
    check(model, inputs, dropped, out)


@pytest.mark.parametrize("family", kinds("gemma3", "llama4"))
@torch.no_grad()
def test_turns_of_a_conversation(family):
    model, inputs, recording = tiny_model(family), tiny_inputs(family), Recording(FastV())
    generator = torch.Generator().manual_seed(5)
    first, second = (torch.randint(5, 140, (2, 4), generator=generator) for _ in range(2))
    cache = DynamicCache(config=model.config.get_text_config())
    prompt, said = inputs["input_ids"].shape[1], torch.cat((inputs["input_ids"], first, second), 1)
    with compress(model, recording, keep=KEEP, layer=LAYER):
        model.generate(**inputs, max_new_tokens=1, past_key_values=cache)  # fills the cache with the prompt
        later = []
        for end in (prompt + 4, prompt + 8):
            mask = lengthen(inputs, said[:, :end])["attention_mask"]
            places = (mask.cumsum(1) - 1)[:, -4:]
            turn = {"input_ids": said[:, end - 4 : end], "attention_mask": mask, "position_ids": places}
            later.append(model(**turn, past_key_values=cache).logits)
    dropped = torch.nn.functional.pad(recording.dropped(2, prompt), (0, 8))
    longer = lengthen(inputs, said)
    longer["position_ids"] = (longer["attention_mask"].cumsum(1) - 1).clamp(min=0)  # as generate counts them
    with hidden(model, dropped, LAYER):
        full = model(**longer).logits[:, -8:]
    plain = model(**longer).logits[:, -8:]
    assert apart(torch.cat(later, 1), full) < TOLERANCE
    assert apart(plain, full) > MOVES, "control"
