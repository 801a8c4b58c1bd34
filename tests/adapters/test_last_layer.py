"""The last layer computes what is looked at, and nothing shows but the time."""

from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from tests.adapters.tiny import DEPTH, RAGGED, tiny_batch, tiny_llava
from tests.adapters.zoo import FAMILIES, IMAGE, tiny_inputs, tiny_model
from tokencurric import DART, EPIC, FastV, Random, Uniform
from tokencurric.adapters.hugging_face import TransformersSeam
from tokencurric.adapters.last_layer import LastLayer, Positions, position_wise
from tokencurric.curriculum import constant

HARD = constant(0.8, margin=0.3)
STEP = {"step": 3, "total": 10, "seed": 5}


def positions_seen(model, objective, batch):
    """How many positions each projection and MLP was run on, by layer and name."""
    seen, handles = defaultdict(list), []
    for number, layer in enumerate(model.get_decoder().layers):
        for name, module in layer.named_modules():
            short = name.removeprefix("self_attn.")
            if short in ("q_proj", "k_proj", "v_proj", "o_proj", "mlp"):
                inner = module.gate_proj if short == "mlp" else module
                note = seen[number, short].append
                handles.append(inner.register_forward_hook(lambda m, a, o, note=note: note(a[0].shape[:2].numel())))
    out = objective(model, batch, **STEP)
    for handle in handles:
        handle.remove()
    return out, dict(seen)


def test_the_last_layer_runs_where_a_token_is_predicted():
    batch = tiny_batch(RAGGED, answers=2)
    count = int((batch["labels"] != -100).sum())
    model, objective = tiny_llava().train(), EPIC(DART(), HARD)
    objective.attach(model)
    out, seen = positions_seen(model, objective, batch)
    for name in ("q_proj", "mlp", "o_proj"):
        # The hook that counts comes after ours where it is on the same module, so it sees what ours put in.
        assert seen[DEPTH - 1, name] == [count, count], "teacher's and student's"
        assert min(seen[DEPTH - 2, name]) > 2 * count
    for name in ("k_proj", "v_proj"):
        assert seen[DEPTH - 1, name] == seen[DEPTH - 2, name], "keys and values are of all"
    assert int(out.metrics["supervised_tokens"]) == count

    _, seen = positions_seen(model, lambda model, batch, **_: objective.uncompressed(model, batch), batch)
    assert seen[DEPTH - 1, "mlp"] == [count], "plain fine-tuning as well"


def test_control_all_positions_where_features_are_compared():
    batch = tiny_batch(RAGGED, answers=2)
    _, seen = positions_seen(tiny_llava(), EPIC(DART(), HARD, feature_weight=0.1), batch)
    assert seen[DEPTH - 1, "mlp"] == seen[DEPTH - 2, "mlp"]


def gradients(model, objective, batch):
    model.zero_grad()
    out = objective(model, batch, **STEP)
    out.loss.backward()
    return out.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


WHOLE = {"llama4"}  # its experts see all positions


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "aya_vision"])  # which EPIC refuses
def test_nothing_changes_but_the_work(family, monkeypatch):
    model, inputs = tiny_model(family, dtype=torch.float64), tiny_inputs(family, padding="left")
    inputs = {name: each.double() if each.is_floating_point() else each for name, each in inputs.items()}
    ids = inputs["input_ids"]
    inputs["labels"] = torch.where((inputs["attention_mask"].cumsum(1) > 20) & (ids < IMAGE - 5) & (ids > 0), ids, -100)
    arguments = {"compressor": Uniform(), "curriculum": constant(0.8, margin=0.4, layer=1)}
    short = []
    with monkeypatch.context() as patch:
        before = LastLayer._before

        def noted(self, module, args, kwargs):
            found = before(self, module, args, kwargs)
            short.append(found is not None)
            return found

        patch.setattr(LastLayer, "_before", noted)
        loss, ours = gradients(model, EPIC(**arguments), inputs)
    assert any(short) == (family not in WHOLE), "control: something was left out"
    monkeypatch.setattr(TransformersSeam, "position_wise", lambda self, layer: None)
    whole, theirs = gradients(tiny_model(family, dtype=torch.float64), EPIC(**arguments), inputs)
    torch.testing.assert_close(loss, whole)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda m, name=name: f"{name}: {m}")


