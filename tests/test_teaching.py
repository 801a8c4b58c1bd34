"""The teacher's side of EPIC: it sees all that the student sees, and padding and company change nothing."""

import copy

import pytest
import torch
from torch.nn import functional

from tests.adapters.tiny import EVEN, RAGGED, tiny_llava
from tests.test_distill import HARD, STEP, assert_same, batch_of, gradients
from tokencurric import DART, EPIC, FastV, compress, distill
from tokencurric.curriculum import constant
from tokencurric.errors import RangeError, ShapeError
from tokencurric.losses import feature_distance
from tokencurric.testing.models import Recording, hidden

TEXT = ((6,), (9,))
PAD = {"input_ids": 0, "attention_mask": 0, "labels": -100}
MEASURES_PADDING = ("padding", "student_padding")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # tables of rotary positions are in float32 whatever the model is in


def ids_of(batch):
    return {name: each for name, each in batch.items() if name != "labels"}


def padded(batch, columns, side):
    """The batch with more columns of padding."""
    width = (columns, 0) if side == "left" else (0, columns)
    return {name: functional.pad(each, width, value=PAD[name]) if name in PAD else each for name, each in batch.items()}


def alone(batch, rows):
    """Each row as a batch of its own, without padding."""
    pictures = [row.count("I") for row in rows]
    for number, count in enumerate(pictures):
        real = batch["attention_mask"][number].bool()
        part = {name: batch[name][number : number + 1, real] for name in PAD}
        start = sum(pictures[:number])
        yield {**part, "pixel_values": batch["pixel_values"][start : start + count]} if count else part


def step(model, batch, teacher, *, stage=HARD, items=None, compressor=None, **settings):
    """Loss, metrics and gradients of one step."""
    if teacher == "separate":
        settings["share_prefix"] = False
    elif teacher != "self":
        settings["teacher"] = tiny_llava(dtype=torch.float64, seed=9) if teacher == "module" else teacher
    objective = EPIC(compressor or DART(), stage or HARD, **settings)
    try:
        items = None if items is None else torch.tensor(items)
        call = objective if stage else objective.uncompressed
        out = call(model, batch, **(STEP if stage else {}), num_items=items)
        out.loss.backward()
    finally:
        objective.detach()
    return out.loss.detach(), {k: torch.as_tensor(v) for k, v in out.metrics.items()}, gradients(model)


STAGES = {
    "compressed": HARD,
    "no-margin": constant(0.8, margin=0.0),
    "ratio-0": constant(0.0, margin=0.0),
    "uncompressed": None,
}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
@pytest.mark.parametrize("feature_weight", [0, 0.5])
@pytest.mark.parametrize("rows", [RAGGED, TEXT], ids=["ragged", "text-only"])
@pytest.mark.parametrize("teacher", ["self", "separate", "module"])
def test_padding_and_company_change_nothing(teacher, rows, feature_weight, stage):
    model, batch = tiny_llava(dtype=torch.float64), batch_of(rows)
    settings = {"feature_weight": feature_weight, "stage": stage}
    loss, metrics, grads = step(model, batch, teacher, **settings)
    for side in ("left", "right"):
        again, others, theirs = step(model, padded(batch, 6, side), teacher, **settings)
        torch.testing.assert_close(again, loss, **CLOSE)
        assert_same(theirs, grads, **CLOSE)
        assert others.keys() == metrics.keys()
        for name in metrics.keys() - set(MEASURES_PADDING):
            torch.testing.assert_close(others[name], metrics[name], **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
        assert others["padding"] > metrics["padding"], "control: there is more of it"
    parts = [
        step(model, part, teacher, items=int(metrics["supervised_tokens"]), **settings) for part in alone(batch, rows)
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), loss, **CLOSE)
    total = {name: sum(part[2].get(name, torch.zeros_like(grad)) for part in parts) for name, grad in grads.items()}
    assert_same(total, grads, **CLOSE)
    if stage is HARD and feature_weight and (rows is RAGGED or teacher == "module"):
        assert metrics["feature_loss"] > 1e-3, "control: there is something to compare"


