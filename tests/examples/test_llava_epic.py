"""The example: end to end on a few questions, resumed, and its bookkeeping by hand."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from examples.epic import borrowing
from examples.epic.optimizer import MuonAndAdamW
from examples.epic.options import COMPRESSORS, SCENES, parse_options
from examples.epic.questions import Data, prepare, read
from examples.epic.results import read_json, replace_stages, tabulate, write_json
from examples.epic.training import make_objective
from tests.adapters.tiny import tiny_llava
from tokencurric.curriculum import DeepToShallow
from tokencurric.data import ConversationDataset
from tokencurric.errors import DataError

# All in one process of a parallel run, which then makes the runs below once.
pytestmark = pytest.mark.xdist_group("example")

ROOT = Path(__file__).parents[2]
KEPT = ["144", "64", "32", "16"]


def run(*arguments):
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(ROOT / "examples" / "llava_epic.py"), "--smoke", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A smoke run of every stage."""
    folder = tmp_path_factory.mktemp("run")
    done = run("--output", folder, "--stages", "base,sft,direct,epic", "--curriculum", "icd", "--weight", "0.5")
    return folder, done


def test_results_have_the_promised_form(finished):
    folder, _ = finished
    found = json.loads((folder / "results.json").read_text())
    for title in ("accuracy", "stderr"):
        assert list(found[title]) == ["base", "sft", "direct", "epic"]
        for stage in found[title].values():
            assert set(stage) == {*COMPRESSORS, "blind"}
            assert 0 <= stage["blind"] <= 1
            for name in COMPRESSORS:
                assert list(stage[name]) == KEPT
                assert all(0 <= share <= 1 for share in stage[name].values())
    assert len({found["accuracy"]["epic"][name]["144"] for name in COMPRESSORS}) == 1
    assert set(found["paired"]) == {"epic-base", "epic-sft", "epic-direct"}
    assert set(found["paired"]["epic-base"]["random"]["16"]) == {"difference", "stderr"}
    assert set(found["recovered"]["random"]) == set(KEPT[1:])
    assert set(found["accuracy_by_kind"]["base"]["random"]["144"]) <= {"color", "shape", "exists", "count"}
    assert (found["questions"], found["steps"], found["layer"], found["seed"]) == (12, 3, 2, 0)
    assert found["shipped"] == []
    assert found["wall_time"]["total"] > found["wall_time"]["epic"]["train"] > 0
    assert [row["kept"] for row in found["efficiency"]] == [int(count) for count in KEPT]


def test_run_leaves_report_metrics_and_a_plain_checkpoint(finished):
    folder, done = finished
    assert "right answers in %, 12 questions" in done.stdout
    assert {path.name for path in folder.glob("*.png")} == {
        "accuracy.png",
        "efficiency.png",
        "kept.png",
        "losses.png",
        "schedule.png",
    }
    assert (folder / "report.html").stat().st_size > 100_000
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        (s, n) for s in ("sft", "direct", "epic") for n in (1, 2, 3)
    ]
    ratios = {line["stage"]: line["student_ratio"] for line in lines if line["step"] == 2}
    assert ratios["sft"] == 0 < ratios["epic"] < ratios["direct"]
    assert (folder / "checkpoint" / "model.safetensors").is_file()
    assert json.loads((folder / "checkpoint" / "tokencurric.json").read_text())["weight"] == 0.5


def test_a_finished_run_is_resumed_by_writing_the_report_again(finished):
    folder, _ = finished
    before = json.loads((folder / "results.json").read_text())
    (folder / "results.json").unlink()
    run("--output", folder, "--stages", "base,sft,direct,epic", "--curriculum", "icd", "--weight", "0.5", "--resume")
    assert json.loads((folder / "results.json").read_text())["accuracy"] == before["accuracy"]


def test_a_run_is_not_resumed_with_other_settings(finished):
    folder, _ = finished
    before = (folder / "results.json").read_text()
    with pytest.raises(subprocess.CalledProcessError) as refused:
        run("--output", folder, "--stages", "epic", "--curriculum", "lcd", "--weight", "0.4", "--resume")
    assert "began with another --curriculum, --weight" in refused.value.stderr
    assert (folder / "results.json").read_text() == before


def test_adapters_in_low_precision(tmp_path):
    quick = ("--stages", "epic", "--questions", "6")
    run("--output", tmp_path, *quick, "--lora", "4", "--bf16", "--gradient-checkpointing", "--curriculum", "lcd")
    assert (tmp_path / "checkpoint" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "results.json").read_text())["accuracy"]["epic"]["random"].keys() == set(KEPT)


