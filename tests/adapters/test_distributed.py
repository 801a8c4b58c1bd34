"""EPIC on two processes: the gradients of one, whatever the ranks' batches hold, and nobody waits for ever."""

import time

import pytest
import torch
from torch import multiprocessing

from tests.adapters import ranks
from tests.adapters.ranks import Case
from tests.adapters.zoo import FAMILIES, tiny_inputs, tiny_model
from tokencurric import DART, EPIC, FastV, Random
from tokencurric.adapters import vision
from tokencurric.adapters.blank import blank_picture
from tokencurric.adapters.discovery import find_parts
from tokencurric.curriculum import constant
from tokencurric.errors import UnsupportedModelError
from tokencurric.testing.models import apart


def on_two(folder, cases, seconds=120):
    """Loss and gradients of each case on two ranks; ranks that hang or break fail the test."""
    context = multiprocessing.spawn(ranks.work, (str(folder), cases), nprocs=2, join=False)
    end = time.monotonic() + seconds

    def where():
        return cases[len(list(folder.glob("*.pt")))]

    try:
        while not context.join(timeout=1):
            if time.monotonic() > end:
                pytest.fail(f"the ranks did not end within {seconds} s, at {where()}")
    except (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException) as error:
        pytest.fail(f"a rank broke at {where()}: {error}")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{number}.pt") for number in range(len(cases))]


def assert_as_one_process(case, found, *, alike=None):
    """Equal, or in low precision `alike`: the least cosine between gradients."""
    loss, theirs = found
    expected, ours = ranks.on_one(case)
    _, half = ranks.on_one(case, 0, 2)
    assert ours.keys() == theirs.keys()
    assert any("project" in name or "merger" in name for name in ours)
    if alike is None:
        torch.testing.assert_close(loss, expected)
        for name in ours:
            torch.testing.assert_close(theirs[name], ours[name], msg=lambda text, name=name: f"{name}: {text}")
        assert any(apart(half[name], ours[name]) > 1e-2 for name in half), "control: a rank's rows left out"
        return
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    assert cosine(theirs, ours) > alike
    assert cosine(half, ours) < alike - 0.05, "control: a rank's rows left out"


def cosine(one, other):
    flat = [torch.cat([grads[name].double().flatten() for name in sorted(one)]) for grads in (one, other)]
    return torch.nn.functional.cosine_similarity(*flat, dim=0).item()


def test_two_ranks_equal_one_process(tmp_path):
    cases = [Case("ddp"), Case("as accelerate", compressor=DART())]
    for case, found in zip(cases, on_two(tmp_path, cases), strict=True):
        assert_as_one_process(case, found)


SLOW = {
    "ddp": [
        Case("ddp", rows="pictures on both"),
        Case("ddp", family="qwen3_vl"),
        Case("ddp", rows="crossed", steps=2, compressor=FastV()),
        Case("ddp", around="checkpointing", compressor=FastV()),
    ],
    "fsdp": [
        Case("in parts", rows="pictures on both"),
        Case("in parts"),
        Case("in parts", options={"feature_weight": 0.3}),
        Case("in parts", options={"share_prefix": False}),
        Case("as accelerate", family="qwen3_vl", compressor=FastV()),
        Case("decoder apart", compressor=DART()),
    ],
    "fsdp-accumulated": [
        Case("in parts", rows="crossed", steps=2),
        Case("as accelerate", rows="crossed", steps=2, compressor=DART()),
    ],
    "fsdp-checkpointed": [
        Case("in parts", around="checkpointing", compressor=FastV()),
        Case("in parts", around="wrapper", compressor=DART()),
        Case("as accelerate", around="wrapper", compressor=FastV(), rows="crossed", steps=2),
    ],
    "fsdp-taught": [Case("decoder apart", foreign=True), Case("as accelerate", foreign=True, compressor=DART())],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_on_two_ranks(tmp_path, name):
    for case, found in zip(SLOW[name], on_two(tmp_path, SLOW[name]), strict=True):
        assert_as_one_process(case, found)


@pytest.mark.slow
def test_low_precision_on_two_ranks(tmp_path):
    cases = [Case("ddp", around="autocast"), Case("as accelerate", around="policy", options={"feature_weight": 0.3})]
    for case, found in zip(cases, on_two(tmp_path, cases), strict=True):
        assert_as_one_process(case, found, alike=0.99)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "in parts"])
def test_without_a_ghost_the_ranks_part(tmp_path, wrap):
    """The control of all the others: the text-only rank misses what the other waits for."""
    with pytest.raises(pytest.fail.Exception, match=r"a rank broke|did not end"):
        on_two(tmp_path, [Case(wrap, ghost=False)], seconds=90)


@pytest.mark.parametrize("mark", ["param_idx_in_group", None], ids=["ZeRO-2", "control"])
def test_gradients_come_in_the_order_of_a_rank_with_pictures(mark, monkeypatch):
    """ZeRO-1 and 2 sum what ranks made at the same place of their order, whatever weight it is of."""
    monkeypatch.setattr(vision.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(vision.distributed, "get_world_size", lambda: 2)

    def order(rows):
        model, names = tiny_model("llava").train(), []
        for name, weight in model.named_parameters():
            weight.register_post_accumulate_grad_hook(lambda _, name=name: names.append(name))
            if mark is not None:
                setattr(weight, mark, 0)
        inputs = {name: value for name, value in tiny_inputs("llava", rows, padding="right").items() if len(value)}
        labels = torch.where(inputs["input_ids"] > 0, inputs["input_ids"], -100)
        labels[:, :-2] = -100
        EPIC(Random(), constant(0.75, margin=0.5, layer=1))(model, inputs | {"labels": labels}, 0, 1).loss.backward()
        return names

    assert (order(((20,),)) == order(((3, "I", 9),))) == (mark is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_blank_picture_reaches_the_weights_that_a_picture_reaches(family):
    model = tiny_model(family)
    parts = find_parts(model)
    if family == "llama4":
        with pytest.raises(UnsupportedModelError, match="does not return what it puts among the tokens"):
            vision._features_of(parts, blank_picture(parts))
        return
    model(**tiny_inputs(family)).logits.sum().backward()
    names = {id(weight): name for name, weight in model.named_parameters()}

    def reached():
        return {names[id(weight)] for weight in vision._vision_weights(parts) if weight.grad is not None}

    expected = reached()
    model.zero_grad()
    ghost = vision._features_of(parts, blank_picture(parts))
    ghost.backward()
    assert ghost.item() == 0.0
    assert reached() == expected
    assert len(expected) > 4
