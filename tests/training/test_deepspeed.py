"""Training under DeepSpeed on two CPU processes: `nox -s deepspeed`. Without deepspeed all of this is skipped."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training.launch import QUIET, ROOT, train_on_two
from tests.training.rows import Rows, make_trainer
from tests.training.worker import make_model
from tokencurric.checkpoints import numbered
from tokencurric.defects import defect

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.xdist_group("deepspeed"),
]


def config(stage):
    zero = {"stage": stage, "overlap_comm": False}
    zero |= {"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
    names = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": zero, **dict.fromkeys(names, "auto")}


def settings(stage):
    size = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    return {"max_steps": 4, "save_steps": 3, "save_total_limit": 2, "deepspeed": config(stage), **size}


@pytest.fixture(scope="module", autouse=True)
def built():
    """DeepSpeed compiles an operation at its first use: here, and not while the ranks wait for each other."""
    code = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
    subprocess.run([sys.executable, "-c", code], env=os.environ | QUIET, check=True, capture_output=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with the batch of two, which accumulate it in two parts."""
    arguments = {"max_steps": 4, "save_strategy": "no", "per_device_train_batch_size": 4}
    trainer = make_trainer(tmp_path_factory.mktemp("alone"), model=make_model(0.0), **arguments)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return trainer, [log["loss"] for log in logs], [float(log["grad_norm"]) for log in logs]


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_train_as_one_process_and_resume(tmp_path, alone, stage):
    trainer, losses, norms = alone
    job = {"arguments": settings(stage), "dropout": 0.0, "save": True, "evaluate": [7]}
    first, second = train_on_two(tmp_path, **job)
    assert "error" not in first, (first, second)
    assert (first["world"], first["wrapped"]) == (2, "DeepSpeedEngine")
    assert first["losses"] == second["losses"] == pytest.approx(losses, rel=1e-5)
    assert first["norms"] == pytest.approx(norms, rel=1e-4)
    assert first["evaluated"]["7"] == second["evaluated"]["7"]
    assert first["evaluated"]["7"] == pytest.approx(trainer.evaluate(Rows(7))["eval_loss"], rel=1e-3)
    ours, theirs = trainer.model.state_dict(), load_plain(tmp_path / "saved", trainer)
    before = make_model(0.0).state_dict()
    # Adam turns the sign of a gradient of nothing into a step of its own: single weights may differ, all together not.
    apart = sum((ours[name] - theirs[name]).square().sum() for name in ours)
    moved = sum((ours[name] - before[name]).square().sum() for name in ours)
    assert apart < 1e-4 * moved
    assert (tmp_path / "saved" / "tokencurric.json").is_file()

    assert list(numbered(tmp_path / "run")) == [3, 4]
    whole = digest_of(tmp_path / "saved")
    shard = next((tmp_path / "run" / "checkpoint-4").rglob("*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:1000])
    assert shard.name in defect(tmp_path / "run" / "checkpoint-4")
    again, _ = train_on_two(tmp_path, resume=True, **job)
    assert "error" not in again, again
    assert again["resumed"] == "checkpoint-3"
    assert digest_of(tmp_path / "saved") == whole
    other, _ = train_on_two(tmp_path, resume=True, **{**job, "weight": 0.0})
    assert "objective it began with" in other["error"]


def load_plain(folder, trainer):
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder, config=trainer.model.config).state_dict()


def digest_of(folder):
    return {name: value.double().sum().item() for name, value in load_file(folder / "model.safetensors").items()}


def test_an_optimizer_that_would_be_dropped_is_refused(tmp_path):
    for found in train_on_two(tmp_path, optimizer=True, arguments=settings(2)):
        assert found["error"].startswith("RangeError: EpicTrainer needs optimizers=(None, None) under DeepSpeed")


def launch(stage, *arguments, check=True):
    """The README's command, with two processes instead of eight."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--use_deepspeed"]
    command += ["--zero_stage", str(stage), "--zero3_save_16bit_model", "true", "--mixed_precision", "bf16"]
    command += [ROOT / "examples" / "llava_epic.py", *arguments]
    done = subprocess.run(list(map(str, command)), env=os.environ | QUIET, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 or not check, (done.stdout + done.stderr)[-4000:]
    return done


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Conversations and images, as the README's command reads them."""
    from examples.scenes.data import write_scenes

    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, split="train", scenes=16, questions=2, seed=0)
    write_scenes(folder, split="test", scenes=6, questions=1, seed=0)
    return folder


@pytest.mark.parametrize("stage", [2, 3])
def test_the_command_for_eight_gpus(tmp_path, scenes, stage):
    data = [
        "--workers",
        "0",
        "--log-every",
        "1",
        "--save-every",
        "2",
        "--data",
        scenes / "train.json",
        "--images",
        scenes / "images",
    ]
    data += ["--eval-data", scenes / "test.json", "--eval-batch", "2", "--output", tmp_path]
    real = ["--stages", "epic", "--compressor", "dart", "--curriculum", "tcd", "--weight", "0.7", "--layer", "2"]
    real += ["--lr", "2e-5", "--epochs", "1", "--batch", "1", "--accumulate", "2", "--bf16", "--gradient-checkpointing"]
    done = launch(stage, *data, *real)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["questions"] == 6
    assert set(found["accuracy"]) == {"epic"}
    assert [row["kept"] for row in found["efficiency"]] == [144, 64, 32, 16], done.stdout[-2000:]
    assert (tmp_path / "kept.png").is_file()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 5)), "one process would take eight steps"
    assert Path(tmp_path, "checkpoint", "model.safetensors").is_file()


def test_muon_is_refused(tmp_path):
    done = launch(2, "--smoke", "--stages", "epic", "--output", tmp_path, check=False)
    assert done.returncode != 0
    assert "--optimizer muon does not run under DeepSpeed" in done.stdout + done.stderr