def test_conversations_of_ones_own(finished, tmp_path):
    """As the real thing is run, with Vicuna's template and DART."""
    scenes = finished[0] / "scenes"
    data = ("--data", scenes / "train.json", "--images", scenes / "images", "--eval-data", scenes / "test.json")
    run("--output", tmp_path, *data, "--stages", "epic", "--compressor", "dart", "--accumulate", "2", "--group-rows")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["questions"] == 12
    assert found["settings"]["template"] == "vicuna_v1"
    assert found["settings"]["optimizer"] == "muon", "a smoke run keeps the small optimizer"


@pytest.mark.parametrize("trained", [".*", ".*layers.*proj.weight"])
def test_the_optimizer_resumes_where_it_was(trained):
    """From its state as Trainer saves it, with matrices and the rest, and with matrices alone, as adapters are."""

    def stepped(model, optimizer, steps):
        for number in steps:
            optimizer.zero_grad()
            for index, parameter in enumerate(model.parameters()):
                if parameter.requires_grad:
                    parameter.grad = torch.full_like(parameter, 0.1) + index + number * parameter.detach()
            optimizer.step()

    def fresh():
        model = tiny_llava()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(re.fullmatch(trained, name) is not None)
        return model, MuonAndAdamW(model, 0.01)

    whole, optimizer = fresh()
    stepped(whole, optimizer, range(4))
    first, optimizer = fresh()
    before = {name: value.clone() for name, value in first.state_dict().items()}
    stepped(first, optimizer, range(2))
    stream = io.BytesIO()
    torch.save((first.state_dict(), optimizer.state_dict()), stream)
    stream.seek(0)
    weights, state = torch.load(stream)
    second, optimizer = fresh()
    second.load_state_dict(weights)
    optimizer.load_state_dict(state)
    stepped(second, optimizer, range(2, 4))
    forgetful, optimizer = fresh()
    forgetful.load_state_dict(weights)
    stepped(forgetful, optimizer, range(2, 4))
    same = [torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True)]
    assert all(same)
    assert any(not torch.equal(before[name], value) for name, value in whole.state_dict().items())
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), forgetful.parameters(), strict=True)), (
        "control: the state matters"
    )


def test_tables_follow_from_the_outcomes():
    full = {"144": "1111", "16": "1100"}
    base = {"random": full, "blind": {"0": "1000"}}
    epic = {"random": {"144": "1111", "16": "1110"}, "blind": {"0": "0000"}}
    tables = tabulate({"base": base, "epic": epic}, ["a", "a", "b", "b"])
    assert tables["accuracy"]["base"] == {"random": {"144": 1.0, "16": 0.5}, "blind": 0.25}
    assert tables["stderr"]["base"]["random"] == {"144": 0.0, "16": 0.25}
    assert tables["accuracy_by_kind"]["epic"]["random"]["16"] == {"a": 1.0, "b": 0.5}
    assert tables["paired"]["epic-base"]["random"]["16"] == {"difference": 0.25, "stderr": 0.25}
    assert tables["recovered"] == {"random": {"16": 0.5}}


def test_replaced_stages_leave_the_others(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for lines in ([{"stage": "a", "step": 1}, {"stage": "b", "step": 1}], [{"stage": "a", "step": 9}]):
        replace_stages(path, lines)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"stage": "b", "step": 1},
        {"stage": "a", "step": 9},
    ]


def test_shipped_stages_are_taken_only_where_comparable(tmp_path, monkeypatch):
    options = parse_options([])
    data = Data(None, None, [], [], {0: "color"}, "digest")
    shipped = {
        "comparable": borrowing.comparable(options, data),
        "outcomes": {"sft": {"random": {"16": "1"}}, "direct": {"random": {"16": "0"}}},
        "wall_time": {"sft": {"train": 1.0}, "direct": {"train": 2.0}},
        "torch": "2.0",
    }
    write_json(tmp_path / "answers.json", shipped)
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "step": 1}\n{"stage": "epic", "step": 1}\n')
    monkeypatch.setattr(borrowing, "SHIPPED", tmp_path)
    ours = {"base": {}, "epic": {}, "direct": {"random": {"16": "1"}}}
    stages, lines, (note,) = borrowing.borrow(ours, options, data)
    assert stages["sft"] == shipped["outcomes"]["sft"]
    assert stages["direct"] == ours["direct"], "what was run here is never replaced"
    assert lines == [{"stage": "sft", "step": 1}]
    assert "sft were not run here" in note
    other = replace(options, lr=1.0)
    stages, lines, (note,) = borrowing.borrow(ours, other, data)
    assert stages == ours
    assert lines == []
    assert "another lr" in note


