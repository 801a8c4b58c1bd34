"""The example when it is interrupted, when a drawing fails, and when it has nothing to ask."""

import json
import os
import signal

import pytest
from safetensors.torch import load_file
from transformers.utils import logging

from examples import llava_epic
from examples.epic import training
from examples.epic.results import read_json, read_lines, write_json, write_lines
from examples.scenes.data import write_scenes
from tests.training.launch import on_two
from tokencurric import Random
from tokencurric.errors import DataError

pytestmark = pytest.mark.xdist_group("example")
QUICK = ["--smoke", "--optimizer", "adamw", "--questions", "4", "--stages", "epic"]


@pytest.fixture(autouse=True)
def as_before():
    """The example makes transformers quiet, for the whole process."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


def run(folder, *arguments):
    llava_epic.main([*QUICK, "--output", str(folder), *map(str, arguments)])


def interrupt(monkeypatch, place, name, at=1):
    """Press Ctrl-C when a function is called for the `at`-th time; that call does not happen."""
    real, calls = getattr(place, name), []

    def pressed(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, pressed)


def test_an_interrupted_run_tells_how_to_go_on_and_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("examples.epic.measuring.COMPRESSORS", {"random": Random()})  # the others take time
    run(tmp_path / "whole")
    expected = load_file(tmp_path / "whole" / "checkpoint" / "model.safetensors")
    moments = {
        "training": (training.Lines, "on_log", 3),  # after the checkpoint of step 2
        "trained": (llava_epic, "evaluate", 1),  # after the last checkpoint: this stage is not to be trained again
        "drawing": (llava_epic, "draw_kept", 1),
    }
    for name, moment in moments.items():
        folder = tmp_path / name
        with monkeypatch.context() as patch:
            interrupt(patch, *moment)
            with pytest.raises(SystemExit) as stopped:
                run(folder)
        assert stopped.value.code == 130
        said = capsys.readouterr().err.rstrip().splitlines()[-1]
        assert said == f"Interrupted. The same command with --resume goes on with what is finished in {folder}."
        assert not (folder / "results.json").exists()
        assert bool(read_json(folder / "answers.json")["outcomes"]) == (name == "drawing"), "answers before drawings"
        if name == "training":
            with (folder / "metrics.jsonl").open("a") as file:
                file.write('{"stage": "epic", "st')  # as a kill within writing leaves it
        run(folder, "--resume")
        found = load_file(folder / "checkpoint" / "model.safetensors")
        assert all(found[key].equal(expected[key]) for key in expected), name
        results = json.loads((folder / "results.json").read_text())
        assert results["accuracy"] == json.loads((tmp_path / "whole" / "results.json").read_text())["accuracy"]
        assert len(results["efficiency"]) == 4 and (folder / "kept.png").is_file()
        assert [line["step"] for line in read_lines(folder / "metrics.jsonl") if line["stage"] == "epic"] == [1, 2, 3]
        assert not list(folder.rglob("*.partial"))


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """Conversations of one's own; the first question has two images, the second none, the others one."""
    folder = tmp_path_factory.mktemp("talk")
    write_scenes(folder, split="train", scenes=8, questions=1, seed=0)
    write_scenes(folder, split="test", scenes=4, questions=1, seed=0)
    rows = json.loads((folder / "test.json").read_text())
    rows[0]["image"] = [rows[0]["image"], rows[1]["image"]]
    rows[0]["conversations"][0]["value"] = "<image>\n" + rows[0]["conversations"][0]["value"]
    del rows[1]["image"]
    rows[1]["conversations"][0]["value"] = rows[1]["conversations"][0]["value"].replace("<image>\n", "")
    (folder / "mixed.json").write_text(json.dumps(rows))
    return folder


def data(talk, *more):
    return ["--data", talk / "train.json", "--images", talk / "images", *more]


def test_rows_with_any_number_of_images_are_drawn(tmp_path, talk, monkeypatch):
    monkeypatch.setattr("examples.epic.measuring.COMPRESSORS", {"random": Random()})
    run(tmp_path, *data(talk, "--eval-data", talk / "mixed.json"))
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["questions"] == 4
    assert found["notes"] == []
    assert (tmp_path / "kept.png").is_file() and len(found["efficiency"]) == 4


def test_a_drawing_that_fails_is_a_line_in_the_report(tmp_path, talk, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no ink")

    monkeypatch.setattr(llava_epic, "draw_kept", fail)
    monkeypatch.setattr("examples.epic.measuring.COMPRESSORS", {"random": Random()})
    monkeypatch.setattr("tokencurric.evaluation.plots.plot_accuracy", fail)
    run(tmp_path, "--stages", "base")
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["accuracy"]) == {"base"} and len(found["efficiency"]) == 4
    page = (tmp_path / "report.html").read_text()
    assert "Images with the kept tokens: failed with RuntimeError: no ink" in page
    assert "The figure accuracy could not be drawn: RuntimeError: no ink" in page
    assert "failed with RuntimeError: no ink" in capsys.readouterr().out


def test_without_questions_the_run_states_what_it_did(tmp_path, talk, capsys):
    run(tmp_path, *data(talk))
    said = capsys.readouterr().out
    assert f"epic was trained and saved in {tmp_path / 'checkpoint'}. No question was asked" in said
    assert "--eval-data was not given" in said
    assert "No question was asked" in (tmp_path / "report.html").read_text()
    assert "accuracy" in json.loads((tmp_path / "results.json").read_text())


def test_a_missing_image_loses_nothing_earlier(tmp_path, talk):
    images = talk / "images"
    rows = json.loads((talk / "train.json").read_text())
    more = ("--batch", "1", "--steps", "8", "--save-every", "2")
    run(tmp_path / "whole", *data(talk, *more))
    folder = tmp_path / "stopped"
    hidden = images / rows[0]["image"]
    hidden.rename(hidden.with_suffix(".away"))
    try:
        with pytest.raises(DataError, match=rf"row 0 .*{rows[0]['image']}|{rows[0]['image']}.*row 0"):
            run(folder, *data(talk, *more))
    finally:
        hidden.with_suffix(".away").rename(hidden)
    run(folder, *data(talk, *more, "--resume"))
    ours, theirs = (load_file(each / "checkpoint" / "model.safetensors") for each in (folder, tmp_path / "whole"))
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_muon_is_refused_under_deepspeed(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SystemExit, match="--optimizer muon does not run under DeepSpeed"):
        llava_epic.main(["--smoke", "--output", str(tmp_path)])
    assert not any(tmp_path.iterdir())


def test_files_of_a_run_are_whole_or_named(tmp_path):
    path = tmp_path / "answers.json"
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}
    path.write_text('{"a": ')
    with pytest.raises(DataError, match=r"answers\.json cannot be read"):
        read_json(path)
    lines = tmp_path / "metrics.jsonl"
    write_lines(lines, [{"step": 1}, {"step": 2}])
    with lines.open("a") as file:
        file.write('{"step": 3')
    assert read_lines(lines) == [{"step": 1}, {"step": 2}]
    lines.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 1, cannot be read"):
        read_lines(lines)


def test_two_processes_are_two(tmp_path):
    """Without an accelerator each would take itself for the only one, and both would write the same files."""
    on_two("examples/llava_epic.py", *QUICK, "--output", tmp_path, "--eval-batch", "2", "--accumulate", "2")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["questions"] == 4 and set(found["accuracy"]) == {"epic"}
    assert {path.name for path in (tmp_path / "stages" / "epic" / "checkpoint-3").glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
