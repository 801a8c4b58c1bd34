"""The hand-written model of the example: its run, and that it can learn."""

import sys

import pytest
import torch

from examples import custom_mllm
from examples.custom_mllm import Adapter, HandwrittenMLLM, batch_of, train
from tokencurric import EPIC, Random, tcd


def test_it_runs_and_prints_a_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["custom_mllm.py", "--steps", "2", "--questions", "8"])
    custom_mllm.main()
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[-6:] == ["64", "16", "8", "4", "2", "1"]
    assert [row.split()[0] for row in rows] == ["base", "plain", "epic"]
    assert all(len(row.split()) == 7 for row in rows)


def test_a_picture_shows_what_is_asked_for():
    batch = batch_of(400, seed=3)
    colours, textures = batch["pictures"][..., :8].sum(1), batch["pictures"][..., 8:16].sum(1)
    answers = batch["labels"][:, -3:]
    named = torch.stack((4 + colours.argmax(1), 12 + textures.argmax(1)), 1)
    assert (named == answers[:, :2]).float().mean() > 0.9
    few = torch.stack((4 + batch["pictures"][:, 0, :8].argmax(1), 12 + batch["pictures"][:, 0, 8:16].argmax(1)), 1)
    assert (few == answers[:, :2]).float().mean() < 0.6, "control: one patch does not tell"


@pytest.mark.parametrize("compressed", [False, True])
def test_training_lowers_the_loss(compressed):
    torch.manual_seed(0)
    model = HandwrittenMLLM(width=32, depth=3, heads=2)
    objective = EPIC(Random(), tcd(layer=1), adapter=Adapter)
    before = objective.uncompressed(model, batch_of(32, seed=9)).loss.item()
    train(model, objective, 20, compressed=compressed)
    after = objective.uncompressed(model, batch_of(32, seed=9)).loss.item()
    assert after < 0.9 * before
