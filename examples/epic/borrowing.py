"""Stages from the results that come with the repository, where they answer the very same question.

They are made by `COMMAND`, and by `python -m examples.epic.borrowing runs/llava_epic` after it.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch

from examples.epic.options import SCENES, Options
from examples.epic.questions import Data
from examples.epic.results import Outcomes, read_json, read_lines, write_json, write_lines

SHIPPED = SCENES / "results"
BORROWED = ("sft", "direct")
COMMAND = "python examples/llava_epic.py --stages base,sft,direct,epic"


def comparable(options: Options, data: Data) -> dict[str, Any]:
    """Everything that decides what `sft` and `direct` become: two runs are comparable if these agree."""
    weights = Path(options.model) / "model.safetensors"
    return {
        "model": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else options.model,
        "data": data.digest,
        "asked": len(data.kinds),
        "scenes": options.scenes,
        "steps": options.steps,
        "epochs": options.epochs,
        "batch": options.batch,
        "accumulate": options.accumulate,
        "optimizer": options.optimizer,
        "lr": options.lr,
        "warmup": options.warmup,
        "schedule": options.schedule,
        "layer": options.layer,
        "compressor": options.compressor,
        "train_tower": options.train_tower,
        "lora": options.lora,
        "bf16": options.bf16,
        "seed": options.seed,
    } | ({"group_rows": True} if options.group_rows else {})  # shipped results are from before there was the choice


def borrow(outcomes: Outcomes, options: Options, data: Data) -> tuple[Outcomes, list[dict[str, Any]], list[str]]:
    """Add the stages `sft` and `direct` that were not run, if the shipped ones are comparable.

    Args:
        outcomes: of the stages that were run. options, data: of the run.

    Returns:
        Outcomes with the borrowed stages, lines of metrics of those, and notes that say what was done.
    """
    missing = [stage for stage in BORROWED if stage not in outcomes]
    shipped = read_json(SHIPPED / "answers.json")
    if not missing or not options.embedded or not shipped:
        return outcomes, [], []
    ours, theirs = comparable(options, data), shipped["comparable"]
    differing = sorted(name for name in ours if ours[name] != theirs.get(name))
    if differing:
        note = f"No shipped results for {' and '.join(missing)}: they were made with another {', '.join(differing)}."
        return outcomes, [], [note + f" Run them with --stages {','.join(('base', 'sft', 'direct', 'epic'))}."]
    stages = {**outcomes, **{stage: shipped["outcomes"][stage] for stage in missing}}
    metrics = [line for line in read_lines(SHIPPED / "metrics.jsonl") if line["stage"] in missing]
    seconds = sum(shipped["wall_time"][stage]["train"] for stage in missing)
    note = (
        f"{' and '.join(missing)} were not run here: they are shipped results of `{COMMAND}` with the same base model, "
        f"questions, seed ({options.seed}), steps ({options.steps}), data order and optimizer, made with torch "
        f"{shipped['torch']}; training them took {seconds:.0f} s. This run: torch {torch.__version__}."
    )
    return stages, metrics, [note]


def ship(run: Path, folder: Path = SHIPPED) -> None:
    """Keep of a finished run what `borrow` needs: outcomes of the stages, and the curves of those that are borrowed."""
    answers = read_json(run / "answers.json")
    kept = {name: answers[name] for name in ("comparable", "torch", "outcomes", "wall_time")}
    short = [
        {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in line.items()}
        for line in read_lines(run / "metrics.jsonl")
        if line["stage"] in BORROWED
    ]
    folder.mkdir(exist_ok=True)
    write_json(folder / "answers.json", kept)
    write_lines(folder / "metrics.jsonl", short)


if __name__ == "__main__":
    ship(Path(sys.argv[1]))
