"""The report is rebuilt from a run's files alone and leaves nothing out."""

import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokencurric.errors import DataError, MissingDependencyError, ShapeError
from tokencurric.evaluation import draw_kept, plot_kept
from tokencurric.evaluation.plots import STAGES
from tokencurric.evaluation.report import accuracy_rows, main, read_run, write_report

KEPT = ["144", "16"]
NAMES = ["random", "fastv"]


def results(stages=tuple(STAGES)):
    accuracy = {s: {n: {"144": 0.9, "16": 0.511 + 0.1 * i} for n in NAMES} for i, s in enumerate(stages)}
    errors = {s: {n: dict.fromkeys(KEPT, 0.012) for n in NAMES} for s in stages}
    for table in (*accuracy.values(), *errors.values()):
        table["blind"] = 0.1
    timing = {"prefill": 0.02, "decode": 0.001}
    cost = {"batch": 4, "paper_kv_bytes": 10, "layer_average": 50.0, "timing": timing, "flops_decoder": 100}
    rows = [{**cost, "kept": n, "tokens": [144, n], "flops_total": 150, "kv_bytes": n * 10} for n in (144, 16)]
    return {
        "accuracy": accuracy,
        "stderr": errors,
        "paired": {"epic-base": {"random": {"16": {"difference": 0.3, "stderr": 0.01}}}},
        "recovered": {"random": {"16": 0.77}},
        "efficiency": rows,
        "trained_with": "random",
        "notes": ["made with <care>"],
        "settings": {"seed": 5},
        "wall_time": {"total": 12.0},
    }


def metrics(stages=("sft", "direct", "epic")):
    figures = {"loss": 0.5, "sft_loss": 0.4, "student_ratio": 0.5, "teacher_ratio": 0.3, "margin": 0.2, "layer": 2.0}
    lines = [{"stage": s, "step": n, **figures} for s in stages for n in range(1, 6)]
    return [line | ({"consistency_loss": 0.1} if line["stage"] == "epic" else {}) for line in lines]


def write(folder, found, lines):
    (folder / "results.json").write_text(json.dumps(found))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_report_holds_every_stage_figure_and_note(tmp_path):
    write(tmp_path, results(), metrics())
    Image.new("RGB", (4, 4)).save(tmp_path / "kept.png")
    page = write_report(tmp_path).read_text()
    for label in STAGES.values():
        assert f"<td>{label}</td>" in page
    figures = {path.stem for path in tmp_path.glob("*.png")}
    assert figures == {"accuracy", "losses", "schedule", "efficiency", "kept"}
    assert page.count("data:image/png;base64,") == len(figures)
    for said in ("81.1 ± 1.2", "+30.0 ± 1.0", "77%", "made with &lt;care&gt;", "144 ×1, 16 ×1", "Random", "FastV"):
        assert said in page
    assert "http" not in page, "nothing is loaded from elsewhere"


@pytest.mark.parametrize("peak", [None, 12_345_678])
def test_peak_memory_is_told_where_it_was_measured(tmp_path, peak):
    found = results()
    write(tmp_path, found | {"efficiency": [row | {"peak_memory": peak} for row in found["efficiency"]]}, metrics())
    page = write_report(tmp_path).read_text()
    assert ("<th>peak MB</th>" in page) == ("<td>12.3</td>" in page) == (peak is not None)


def test_report_of_less_says_less(tmp_path):
    write(tmp_path, results(("base", "epic")), metrics(("epic",)))
    page = write_report(tmp_path).read_text()
    assert f"<td>{STAGES['epic']}</td>" in page
    assert f"<td>{STAGES['sft']}</td>" not in page
    write(tmp_path, {"settings": {}}, [])
    for figure in tmp_path.glob("*.png"):
        figure.unlink()
    assert "<img" not in write_report(tmp_path).read_text()


def test_command_rebuilds_the_report(tmp_path, monkeypatch, capsys):
    write(tmp_path, results(), metrics())
    first = write_report(tmp_path).read_text()
    (tmp_path / "report.html").unlink()
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == first


def test_rows_are_the_numbers():
    header, base, *_ = accuracy_rows(results(), "fastv")
    assert header == ["stage", "144", "16", "blind"]
    assert base == ["base", "90.0 ± 1.2", "51.1 ± 1.2", "10.0 ± 10.0"]


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(DataError, match=r"results\.json"):
        read_run(tmp_path)
    write(tmp_path, results(), metrics())
    (tmp_path / "metrics.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match="Reading failed"):
        read_run(tmp_path)


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    write(tmp_path, results(), metrics())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"tokencurric\[demo\]"):
        write_report(tmp_path)


@given(st.integers(1, 6), st.data())
def test_exactly_the_kept_patches_look_as_before(grid, data):
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=grid**2, max_size=grid**2)))
    picture = Image.new("RGB", (grid, grid), (250, 240, 90))
    drawn = draw_kept(picture, kept, side=3 * grid)
    middles = [drawn.getpixel((3 * (n % grid) + 1, 3 * (n // grid) + 1)) for n in range(grid**2)]
    assert [pixel == (250, 240, 90) for pixel in middles] == kept.tolist()


def test_tokens_need_places():
    with pytest.raises(ShapeError, match="square grid"):
        draw_kept(Image.new("RGB", (4, 4)), torch.ones(5, dtype=torch.bool))


def test_pictures_make_a_row_each(tmp_path):
    kept = torch.tensor([True, False, False, True])
    drawn = plot_kept([("What?", Image.new("RGB", (4, 4)))] * 2, [[("fastv", 2, kept)]] * 2)
    assert len(drawn.axes) == 4