def test_the_law_of_padding_notices_padding_among_the_features(monkeypatch):
    """Its control: a distance that counts padding among the positions."""
    monkeypatch.setattr(distill, "feature_distance", lambda *arguments: feature_distance(*arguments[:5]))
    model, batch = tiny_llava(dtype=torch.float64), batch_of(TEXT)
    losses = [step(model, each, "module", feature_weight=0.5)[0] for each in (batch, padded(batch, 6, "left"))]
    assert abs(float(losses[0] - losses[1])) > 1e-2


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("compressor", [DART(), FastV()], ids=["DART", "FastV"])
def test_a_module_teacher_runs_on_what_the_student_s_signals_choose(compressor, padding):
    model, other = (tiny_llava(dtype=torch.float64, seed=seed) for seed in (0, 9))
    batch = batch_of(EVEN, padding=padding)
    labels, shape = batch["labels"], batch["input_ids"].shape
    objective = EPIC(compressor, HARD, teacher=other)
    metrics = objective(model, batch, **STEP).metrics
    objective.detach()
    arguments = {"layer": 2, "query": (labels != -100).int().argmax(1) - 1}
    at = functional.pad(labels[:, 1:] != -100, (0, 1), value=False)
    with torch.no_grad():
        dropped = {}
        for name, whose, ratio in (("student", model, 0.8), ("teacher", model, 0.5), ("own", other, 0.5)):
            recording = Recording(compressor)
            with compress(whose, recording, ratio=ratio, **arguments):
                logits = whose(**ids_of(batch)).logits[at].log_softmax(-1)
            dropped[name] = recording.dropped(*shape)
            if name == "student":
                student = logits
        found = {}
        for name in ("teacher", "own"):
            with hidden(other, dropped[name], 2):
                taught = other(**ids_of(batch)).logits[at].log_softmax(-1)
            found[name] = (taught.exp() * (taught - student)).sum(-1).mean()
    assert not (dropped["teacher"] & ~dropped["student"]).any(), "the teacher sees all that the student sees"
    torch.testing.assert_close(metrics["consistency_loss"], found["teacher"])
    assert int(metrics["teacher_tokens"]) == int(((batch["input_ids"] == 99) & ~dropped["teacher"]).sum())
    # The controls: by its own signals the teacher drops what the student keeps, and teaches something else.
    assert (dropped["own"] & ~dropped["student"]).any()
    assert abs(float(found["own"] - found["teacher"])) > 1e-3


def test_a_separate_pass_chooses_for_both_as_the_model_alone_would():
    """With dropout the student's own forward would rank otherwise, and keep what its teacher lacks."""
    model, batch = tiny_llava(dtype=torch.float64, attention_dropout=0.5).train(), batch_of(EVEN)
    query = (batch["labels"] != -100).int().argmax(1) - 1
    kept = {}
    for share in (True, False):
        torch.manual_seed(2)
        recording = Recording(FastV())
        step(model, batch, "self" if share else "separate", compressor=recording)
        (view, one), (same, two) = recording.calls
        assert view is same
        teacher, student = (one, two) if int(one.sum()) > int(two.sum()) else (two, one)
        assert not (student & ~teacher).any()
        kept[share] = student
    model.eval()
    recording = Recording(FastV())
    with torch.no_grad(), compress(model, recording, ratio=0.8, query=query):
        model(**ids_of(batch))
    assert torch.equal(kept[False], recording.calls[0][1])
    assert not torch.equal(kept[True], recording.calls[0][1]), "control: dropout does change the ranking"


def test_a_copy_of_the_student_teaches_what_the_student_itself_does():
    model, batch = tiny_llava(dtype=torch.float64), batch_of(RAGGED)
    loss, _, grads = step(model, batch, "self", feature_weight=0.1)
    again, _, theirs = step(model, batch, copy.deepcopy(model), feature_weight=0.1)
    torch.testing.assert_close(again, loss)
    assert_same(theirs, grads)
    other, _, _ = step(model, batch, "module", feature_weight=0.1)
    assert abs(float(other - loss)) > 1e-2, "control"


@pytest.mark.parametrize("teacher", ["self", "separate", "module"])
def test_the_student_keeps_the_same_whoever_teaches(teacher):
    model, batch, recording = tiny_llava(dtype=torch.float64), batch_of(EVEN), Recording(DART())
    step(model, batch, teacher, compressor=recording)
    masks = [mask for _, mask in recording.calls]
    assert len(masks) == 2, "one view, one choice for each"
    alone_recording = Recording(DART())
    step(model, batch, "self", compressor=alone_recording, weight=0.0)
    ((_, expected),) = alone_recording.calls
    assert any(torch.equal(mask, expected) for mask in masks)


def test_a_module_teacher_runs_under_the_caller_s_autocast():
    """And not under that of a student's forward, within which it runs."""
    model, other, seen = tiny_llava(), tiny_llava(seed=9), []
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    other.get_decoder().layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    model.get_decoder().layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    batch = batch_of(EVEN)
    batch["pixel_values"] = batch["pixel_values"].float()
    objective = EPIC(DART(), HARD, teacher=other)
    objective(model, batch, **STEP)  # looks at the heads of both, too
    seen.clear()
    objective(model, batch, **STEP)
    with torch.autocast("cpu", torch.bfloat16):
        objective(model, batch, **STEP)
    objective.detach()
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]


@pytest.mark.usefixtures("unchecked")
def test_a_teacher_that_cannot_be_handed_the_choice_is_refused():
    model, batch = tiny_llava(dtype=torch.float64), batch_of(EVEN)
    objective = EPIC(DART(), HARD, teacher=model)
    for call in (lambda: objective(model, batch, **STEP), lambda: objective.preflight(model, 10)):
        with pytest.raises(RangeError, match="decoder layers of its own"):
            call()
    other = copy.deepcopy(model)
    other.config.image_token_id = 98
    objective = EPIC(DART(), HARD, teacher=other)
    with pytest.raises(ShapeError, match="takes other positions for visual"):
        objective(model, batch, **STEP)
    other.config.image_token_id = 99
    objective.detach()
    objective(model, batch, **STEP)  # control
    objective.detach()