def test_two_positions_that_fall_together_count_once_each():
    rows, slots = torch.tensor([0, 0, 1]), torch.tensor([2, 2, 0])
    some = Positions(rows, slots, (2, 3))
    states = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(4, 5, dtype=torch.float64)
    found, weights = some.put_back(layer(some.pick(states))), torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    expected = layer(states)
    at = expected[rows, slots]
    torch.testing.assert_close(found[rows, slots], at)
    assert not found[0, :2].any() and not found[1, 1:].any()
    parameters = (states, layer.weight, layer.bias)
    ours = torch.autograd.grad((found[rows, slots].sum(1) * weights).sum(), parameters)
    theirs = torch.autograd.grad((at.sum(1) * weights).sum(), parameters)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_that_broke_off_leaves_the_model_whole(checkpointing):
    """Whatever is left of a step, the next call of the model sees all positions."""
    model, batch = tiny_llava().train(), tiny_batch(RAGGED, answers=2)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    expected = model(**inputs).logits
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    objective = EPIC(Random(), HARD)
    objective(model, batch, **STEP).loss.backward()
    torch.testing.assert_close(model(**inputs).logits, expected)

    down = model.get_decoder().layers[-1].mlp.down_proj

    def fail(module, args):
        raise RuntimeError("broken")

    handle = down.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        objective(model, batch, **STEP)
    handle.remove()
    assert objective._attached._last._run.positions is None
    assert not objective._attached._last._run.short
    torch.testing.assert_close(model(**inputs).logits, expected)
    if checkpointing:
        loss = objective(model, batch, **STEP).loss
        handle = down.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="broken"):
            loss.backward()
        handle.remove()
        torch.testing.assert_close(model(**inputs).logits, expected)
    objective.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.get_decoder().layers[-1].modules())


class Blocks(nn.Module):
    """A layer's parts, to look at."""

    def __init__(self, mlp) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), mlp
        self.self_attn.q_proj = nn.Linear(2, 2)

    def forward(self, hidden, **others):
        return hidden


class Closed(Blocks):
    def forward(self, hidden):
        return hidden


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))


def dense():
    return nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))


def test_what_is_known_to_treat_positions_alone():
    layer = Blocks(dense())
    layer.norm = nn.RMSNorm(2)
    assert position_wise(layer, layer.self_attn).modules == (layer.self_attn.q_proj, layer.mlp)
    layer.mlp.register_forward_hook(lambda module, args, output: None)
    assert position_wise(layer, layer.self_attn).modules == (layer.self_attn.q_proj,), "somebody looks at the other"


def with_convolution():
    layer = Blocks(dense())
    layer.after = nn.Conv1d(2, 2, 3)
    return layer


def with_activated_lora():
    """As PEFT notes it: from where on it acts depends on the whole sequence."""
    layer = Blocks(dense())
    layer.self_attn.q_proj.lora_variant = {"default": type("ALoraLinearVariant", (), {})()}
    return layer


UNCLEAR = {
    "keyword arguments are not handed on": lambda: Closed(dense()),
    "a convolution for an MLP": lambda: Blocks(nn.Conv1d(2, 2, 3)),
    "a convolution elsewhere": with_convolution,
    "a router": lambda: Blocks(nn.Sequential(Router(), nn.Linear(2, 2))),
    "experts": lambda: Blocks(nn.ModuleList([nn.Linear(2, 2)])),
    "activated LoRA": with_activated_lora,
}


@pytest.mark.parametrize("make", UNCLEAR.values(), ids=UNCLEAR)
def test_what_is_not_clear_runs_as_it_is(make):
    layer = make()
    assert position_wise(layer, layer.self_attn) is None


@pytest.mark.parametrize("name", ["self_attn", "mlp"])
def test_a_part_of_the_layer_may_be_checkpointed(name):
    plain, checkpointed = (tiny_llava(dtype=torch.float64).train() for _ in range(2))
    batch = tiny_batch(RAGGED, answers=2)
    batch["pixel_values"] = batch["pixel_values"].double()
    kind = type(getattr(plain.get_decoder().layers[0], name))
    apply_activation_checkpointing(checkpointed, check_fn=lambda module: isinstance(module, kind))
    loss, ours = gradients(checkpointed, EPIC(Random(), HARD), batch)
    expected, theirs = gradients(plain, EPIC(Random(), HARD), batch)
    torch.testing.assert_close(loss, expected)
    ours = {name.replace("_checkpoint_wrapped_module.", ""): each for name, each in ours.items()}
    assert ours.keys() == theirs.keys()
    for name, each in ours.items():
        torch.testing.assert_close(each, theirs[name])


def test_attention_that_is_read_is_that_of_all():
    """FastV at the last layer listens to the one below, which is whole; that layer itself runs on a part."""
    model, batch = tiny_llava(dtype=torch.float64).train(), tiny_batch(RAGGED, answers=2)
    batch["pixel_values"] = batch["pixel_values"].double()
    found = []
    for whole in (False, True):
        objective = EPIC(FastV(), constant(0.8, margin=0.3, layer=DEPTH - 1), feature_weight=1e-12 if whole else 0)
        loss, grads = gradients(model, objective, batch)
        objective.detach()
        found.append((loss, grads))
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, grad in found[0][1].items():
        torch.testing.assert_close(grad, found[1][1][name], rtol=1e-6, atol=1e-9)
