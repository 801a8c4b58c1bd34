"""Checkpoints are whole or absent: what damages one, what resuming takes, what a kill or a full disk leaves."""

import json
import logging
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.training import kills
from tests.training.nursery import Nursery
from tests.training.rows import Rows, digest, make_trainer
from tokencurric import EPIC, Random, checkpoints, lcd
from tokencurric.checkpoints import UNFINISHED, numbered, put_in_place, recover, rotate, seal
from tokencurric.defects import CONTENTS, defect
from tokencurric.errors import StateError

STATES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished training with all its checkpoints, and the hash of its weights."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = make_trainer(folder, save_total_limit=None)
    trainer.train()
    return folder, digest(trainer.model)


@pytest.fixture
def run(finished, tmp_path):
    """A copy to damage, of the first two checkpoints: newest, but not last."""
    for step in (2, 4):
        shutil.copytree(finished[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def resumed(folder, resume=True, **arguments):
    trainer = make_trainer(folder, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_checkpoints_are_listed_and_nothing_else_is_left(finished):
    folder, _ = finished
    assert list(numbered(folder)) == [2, 4, 6]
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    files = {path.name for path in (folder / "checkpoint-6").iterdir()}
    assert set(json.loads((folder / "checkpoint-6" / CONTENTS).read_text())["files"]) == files - {CONTENTS}
    assert {*STATES, "tokencurric.json"} < files
    assert defect(folder / "checkpoint-6") is None


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "as plain Trainer writes it"])
@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("damage", [cut, Path.unlink, lambda path: path.write_bytes(b"")], ids=["cut", "gone", "empty"])
def test_damage_is_named(run, name, damage, listed):
    folder = run / "checkpoint-4"
    if not listed:
        (folder / CONTENTS).unlink()
    assert defect(folder) is None, "control: a whole one is"
    damage(folder / name)
    reason = defect(folder)
    lost = damage is Path.unlink and not listed
    assert reason.startswith({"model.safetensors": "weights"}.get(name, name) if lost else name)
    with pytest.raises(StateError, match=r"checkpoint-4'\) cannot resume: ") as refused:
        resumed(run, str(folder))
    assert reason in str(refused.value)


@pytest.mark.parametrize("name", STATES)
def test_resuming_takes_the_newest_whole_one(run, finished, name, caplog):
    cut(run / "checkpoint-4" / name)
    with caplog.at_level(logging.WARNING, logger="tokencurric"):
        trainer = make_trainer(run)
        assert trainer.last_checkpoint() == str(run / "checkpoint-2")
    assert f"Passed over {run / 'checkpoint-4'}: {name} has" in caplog.text
    if name == "optimizer.pt":
        trainer.train(resume_from_checkpoint=True)
        assert digest(trainer.model) == finished[1]


def test_resuming_from_either_gives_the_same_weights_and_from_none_not(run, finished):
    assert digest(resumed(run, str(run / "checkpoint-2"), save_strategy="no").model) == finished[1]
    assert digest(resumed(run, run / "checkpoint-4", save_strategy="no").model) == finished[1]
    other = make_trainer(run, seed=8, save_strategy="no")
    other.train()
    assert digest(other.model) != finished[1], "control"
    state = torch.load(run / "checkpoint-4" / "rng_state.pth", weights_only=False)
    state["cpu"] = torch.random.get_rng_state()
    torch.save(state, run / "checkpoint-4" / "rng_state.pth")
    seal(run / "checkpoint-4")
    assert digest(resumed(run, save_strategy="no").model) != finished[1], "control: the state of the process matters"


def test_where_nothing_is_whole_nothing_is_resumed(run):
    for step in (2, 4):
        cut(run / f"checkpoint-{step}" / "optimizer.pt")
    assert make_trainer(run).last_checkpoint() is None
    with pytest.raises(StateError, match="found no whole checkpoint"):
        resumed(run)


def test_a_plain_trainers_checkpoint_is_resumed(run, finished, caplog):
    for name in (CONTENTS, "tokencurric.json"):
        (run / "checkpoint-4" / name).unlink()
    assert digest(resumed(run).model) == finished[1]
    assert "is not checked" in caplog.text


@pytest.mark.parametrize("arguments", [{}, {"max_steps": -1, "num_train_epochs": 2}], ids=["mid-epoch", "whole epochs"])
def test_a_finished_training_is_resumed_to_its_end(tmp_path, arguments):
    first = make_trainer(tmp_path, **arguments)
    first.train()
    trainer = make_trainer(tmp_path, **arguments)
    before = digest(trainer.model)
    out = trainer.train(resume_from_checkpoint=True)
    assert digest(trainer.model) == digest(first.model) != before
    assert out.global_step == trainer.state.global_step == first.state.global_step
    assert trainer.evaluate(Rows())["eval_loss"] == first.evaluate(Rows())["eval_loss"]
    assert all(not module._forward_hooks for module in trainer.model.modules() if type(module).__name__ == "Linear")


def test_another_objective_is_refused_before_anything_is_loaded(run):
    trainer = make_trainer(run, objective=EPIC(Random(), lcd()))
    before = digest(trainer.model)
    with pytest.raises(StateError, match="objective it began with"):
        trainer.train(resume_from_checkpoint=True)
    assert digest(trainer.model) == before


def test_the_recipe_is_there_though_weights_are_saved_elsewhere(tmp_path, monkeypatch):
    """As with FSDP's sharded weights, where Trainer never comes to `_save`."""
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(
        trainer, "save_model", lambda folder, **_: Path(folder, "pytorch_model_fsdp_0").mkdir(parents=True)
    )
    trainer.train()
    assert json.loads((tmp_path / "checkpoint-6" / "tokencurric.json").read_text())["compressor"]["type"] == "Random"


def test_weights_alone_are_whole_but_nothing_to_resume_from(tmp_path):
    make_trainer(tmp_path, save_only_model=True).train()
    assert list(numbered(tmp_path)) == [6]
    assert defect(tmp_path / "checkpoint-6", resume=False) is None
    with pytest.raises(StateError, match=r"cannot resume: optimizer\.pt is missing"):
        resumed(tmp_path, str(tmp_path / "checkpoint-6"))


# Rotation


def test_a_damaged_newer_one_evicts_no_whole_one(run):
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-9")
    cut(run / "checkpoint-9" / "model.safetensors")
    cut(run / "checkpoint-4" / "optimizer.pt")
    rotate(run, 2, keep=())
    assert 2 in numbered(run)
    rotate(run, 1, keep=())
    assert list(numbered(run)) == [2]
    resumed(run)
    assert list(numbered(run)) == [6]


def test_the_best_one_stays_and_is_named_by_its_place(tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])

    def evaluate(trainer, *_, **__):
        metrics = {"eval_loss": next(losses)}
        trainer.log(metrics)
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 2}
    trainer = make_trainer(tmp_path, **settings, own={"eval_dataset": Rows()})
    monkeypatch.setattr(type(trainer), "evaluate", evaluate)
    trainer.train()
    assert list(numbered(tmp_path)) == [4, 6]
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best = make_trainer(tmp_path, save_strategy="no")
    best._restore(str(tmp_path / "checkpoint-4"), best.model)
    assert digest(trainer.model) == digest(best.model)
    best._restore(str(tmp_path / "checkpoint-6"), best.model)
    assert digest(trainer.model) != digest(best.model), "control"

    cut(tmp_path / "checkpoint-4" / "model.safetensors")
    with pytest.raises(StateError, match=r"best checkpoint .*checkpoint-4 cannot be loaded: model\.safetensors has"):
        make_trainer(tmp_path, **settings, own={"eval_dataset": Rows()}).train(resume_from_checkpoint=True)


