"""Losses that are not finite are not handed on in silence."""

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.adapters.test_after_head import text_batch
from tests.adapters.tiny import RAGGED, tiny_batch, tiny_llava
from tests.test_trainer import train
from tokencurric import EPIC, Random
from tokencurric.curriculum import constant
from tokencurric.errors import RangeError
from tokencurric.losses import FiniteLosses, finite

STEP = {"step": 0, "total": 1}
NAN, INFINITE = float("nan"), float("inf")


def objective(losses=None):
    made = EPIC(Random(), constant(0.5, layer=2))
    if losses is not None:
        made._losses = losses
    return made


def spoilt(value):
    model = tiny_llava()
    with torch.no_grad():
        model.lm_head.weight[7] = value
    return model


@pytest.mark.parametrize("value", [NAN, INFINITE])
def test_on_a_cpu_a_step_raises_at_once(value):
    batch = tiny_batch(RAGGED, answers=2)
    with pytest.raises(
        RangeError, match=r"batch gave a loss that is not finite \(layer 2, student ratio 0.500\)\.\nHint"
    ):
        objective()(spoilt(value), batch, **STEP)
    with pytest.raises(RangeError, match=r"not finite \(not compressed\)"):
        objective().uncompressed(spoilt(value), text_batch())
    fine = objective()
    assert fine(tiny_llava(), batch, **STEP).loss.isfinite(), "control"
    fine.check_losses()


class Elsewhere(FiniteLosses):
    """As on a device: numbers are under way until they are let go."""

    def __init__(self):
        super().__init__()
        self.there, self.waits = False, 0

    def watch(self, loss, where):
        flag = torch.isfinite(loss.detach())
        self._on_the_way.append((finite.Arriving(flag, lambda: self.there, self._wait), where))

    def _wait(self):
        self.waits += 1


def test_elsewhere_a_later_step_raises():
    losses = Elsewhere()
    made, model, batch = objective(losses), spoilt(NAN), tiny_batch(RAGGED, answers=2)
    assert made(model, batch, **STEP).loss.isnan(), "handed out, since nobody has looked"
    made(model, batch, **STEP)
    assert losses.waits == 0
    losses.there = True
    with pytest.raises(RangeError, match="not finite"):
        made(model, batch, **STEP)
    with torch.no_grad():
        model.lm_head.weight[7] = 0.0
    made(model, batch, **STEP)  # what came before is reported once
    made.check_losses()


def test_elsewhere_check_losses_waits():
    losses = Elsewhere()
    made = objective(losses)
    made(spoilt(NAN), tiny_batch(RAGGED, answers=2), **STEP)
    with pytest.raises(RangeError, match="not finite"):
        made.check_losses()
    assert losses.waits == 1


def test_a_device_is_not_waited_for(monkeypatch):
    """On `meta`, where nothing can be read: watching goes through, and so does a look at what has not arrived."""
    losses = FiniteLosses()
    losses.watch(torch.tensor(NAN, device="meta"), "here")
    losses.look()
    losses.forget()
    losses.look(wait=True)

    sent = []
    monkeypatch.setattr(
        finite, "send", lambda flag: sent.append(flag) or finite.Arriving(torch.tensor(True), bool, bool)
    )
    losses.watch(torch.tensor(NAN, device="meta"), "here")
    assert sent[0].device.type == "meta", "the truth value goes, not the loss"


def test_no_checkpoint_is_written_after_such_a_loss(tmp_path, monkeypatch):
    run = partial(train, model=None, save_strategy="steps", save_steps=1, max_steps=2, logging_steps=100)

    def folder(name):
        return sorted(each.name for each in Path(tmp_path, name).glob("checkpoint-*"))

    with pytest.raises(RangeError, match="not finite"):
        run(str(tmp_path / "elsewhere"), model=spoilt(NAN), objective=objective(Elsewhere()))
    assert folder("elsewhere") == []
    monkeypatch.setattr(EPIC, "check_losses", lambda self: None)
    run(str(tmp_path / "unchecked"), model=spoilt(NAN), objective=objective(Elsewhere()))
    assert folder("unchecked") == ["checkpoint-1", "checkpoint-2"], "control"


@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_a_training_ends_with_a_look(tmp_path, strategy):
    with pytest.raises(RangeError, match="not finite"):
        train(
            str(tmp_path),
            model=spoilt(NAN),
            objective=objective(Elsewhere()),
            save_strategy=strategy,
            max_steps=-1,
            num_train_epochs=1,
            logging_steps=100,
        )
    assert not list(tmp_path.glob("checkpoint-*"))
