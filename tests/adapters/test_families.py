"""Every family of the zoo: prefill and generation against the oracle, the attention signal, and restoration.

A cell or two of the matrix run by default; `nox -s nightly` runs it whole.
"""

import pytest
import torch

from tests.adapters.fingerprint import Unchanged
from tests.adapters.oracle import error, masking, recomputed
from tests.adapters.tiny import Recording
from tests.adapters.zoo import (
    BEGIN,
    END,
    FAMILIES,
    IMAGE,
    LAYOUTS,
    RAGGED,
    VIDEO,
    VIDEOS,
    tiny_inputs,
    tiny_model,
    tiny_videos,
)
from tokencurric import EPIC, FastV, Uniform, compress
from tokencurric.curriculum import constant

TOLERANCE = 1e-4  # relative to the largest logit
MOVES = 1e-2  # what dropping has to change at least, in the same measure, or a comparison says nothing
KEEP = 5
slow = pytest.mark.slow

PREFILL = [
    pytest.param("sdpa", "left", "ragged"),
    pytest.param("eager", "right", "ragged"),
    pytest.param("sdpa", "right", "ragged", marks=slow),
    pytest.param("eager", "left", "ragged", marks=slow),
    pytest.param("sdpa", "left", "one", marks=slow),
    pytest.param("eager", "left", "one", marks=slow),
]
GENERATE = [
    pytest.param("sdpa", "ragged"),
    pytest.param("eager", "ragged", marks=slow),
    pytest.param("sdpa", "one", marks=slow),
    pytest.param("eager", "one", marks=slow),
]
GREEDY = {
    "max_new_tokens": 5,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
    "suppress_tokens": [IMAGE, VIDEO, BEGIN, END],  # a recompute would take them for pictures
}


def types_of_new_tokens(family):
    """PaliGemma marks its prompt, which attends both ways, by 0; Gemma 3 marks pictures by 1."""
    return 1 if family == "paligemma" else 0


@pytest.mark.parametrize(("attention", "padding", "layout"), PREFILL)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prefill(family, attention, padding, layout):
    model, inputs = tiny_model(family, attention=attention), tiny_inputs(family, LAYOUTS[layout], padding=padding)
    recording = Recording(FastV())
    plain = model(**inputs).logits
    with Unchanged(model), compress(model, recording, keep=KEEP, layer=2):
        short = model(**inputs).logits
    dropped = recording.dropped(*inputs["input_ids"].shape)
    with masking(model, dropped, 2):
        full = model(**inputs).logits
    kept = inputs["attention_mask"].bool() & ~dropped
    assert error(short[kept], full[kept]) < TOLERANCE
    assert error(plain[kept], full[kept]) > MOVES, "control"


@pytest.mark.parametrize(("attention", "layout"), GENERATE)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generate(family, attention, layout):
    model, inputs = tiny_model(family, attention=attention), tiny_inputs(family, LAYOUTS[layout])
    recording = Recording(FastV())
    plain = model.generate(**inputs, **GREEDY)
    with Unchanged(model), compress(model, recording, keep=KEEP, layer=2):
        ours = model.generate(**inputs, **GREEDY)
    dropped = recording.dropped(*inputs["input_ids"].shape)
    new_type = types_of_new_tokens(family)
    full = recomputed(model, inputs, dropped, 2, ours.sequences, new_type=new_type)
    assert error(torch.stack(ours.logits), full) < TOLERANCE
    assert error(plain.logits[0], full[0]) > MOVES, "control"
    nothing = torch.zeros_like(dropped)
    undropped = recomputed(model, inputs, nothing, 2, ours.sequences, new_type=new_type)
    assert error(undropped[1:], full[1:]) > MOVES, "control: dropped tokens matter to decoding, too"


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=slow)])
@pytest.mark.parametrize("family", VIDEOS)
@torch.no_grad()
def test_video(family, attention):
    model, inputs = tiny_model(family, attention=attention), tiny_videos(family)
    recording = Recording(FastV())
    plain = model(**inputs).logits
    with compress(model, recording, keep=KEEP, layer=2):
        short = model(**inputs).logits
        ours = model.generate(**inputs, **GREEDY)
    dropped = recording.dropped(*inputs["input_ids"].shape)
    assert dropped.sum(1).tolist() == [VIDEOS[family] - KEEP] * 2
    with masking(model, dropped, 2):
        full = model(**inputs).logits
    kept = inputs["attention_mask"].bool() & ~dropped
    assert error(short[kept], full[kept]) < TOLERANCE
    assert error(plain[kept], full[kept]) > MOVES, "control"
    assert error(torch.stack(ours.logits), recomputed(model, inputs, dropped, 2, ours.sequences)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1, 3, 5])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_other_layers(family, layer):
    model, inputs = tiny_model(family), tiny_inputs(family, RAGGED)
    recording = Recording(Uniform())
    plain = model(**inputs).logits
    with compress(model, recording, keep=KEEP, layer=layer):
        short = model(**inputs).logits
        ours = model.generate(**inputs, **GREEDY)
    dropped = recording.dropped(*inputs["input_ids"].shape)
    with masking(model, dropped, layer):
        full = model(**inputs).logits
    kept = inputs["attention_mask"].bool() & ~dropped
    assert error(short[kept], full[kept]) < TOLERANCE
    assert error(plain[kept], full[kept]) > MOVES, "control"
    again = recomputed(model, inputs, dropped, layer, ours.sequences, new_type=types_of_new_tokens(family))
    assert error(torch.stack(ours.logits), again) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attention_signal(family):
    model, inputs = tiny_model(family, attention="eager"), tiny_inputs(family)
    recording = Recording(FastV())
    with compress(model, recording, keep=KEEP, layer=3):
        model(**inputs)
    view = recording.calls[-1][0]
    maps = model(**inputs, output_attentions=True).attentions[2].mean(1)[:, -1]
    expected = maps.gather(1, view.positions).masked_fill(~view.valid, 0)
    ours = view.attention.masked_fill(~view.valid, 0)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    assert float(ours.std()) > 1e-4, "control: not all the same"


def epic_gradients(model, inputs, weight=0.7, **arguments):
    """Loss and gradients of one step in which student and teacher both compress."""
    model.zero_grad()
    objective = EPIC(Uniform(), constant(0.8, margin=0.4, layer=1), weight=weight, **arguments)
    out = objective(model, inputs, step=0, total=1)
    objective.detach()
    out.loss.backward()
    return out, {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "aya_vision"])  # which EPIC refuses
def test_epic_shares_layers_without_a_trace_in_the_gradients(family):
    model, inputs = tiny_model(family, dtype=torch.float64), tiny_inputs(family, padding="right")
    inputs = {name: each.double() if each.is_floating_point() else each for name, each in inputs.items()}
    ids = inputs["input_ids"]
    inputs["labels"] = torch.where((inputs["attention_mask"].cumsum(1) > 20) & (ids < IMAGE - 5) & (ids > 0), ids, -100)
    out, ours = epic_gradients(model, inputs)
    separate, theirs = epic_gradients(model, inputs, share_prefix=False)
    _, untaught = epic_gradients(model, inputs, weight=0.0)
    torch.testing.assert_close(out.loss, separate.loss)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 50
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])
    assert any(error(untaught[name], ours[name]) > MOVES for name in ours), "control"