def test_a_folder_of_the_same_name_makes_way(run, finished):
    """A kill between the two renames of a replacement loses neither."""
    drafts = run / UNFINISHED
    shutil.copytree(finished[0] / "checkpoint-4", drafts / "checkpoint-4")
    cut(run / "checkpoint-4" / "optimizer.pt")
    put_in_place(drafts / "checkpoint-4", run / "checkpoint-4")
    assert defect(run / "checkpoint-4") is None
    (run / "checkpoint-4").rename(drafts / "replaced-checkpoint-4")
    shutil.copytree(finished[0] / "checkpoint-4", drafts / "checkpoint-4")
    recover(run)
    assert defect(run / "checkpoint-4") is None
    assert not drafts.exists()


# Disks and data


@contextmanager
def little_room(size):
    """No file may grow beyond `size` bytes: writing fails half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_full_disk_loses_nothing_earlier(run, finished, name):
    sizes = json.loads((run / "checkpoint-2" / CONTENTS).read_text())["files"]
    others = max(size for other, size in sizes.items() if size < sizes[name])
    shutil.rmtree(run / "checkpoint-4")
    with little_room((sizes[name] + others) // 2), pytest.raises(StateError, match="checkpoint-4 could not be written"):
        resumed(run)
    assert [path.name for path in run.iterdir()] == ["checkpoint-2"]
    assert digest(resumed(run).model) == finished[1]


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    checkpoints.write_whole(path, "before")
    with little_room(100), pytest.raises(OSError, match="File too large"):
        checkpoints.write_whole(path, "x" * 1000)
    assert path.read_text() == "before"
    checkpoints.write_whole(path, "after")
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_in_the_last_batch_loses_nothing_earlier(tmp_path, finished):
    trainer = make_trainer(tmp_path)

    def missing(numbers, good=trainer.data_collator):
        if trainer.state.global_step >= 4:
            raise OSError("row 7: no such image")
        return good(numbers)

    trainer.data_collator = missing
    with pytest.raises(OSError, match="row 7"):
        trainer.train()
    assert defect(tmp_path / "checkpoint-4") is None
    assert digest(resumed(tmp_path).model) == finished[1]


# Kills: a few of each kind here, all of them with `nox -s kills`

FEW = (
    "half:unfinished/checkpoint-4/model.safetensors",
    "opened:unfinished/checkpoint-4/trainer_state.json",
    "renaming:unfinished/checkpoint-4",
    "renamed:unfinished/checkpoint-4",
    "deleting:unfinished",
    "trained",
)


@pytest.mark.xdist_group("kills")
def test_killed_while_saving_and_resumed(tmp_path):
    with Nursery() as nursery:
        expected, seconds, moments = kills.moments(nursery, tmp_path / "whole")
        assert set(kills.NAMED) <= set(moments), "the names are those of this transformers"
        rows = [
            kills.killed_at(nursery, tmp_path / str(number), expected, moments, moment)
            for number, moment in enumerate(FEW)
        ]
        rows.append(kills.killed_after(nursery, tmp_path / "any", expected, [seconds / 2]))
    assert all(row.same for row in rows), rows
    assert {row.status for row in rows} == {-9}, "control: they were killed"
    assert {row.resumed for row in rows} >= {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert any(UNFINISHED in row.found for row in rows), "control: some were killed within saving"


@pytest.mark.slow
@pytest.mark.xdist_group("kills")
def test_killed_at_every_moment_there_is(tmp_path):
    with Nursery() as nursery:
        expected, _, moments = kills.moments(nursery, tmp_path / "whole")
        for number, moment in enumerate(dict.fromkeys(moments)):
            row = kills.killed_at(nursery, tmp_path / str(number), expected, moments, moment)
            assert row.same and row.status == -9, row
