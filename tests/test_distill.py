"""EPIC's loss and gradients against whole, separate forward passes that share nothing."""

import copy
from dataclasses import replace

import jaxtyping
import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn import functional

from tests.adapters.tiny import DEPTH, EVEN, RAGGED, tiny_batch, tiny_llava
from tokencurric import DART, EPIC, ConsistencyLoss, Curriculum, FastV, Random, Uniform, compress, lcd, tcd
from tokencurric.compressors import Tags
from tokencurric.curriculum import DeepToShallow, Stage, constant
from tokencurric.errors import MissingSignalError, RangeError, StateError, UnsupportedModelError
from tokencurric.losses import jensen_shannon
from tokencurric.testing.models import Recording

HARD = constant(0.8, margin=0.3)
STEP = {"step": 3, "total": 10, "seed": 5}


@pytest.fixture
def model():
    return tiny_llava(dtype=torch.float64)


def batch_of(rows=RAGGED, **arguments):
    batch = tiny_batch(rows, answers=2, **arguments)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    return batch


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(ours, reference, **tolerance):
    assert ours.keys() == reference.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], reference[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def two_passes(model, batch, objective, stage: Stage):
    """The loss as it is written: two whole forwards, all logits, nothing shared."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "row_key")}
    labels = batch["labels"]
    query = (labels != -100).int().argmax(1) - 1
    arguments = {"layer": stage.layer, "seed": stage.seed, "query": query, "row_key": batch.get("row_key")}
    with torch.no_grad(), compress(model, objective.compressor, ratio=stage.teacher, **arguments):
        teacher = model(**inputs).logits
    context = compress(model, objective.compressor, ratio=stage.student, **arguments)
    with context:
        student = model(**inputs).logits
        at = functional.pad(labels[:, 1:] != -100, (0, 1), value=False)
        targets = labels[:, 1:][at[:, :-1]]
        sft = functional.cross_entropy(student[at], targets)
        p, q = teacher[at].log_softmax(-1), student[at].log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).mean()
        loss = (1 - objective.weight) * sft + objective.weight * kl
        loss.backward()
    return loss.detach(), kl.detach()


@pytest.mark.parametrize("rows", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("compressor", [DART(), FastV(), Random(), Uniform()], ids=lambda c: type(c).__name__)
def test_loss_and_gradients_equal_two_whole_passes(model, compressor, padding, rows):
    batch = batch_of(rows, padding=padding)
    objective = EPIC(compressor, HARD)
    out = objective(model, batch, **STEP)
    out.loss.backward()
    ours = gradients(model)
    objective.detach()
    loss, kl = two_passes(model, batch, objective, out.stage)
    torch.testing.assert_close(out.loss.detach(), loss)
    assert_same(ours, gradients(model))
    assert kl > 1e-3, "control: teacher and student have to differ"
    torch.testing.assert_close(out.metrics["consistency_loss"], kl)


def test_sharing_the_prefix_changes_nothing(model):
    batch = batch_of()
    results, calls = [], []
    for share in (True, False):
        ran = []
        layers = model.get_decoder().layers
        objective = EPIC(DART(), lcd(), share_prefix=share)
        objective.attach(model)  # which runs layers, too
        hooks = [each.register_forward_hook(lambda m, a, o, ran=ran: ran.append(m)) for each in layers]
        out = objective(model, batch, step=6, total=10)
        out.loss.backward()
        results.append((out.loss.detach(), gradients(model)))
        calls.append([ran.count(each) for each in layers])
        objective.detach()
        for hook in hooks:
            hook.remove()
    assert calls == [[1] * out.stage.layer + [2] * (DEPTH - out.stage.layer), [2] * DEPTH]
    torch.testing.assert_close(*[r[0] for r in results])
    assert_same(results[0][1], results[1][1])


@pytest.mark.parametrize("feature_weight", [0, 0.1])
@pytest.mark.parametrize("how", ["transformers", "reentrant", "wrapper"])
@pytest.mark.parametrize("compressor", [DART(), Random()], ids=lambda c: type(c).__name__)
def test_gradient_checkpointing_changes_nothing(compressor, how, feature_weight):
    plain, checkpointed = tiny_llava(dtype=torch.float64).train(), tiny_llava(dtype=torch.float64).train()
    batch = batch_of()
    if how != "wrapper":
        checkpointed.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    else:
        kind = type(checkpointed.get_decoder().layers[0])
        apply_activation_checkpointing(checkpointed, check_fn=lambda m: isinstance(m, kind))
    found, calls = [], []
    for model in (plain, checkpointed):
        ran = []
        objective = EPIC(compressor, HARD, feature_weight=feature_weight)
        objective.attach(model)  # which runs layers, too
        layer = model.get_decoder().layers[0]
        getattr(layer, "_checkpoint_wrapped_module", layer).mlp.register_forward_pre_hook(
            lambda m, a, ran=ran: ran.append(m)
        )
        calls.append(ran)
        out = objective(model, batch, **STEP)
        out.loss.backward()
        found.append({name.replace("_checkpoint_wrapped_module.", ""): g for name, g in gradients(model).items()})
        objective.detach()
    assert_same(found[1], found[0])
    assert (len(calls[0]), len(calls[1])) == (1, 2), "control: the layer did run again"


def test_micro_batches_add_up_to_the_batch(model):
    batch = {**batch_of(), "row_key": torch.tensor([11, 12, 13])}
    items = (batch["labels"] != -100).sum()
    objective = EPIC(Random(), HARD, feature_weight=0.1)
    whole = objective(model, batch, **STEP, num_items=items)
    whole.loss.backward()
    expected = gradients(model)
    pictures = [slice(0, 1), slice(1, 3), slice(3, 3)]
    total = 0.0
    for row, picture in enumerate(pictures):
        part = {k: v[row : row + 1] for k, v in batch.items() if k != "pixel_values"}
        if row < 2:
            part["pixel_values"] = batch["pixel_values"][picture]
        out = objective(model, part, **STEP, num_items=items)
        out.loss.backward()
        total += out.loss.detach()
    torch.testing.assert_close(total, whole.loss.detach())
    assert_same(gradients(model), expected)
    mean = objective(model, {k: v[:1] for k, v in batch.items()}, **STEP).loss.detach()
    assert not torch.isclose(mean, total), "control: a mean of a micro-batch is something else"


def test_selection_never_sees_the_answer(model):
    batch = batch_of(EVEN, padding="right")
    kept = []
    for change in (0, 1):
        recording = Recording(DART())
        ids = batch["input_ids"].clone()
        ids[:, -1] += change
        objective = EPIC(recording, HARD)
        objective(model, {**batch, "input_ids": ids}, **STEP)
        objective.detach()
        kept.append(recording.calls[0][1])
    assert torch.equal(*kept)
    seen = [kept[0]]
    for change in range(1, 6):  # control: the last prompt token does matter
        recording, ids = Recording(FastV()), batch["input_ids"].clone()
        ids[:, -3] += change
        objective = EPIC(recording, HARD)
        objective(model, {**batch, "input_ids": ids}, **STEP)
        objective.detach()
        seen.append(recording.calls[0][1])
    assert any(not torch.equal(seen[1], other) for other in seen[2:])


def test_a_stage_that_compresses_nothing_is_plain_fine_tuning(model):
    batch = batch_of()
    expected = model(**batch).loss.double()
    objective = EPIC(DART(), lcd())
    out = objective(model, batch, step=0, total=10)
    assert out.stage.layer == DEPTH
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=1e-6)  # the model's own is in float32
    torch.testing.assert_close(objective.uncompressed(model, batch).loss, out.loss)
    later = objective(model, batch, step=9, total=10)
    objective.detach()
    assert later.stage.layer < DEPTH and not torch.isclose(later.loss, expected)


def test_a_model_s_own_loss_under_compress_is_the_student_s(model):
    batch = batch_of(padding="right")
    objective = EPIC(DART(), HARD, weight=0.0)
    out = objective(model, batch, **STEP)
    objective.detach()
    with compress(model, DART(), ratio=0.8):
        own = model(**batch).loss.double()
    torch.testing.assert_close(out.loss, own, rtol=1e-6, atol=1e-6)
    assert not torch.isclose(own, model(**batch).loss.double())


def test_text_only_and_unsupervised_batches(model):
    text = batch_of(((6,), (9,)))
    objective = EPIC(FastV(), HARD)
    out = objective(model, text, **STEP)
    expected = model(**text).loss.double()
    torch.testing.assert_close(out.loss, 0.3 * expected, rtol=1e-6, atol=1e-6)  # teacher and student agree exactly
    assert float(out.metrics["consistency_loss"]) == 0.0
    nothing = batch_of()
    nothing["labels"] = torch.full_like(nothing["labels"], -100)
    out = objective(model, nothing, **STEP)
    out.loss.backward()
    objective.detach()
    assert out.loss.item() == 0.0
    zeros = gradients(model)
    assert all(float(g.abs().max()) == 0.0 for g in zeros.values())
    # Every weight, the head's too: a rank without one would keep the others waiting.
    objective = EPIC(FastV(), HARD)
    objective(model, batch_of(), **STEP).loss.backward()
    objective.detach()
    assert zeros.keys() == gradients(model).keys()


def test_a_predictor_that_was_dropped(model):
    """The answer begins right after the picture: cross-entropy takes the kept position before, consistency skips."""
    batch = batch_of(((3, "I", 2),), padding="right")

    class KeepFirst:
        needs = frozenset()
        tags = Tags(uses_position=True)

        def __call__(self, view, keep, *, seed=0):
            return view.mask & (view.rank < keep[:, None])

    objective = EPIC(KeepFirst(), HARD)
    out = objective(model, batch, **STEP)
    objective.detach()
    assert int(out.metrics["displaced_tokens"]) == 1
    with compress(model, KeepFirst(), ratio=0.8, layer=2):
        student = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]).logits
    with compress(model, KeepFirst(), ratio=0.5, layer=2):
        teacher = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]).logits
    first = 3 + 15  # the last visual token predicts the first answer token; 3 of 16 are kept
    sft = functional.cross_entropy(student[0, first : first + 2], batch["labels"][0, -2:])
    p, q = teacher[0, first + 1].log_softmax(-1), student[0, first + 1].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum()
    torch.testing.assert_close(out.metrics["sft_loss"], sft)
    torch.testing.assert_close(out.metrics["consistency_loss"], kl / 2)


class About(Random):
    """Keeps about as many as it is asked to."""

    tags = Tags(exact=False)

    def __call__(self, view, keep, *, seed=0):
        return super().__call__(view, keep, seed=seed) & (view.rank % 5 > 0)


@pytest.mark.parametrize("rows", [RAGGED, EVEN, ((6,), (9,))], ids=["ragged", "even", "text-only"])
@pytest.mark.parametrize("compressor", [Random(), About()], ids=["exact", "inexact"])
def test_padding_is_counted_before_and_after_compression(model, compressor, rows):
    batch, recording = batch_of(rows), Recording(compressor)
    objective = EPIC(recording, constant(0.8), weight=0.0)
    metrics = objective(model, batch, **STEP).metrics
    real = batch["attention_mask"].bool()
    left = real & ~recording.dropped(*real.shape) if recording.calls else real
    before, after = (1 - each.sum() / (each.sum(1).max() * len(each)) for each in (real, left))
    assert metrics["padding"] == pytest.approx(float(before), abs=1e-6)
    assert float(metrics["student_padding"]) == pytest.approx(float(after), abs=1e-6)
    assert isinstance(metrics["student_padding"], float)
    if rows is RAGGED:
        assert abs(float(after) - float(before)) > 0.05, "control: compression changes it"
    uncompressed = objective.uncompressed(model, batch).metrics
    assert uncompressed["student_padding"] == uncompressed["padding"] == metrics["padding"]


def test_feature_loss_is_the_distance_at_positions_both_keep(model):
    batch = batch_of(EVEN)
    recording = Recording(Uniform())
    objective = EPIC(recording, constant(0.8, margin=0.8), weight=0.0, feature_weight=1.0)
    out = objective(model, batch, **STEP)
    objective.detach()
    states = {}
    for name, ratio in (("student", 0.8), ("teacher", 0.0)):
        seen = []
        layers = model.get_decoder().layers[2:]
        hooks = [each.register_forward_hook(lambda m, a, o, seen=seen: seen.append(o)) for each in layers]
        with torch.no_grad(), compress(model, Uniform(), ratio=ratio):
            model(**{k: v for k, v in batch.items() if k != "labels"})
        for hook in hooks:
            hook.remove()
        states[name] = seen
    student_call = next(mask for view, mask in recording.calls if int(mask.sum()) < 32)
    visual = batch["input_ids"] == 99
    kept = torch.ones_like(visual)
    kept[visual] = student_call.flatten()
    each = [(s - t[kept].view_as(s)).square().mean() for s, t in zip(states["student"], states["teacher"], strict=True)]
    torch.testing.assert_close(out.metrics["feature_loss"].double(), torch.stack(each).mean(), rtol=1e-5, atol=1e-6)
    assert float(out.metrics["feature_loss"]) > 0.01


def test_a_teacher_of_its_own(model):
    batch, other = batch_of(), tiny_llava(dtype=torch.float64, seed=9)
    objective = EPIC(DART(), constant(0.8, margin=0.8), teacher=other)
    out = objective(model, batch, **STEP)
    out.loss.backward()
    objective.detach()
    assert not gradients(other)
    at = functional.pad(batch["labels"][:, 1:] != -100, (0, 1), value=False)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad(), compress(model, DART(), ratio=0.8, query=(batch["labels"] != -100).int().argmax(1) - 1):
        q = model(**inputs).logits[at].log_softmax(-1)
    p = other(**inputs).logits.detach()[at].log_softmax(-1)
    torch.testing.assert_close(out.metrics["consistency_loss"], (p.exp() * (p - q)).sum(-1).mean())


def test_dropout_leaves_the_teacher_and_the_random_state_alone():
    model = tiny_llava(attention_dropout=0.5).train()
    batch = tiny_batch(answers=2)
    states = []
    for weight in (0.0, 0.7):
        torch.manual_seed(3)
        objective = EPIC(Uniform(), HARD, weight=weight)
        out = objective(model, batch, **STEP)
        objective.detach()
        states.append((torch.get_rng_state(), out.metrics["sft_loss"]))
    assert torch.equal(states[0][0], states[1][0])
    torch.testing.assert_close(states[0][1], states[1][1])
    assert all(layer.training for layer in model.get_decoder().layers)
    torch.manual_seed(4)
    objective = EPIC(Uniform(), HARD)
    assert not torch.isclose(objective(model, batch, **STEP).metrics["sft_loss"], states[1][1]), "control"
    objective.detach()


def test_hooks_leave_no_trace(model):
    def trace():
        modules = list(model.modules())
        return (
            [(type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
            [len(m._forward_hooks_with_kwargs) + len(m._forward_pre_hooks_with_kwargs) for m in modules],
            model.config.to_dict(),
            {name: value.clone() for name, value in model.state_dict().items()}.keys(),
            [id(m.config) for m in modules if hasattr(m, "config")],
        )

    batch = batch_of()
    model(**batch)  # transformers sets up some of its own on the first call
    before = trace()
    objective = EPIC(FastV(), tcd())
    objective(model, batch, **STEP)
    assert trace() != before, "control"
    with pytest.raises(ValueError, match="do not match"):
        objective(model, {**batch, "pixel_values": batch["pixel_values"][:1]}, **STEP)
    objective.detach()
    assert trace() == before

    class Broken:
        needs, tags = FastV.needs, FastV.tags

        def __call__(self, view, keep, *, seed=0):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), compress(model, Broken(), keep=3):
        model(**batch)
    assert trace() == before
    for number in range(DEPTH):
        hook = model.get_decoder().layers[number].mlp.register_forward_pre_hook(lambda m, a: 1 / 0)
        with pytest.raises(ZeroDivisionError), compress(model, FastV(), keep=3, layer=3):
            model(**batch)
        hook.remove()
        assert trace() == before


def test_errors(model, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # our own words, not the type checker's
    batch = batch_of()
    with pytest.raises(RangeError, match="0 <= weight <= 1"):
        EPIC(DART(), tcd(), weight=1.5)
    with pytest.raises(RangeError, match="feature_weight >= 0"):
        EPIC(DART(), tcd(), feature_weight=-1)
    with pytest.raises(RangeError, match="or a module"):
        EPIC(DART(), tcd(), teacher="other")
    unnested = Recording(Random())
    unnested.tags = replace(Random.tags, nested=False)
    with pytest.raises(RangeError, match="nested"):
        EPIC(unnested, tcd())
    EPIC(unnested, tcd(), allow_unnested=True)
    objective = EPIC(DART(), tcd(), loss=ConsistencyLoss(divergence=jensen_shannon))
    with pytest.raises(StateError, match="input_ids and labels"):
        objective(model, {"input_ids": batch["input_ids"]}, **STEP)
    with pytest.raises(StateError, match="attached to another"):
        objective(tiny_llava(), batch, **STEP)
    objective.detach()
    to_the_bottom = EPIC(FastV(), lcd(last=0))
    with pytest.raises(MissingSignalError, match="layer=0"):
        to_the_bottom.preflight(model, 100)
    EPIC(FastV(), lcd(last=1)).preflight(model, 100)
    EPIC(Random(), lcd(last=0)).preflight(model, 100)
    deep = Curriculum(low=tcd().low, high=tcd().high, margin=tcd().margin, layer=DeepToShallow(last=2))
    assert deep.at(9, 10, layers=DEPTH).layer == 2


def test_a_teacher_has_to_fit(model):
    batch = batch_of()
    for teacher, error, words in (
        (torch.nn.Linear(2, 2), UnsupportedModelError, "no decoder layers"),
        (tiny_llava().model, UnsupportedModelError, "output head"),
        (tiny_llava(depth=2, dtype=torch.float64), RangeError, "a teacher that has layer 2"),
    ):
        objective = EPIC(DART(), HARD, teacher=teacher)
        for _ in range(2):  # and not only the first time
            with pytest.raises(error, match=words):
                objective(model, batch, **STEP)
        with pytest.raises(error, match=words):
            objective.preflight(model, 10)
        objective.detach()


def test_nesting_is_refused_also_once_attached(model):
    batch, objective = batch_of(), EPIC(DART(), HARD)
    objective(model, batch, **STEP)
    with compress(model, DART(), keep=3):
        for call in (objective, objective.uncompressed):
            arguments = STEP if call is objective else {}
            with pytest.raises(StateError, match="Only one compression"):
                call(model, batch, **arguments)
    objective(model, batch, **STEP)
    objective.detach()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_labels_that_cover_everything(model, padding):
    """As collators make them that only leave out padding: pictures, and each row's first token, included."""
    batch = batch_of(((3, "I", 5), ("I", 2), (6,)), padding=padding)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    recording = Recording(FastV())
    objective = EPIC(recording, HARD)
    out = objective(model, batch, **STEP)
    objective.detach()
    assert out.metrics["supervised_tokens"] == (3 + 16 + 5 - 1) + (16 + 2 - 1) + (6 - 1)
    view = recording.calls[0][0]
    assert not view.text_valid[:2].any(), "the answer begins right after the picture: there is no prompt text"
    later = {**batch, "input_ids": batch["input_ids"].clone()}
    later["input_ids"][0, -1 if padding == "left" else 23] += 1
    again = Recording(FastV())
    objective = EPIC(again, HARD)
    objective(model, later, **STEP)
    objective.detach()
    assert torch.equal(again.calls[0][0].attention[:2], view.attention[:2])


def test_a_target_never_predicts_itself(model):
    """Everything before the answer is dropped: nothing is left to predict its first token."""
    batch = batch_of((("I", 2),), padding="right")
    objective = EPIC(Uniform(), constant(1.0, margin=0.5), weight=0.0)
    out = objective(model, batch, **STEP)
    with compress(model, Uniform(), ratio=1.0, layer=2):
        logits = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]).logits
    objective.detach()
    second = functional.cross_entropy(logits[0, -2:-1], batch["labels"][0, -1:], reduction="sum")
    torch.testing.assert_close(out.metrics["sft_loss"] * 2, second)


