"""The script that holds compressed inference against an ideal written by hand, at a small size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.handmade import read_prompt, read_token
from tests.adapters.tiny import ONE, PATCHES, tiny_batch, tiny_llava
from tokencurric.testing.models import apart, hidden

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("every", [1, 3])
@torch.no_grad()
def test_the_ideal_equals_hiding_what_it_leaves_out(every):
    model, batch = tiny_llava(), tiny_batch(ONE)
    ids, picture = batch["input_ids"], slice(3, 3 + PATCHES)
    kept = torch.ones_like(ids[0], dtype=torch.bool)
    kept[picture] = torch.arange(PATCHES) % every == 0
    left = kept.nonzero()[:, 0]
    ours, cache = read_prompt(model, ids, batch["pixel_values"], picture=picture, left=left, layer=2)
    longer = torch.cat((ids, torch.tensor([[7]])), 1)
    then = read_token(model, longer[:, -1:], ids.shape[1], cache)
    with hidden(model, torch.nn.functional.pad(~kept, (0, 1))[None], 2):
        expected = model(input_ids=longer, pixel_values=batch["pixel_values"]).logits
    torch.testing.assert_close(torch.cat((ours, then)), expected[0, -2:], rtol=1e-4, atol=1e-4)
    whole = model(input_ids=longer, pixel_values=batch["pixel_values"]).logits
    assert (apart(whole[0, -2:], expected[0, -2:]) > 1e-2) == (every > 1), "control"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("figures") / "found.json"
    script = ROOT / "benchmarks" / "inference_efficiency.py"
    command = [sys.executable, str(script), "--quick", "--rounds", "1", "--answer", "2", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_every_compressor_at_every_count(found):
    rows = found[0]["rows"]
    names = ["Uniform", "Random", "FastV", "DART"]
    assert [(row["compressor"], row["kept"]) for row in rows[1:]] == [(n, k) for k in (16, 8, 4) for n in names]
    assert (rows[0]["compressor"], rows[0]["kept"]) == (None, 36)


def test_counts_equal_closed_forms(found):
    for row in found[0]["rows"]:
        assert row["kv_bytes"] == row["kv_bytes_formula"]
        assert (row["flops"] == row["flops_formula"]) == (row["compressor"] not in ("FastV", "DART"))
        assert row["flops"] >= row["flops_formula"]
    kept, bytes_a_token = 4, 2 * 2 * 128 * 4
    assert row["kv_bytes"] == bytes_a_token * (2 * (36 + 60) + 2 * (kept + 60))
    assert row["kv_bytes_paper"] == bytes_a_token * 4 * kept
    assert row["layer_average"] == 20


def test_the_ideal_is_the_same_and_something_was_dropped(found):
    full, *rows = found[0]["rows"]
    assert full["logits_of_ideal"]["prefill"]["full_apart"] <= 1e-5
    for row in rows:
        same = row["logits_of_ideal"]
        for halt in ("prefill", "decode"):
            assert same[halt]["apart"] <= same["tolerance"] == 1e-5
            assert same[halt]["full_apart"] > 1e-4, "control"


def test_what_was_timed_is_told(found):
    figures, said = found
    for row in figures["rows"]:
        for part in ("prefill", "decode"):
            ours, ideal = row[f"{part}_seconds"]["median"], row[f"{part}_seconds_ideal"]["median"]
            assert row[f"{part}_vs_ideal"] == pytest.approx(ours / ideal)
            assert ours > 0
    assert figures["prefill_vs_ideal"] == {row["compressor"]: row["prefill_vs_ideal"] for row in figures["rows"][-4:]}
    assert {meaning.partition(":")[0] for meaning in figures["columns"].values()} == {"true", "paper-style"}
    for meaning in figures["columns"].values():
        assert meaning in said