def test_what_is_shipped_is_the_default_command():
    """Otherwise the default run would show neither sft nor direct."""
    shipped = read_json(borrowing.SHIPPED / "answers.json")["comparable"]
    now = borrowing.comparable(parse_options([]), Data(None, None, [], [], dict.fromkeys(range(1000), ""), ""))
    assert {name: value for name, value in now.items() if name != "data"} == {
        name: value for name, value in shipped.items() if name != "data"
    }


def test_stages_differ_as_they_say():
    options = parse_options(["--curriculum", "lcd", "--layer", "3", "--temperature", "2", "--compressor", "dart"])
    sft, direct, epic = (make_objective(stage, options) for stage in ("sft", "direct", "epic"))
    assert not sft.curriculum.at(0, 10, layers=6).compresses
    assert direct.curriculum.at(0, 10, layers=6).student == pytest.approx(8 / 9)
    assert sft.weight == direct.weight == 0
    assert (epic.weight, epic.loss.temperature, epic.compressor) == (0.7, 2.0, COMPRESSORS["dart"])
    assert epic.curriculum.layer == DeepToShallow(3)


@pytest.mark.parametrize(
    "wrong",
    [["--stages", "base,pretzel"], ["--steps", "3", "--epochs", "1"], ["--images", "pictures"]],
)
def test_contradictions_on_the_command_line_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        parse_options(wrong)
    assert "error:" in capsys.readouterr().err


def test_defaults_depend_on_the_data():
    real = parse_options(["--data", "talk.json"])
    assert (real.steps, real.epochs, real.lr, real.template) == (None, 1.0, 2e-5, "vicuna_v1")
    assert parse_options(["--data", "talk.json", "--steps", "7"]).epochs is None
    assert parse_options([]).embedded


def test_bad_rows_end_the_run_or_are_left_out(finished, tmp_path):
    """Rows that cannot be read, images that do not open, an answer too long; in training and among the questions."""
    scenes, images = finished[0] / "scenes", tmp_path / "images"
    shutil.copytree(scenes / "images", images)
    files = {}
    for name in ("train", "test"):
        rows = json.loads((scenes / f"{name}.json").read_text())
        rows[1]["tools"] = [{"name": "search"}]
        (images / rows[2]["image"]).write_text("no image")
        rows[3]["system"] = "Be brief."
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "skipping"
    given = ["--data", files["train"], "--images", images, "--eval-data", files["test"], "--stages", "epic"]
    given += ["--questions", "6", "--steps", "4", "--output", out]
    processor = AutoProcessor.from_pretrained(SCENES / "base")
    stopping = parse_options(["--smoke", *map(str, given)])
    with pytest.raises(DataError, match=r"'tools' = .*in row 1 .*train\.jsonl"):
        prepare(stopping, processor, write=False)

    done = run(*given, "--on-error", "skip")
    assert "rows skipped" in done.stdout and "keys not read: kind" in done.stdout
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    left_out = {(Path(line["file"]).stem, line["row"]) for line in lines}
    assert left_out == {("train", 1), ("train", 2), ("test", 1), ("test", 2)}
    assert len(lines) == 4
    assert json.loads((out / "results.json").read_text())["questions"] == 6
    # A run that goes on counts no row twice.
    skipping = replace(stopping, on_error="skip", resume=True)
    assert skipping.differing(stopping.plain()) == []
    data = prepare(skipping, processor, write=True)
    assert data.train.left_out == (2,)
    assert [sample.row_key for sample in data.samples] == [0, 3, 4, 5, 6, 7]
    assert len((out / "skipped.jsonl").read_text().splitlines()) == 4


def test_options_of_the_data_reach_the_reader(tmp_path):
    options = parse_options(
        ["--data", "x.json", "--image-style", "llava", "--background", "black", "--ignore-keys", "video,tools"]
    )
    assert (options.ignore_keys, options.absolute_images, options.on_error) == (("video", "tools"), False, "stop")
    (tmp_path / "images").mkdir()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "images" / "a.png")
    turns = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "x"}]
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"image": "a.png", "conversations": turns, "video": "b.mp4"}]))
    corners = []
    for style in ("viewer", "llava"):
        file = read(path, tmp_path / "images", replace(options, image_style=style))
        corners.append(ConversationDataset(file)[0].images[0].getpixel((0, 0)))
        assert file.unread == {"video": 1}
    assert corners == [(0, 0, 0), (255, 0, 0)]
    absolute = [{"image": str(tmp_path / "images" / "a.png"), "conversations": turns}]
    path.write_text(json.dumps(absolute))
    assert read(path, None, replace(options, absolute_images=True)).rows
    with pytest.raises(DataError):
        read(path, None, options)