def test_selection_is_the_same_under_autocast():
    model, batch = tiny_llava(), tiny_batch(answers=2)
    kept = []
    for compressor in (DART(), FastV()):
        view = None
        for enabled in (False, True):
            recording = Recording(compressor)
            with torch.no_grad(), compress(model, recording, keep=5):
                model(**batch)
            view = recording.calls[0][0] if view is None else view
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                kept.append(compressor(view, 5))
        assert torch.equal(kept[-1], kept[-2])


def test_a_failed_attach_leaves_no_half(model):
    """An objective that could not get at its teacher does not teach itself at the next call."""
    batch, teacher = batch_of(), tiny_llava(seed=9)
    objective = EPIC(Uniform(), constant(0.8, margin=0.8), teacher=teacher)
    expected = EPIC(Uniform(), constant(0.8, margin=0.8), teacher=teacher)(model, batch, **STEP).loss
    alone = EPIC(Uniform(), constant(0.8, margin=0.8))(model, batch, **STEP).loss
    with compress(teacher, Uniform(), keep=4), pytest.raises(StateError, match="Only one compression"):
        objective(model, batch, **STEP)
    torch.testing.assert_close(objective(model, batch, **STEP).loss, expected)
    assert float((alone - expected).detach().abs()) > 1e-3, "control"
    with compress(teacher, Uniform(), keep=4), pytest.raises(StateError, match="Only one compression"):
        objective(model, batch, **STEP)
    objective.detach()


def test_the_teacher_s_head_draws_no_dropout(model):
    """With a head that drops inputs in training, the teacher's logits are still those of evaluation."""
    model, seen = copy.deepcopy(model).train(), []

    class Dropping(torch.nn.Linear):
        def forward(self, hidden):
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(torch.nn.functional.dropout(hidden, 0.5, self.training))

    head = Dropping(32, 100, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    objective = EPIC(Uniform(), constant(0.8, margin=0.4))
    objective(model, batch_of(), **STEP)
    objective.detach()
    assert (False, False) in seen, "the teacher"
    assert (True, True) in seen, "the student"
    assert not [training for training, learns in seen if training and not learns]
    assert head.training
