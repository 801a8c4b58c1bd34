"""A training step of EPIC beside plain fine-tuning, beside the published code's two passes, and beside the limit.

    python benchmarks/training_step.py [--json FILE] [--quick]
    python benchmarks/training_step.py --limits     # of LLaVA-1.5-7B itself; nothing is run

All ways train the same model on the same batch, forward and backward, in turn. A curriculum changes its step from the
first to the last, so stages are taken evenly from all of it; a stage's median times are taken in units of fine-tuning's
there, and averaged. The ratios to read:
`tcd_vs_sft`, `lcd_vs_sft` (plain fine-tuning as transformers does it), `tcd_vs_two_pass`, `lcd_vs_two_pass` (a whole
forward each for teacher and student, logits of every position that is left). Each comes with `..._limit`, the same
ratio in floating-point operations, from the closed form in `docs/performance.md`.

The model has the proportions of LLaVA-1.5-7B: 576 visual and 100 text tokens, of which 80 are supervised, compression
from layer 2 of 32 on at the end, a frozen tower of about 4% of a forward, an output head of about 0.65 of a layer a
position. It is narrower, so attention weighs more in it; the limits are those of the model that is run.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

# Not the script's folder, where selectors.py hides the standard library's module.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from benchmarks.llava import IMAGE, LLAVA_7B, Shape, make_config, of_width
from benchmarks.timing import Timing, machine, side_by_side
from tokencurric import EPIC, Curriculum, Random, compress, keep_count, lcd, tcd
from tokencurric.curriculum import Stage
from tokencurric.testing.models import Recording

QUICK = Shape(
    layers=4, width=64, heads=2, inner=172, vocabulary=502, tower_layers=1, tower_width=32, tower_heads=1, side=8
)


def make_model(shape: Shape) -> Any:
    """A LLaVA of random weights, ready to train as LLaVA is: all but the vision tower."""
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration._from_config(make_config(shape), attn_implementation="sdpa").train()
    model.model.vision_tower.requires_grad_(False)
    return model


def make_batch(shape: Shape) -> dict[str, Tensor]:
    """A picture, a question, and an answer of `supervised` tokens, a row."""
    g = torch.Generator().manual_seed(1)
    text = torch.randint(IMAGE + 1, shape.vocabulary, (shape.batch, shape.text), generator=g)
    question = shape.text - shape.supervised
    picture = torch.full((shape.batch, shape.visual), IMAGE)
    ids = torch.cat((text[:, : question // 2], picture, text[:, question // 2 :]), 1)
    labels = ids.clone()
    labels[:, : -shape.supervised] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.randn(shape.batch, 3, 14 * shape.side, 14 * shape.side, generator=g),
    }


# The losses, in each of the ways to make a step.


def fine_tuning(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """As transformers does it: labels to the model."""
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


def in_one_pass(model: Any, batch: dict[str, Tensor], objective: EPIC, step: int, total: int) -> Tensor:
    """Ours."""
    return objective(model, batch | {"row_key": torch.arange(len(batch["input_ids"]))}, step, total).loss


def in_two_passes(model: Any, batch: dict[str, Tensor], compressor: Any, stage: Stage, weight: float) -> Tensor:
    """Teacher and student each from the picture on, with logits of every position that is left, in float32."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    keys = torch.arange(len(targets))

    def logits(ratio: float) -> tuple[Tensor, Tensor]:
        recording = Recording(compressor)
        settings = {"layer": stage.layer, "seed": stage.seed, "row_key": keys}
        with compress(model, recording, ratio=ratio, **settings):
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
        left = torch.ones_like(targets, dtype=torch.bool)
        if recording.calls:
            left = ~recording.dropped(*targets.shape)
        counted = targets[left] != -100
        return model.lm_head(hidden[left]).float(), counted

    teacher = None
    if stage.distils:
        with torch.no_grad():
            taught, counted = logits(stage.teacher)
            teacher = taught[counted].log_softmax(-1)
    ours, counted = logits(stage.student)
    loss = functional.cross_entropy(ours[counted], targets[targets != -100])
    if stage.compresses:
        loss = (1 - weight) * loss
    if teacher is not None:
        student = ours[counted].log_softmax(-1)
        loss = loss + weight * functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
    return loss


def ways_of(
    model: Any, batch: dict[str, Tensor], objective: EPIC, step: int, total: int
) -> dict[str, Callable[[], Tensor]]:
    """The loss of a step in each way; ours leaves hooks, to be taken off by `detach` before the others run."""
    stage = objective.curriculum.at(step, total, seed=0, layers=len(model.model.language_model.layers))
    return {
        "sft": lambda: fine_tuning(model, batch),
        "two_pass": lambda: in_two_passes(model, batch, objective.compressor, stage, objective.weight),
        "ours": lambda: in_one_pass(model, batch, objective, step, total),
    }


def steps_of(
    model: Any, batch: dict[str, Tensor], objective: EPIC, step: int, total: int
) -> dict[str, Callable[[], float]]:
    """The step in each way: it leaves gradients and returns the loss."""

    def run(way: Callable[[], Tensor]) -> float:
        model.zero_grad()
        loss = way()
        loss.backward()
        objective.detach()
        return float(loss.detach())

    return {name: partial(run, way) for name, way in ways_of(model, batch, objective, step, total).items()}


# The closed form: floating-point operations of a step of a row.


def layer_cost(shape: Shape, tokens: int) -> float:
    """A forward of one decoder layer."""
    weights = 4 * shape.width**2 + 3 * shape.width * shape.inner
    return 2 * tokens * weights + 4 * tokens**2 * shape.width


def tower_cost(shape: Shape) -> float:
    """A forward of the vision tower."""
    tokens = shape.visual + 1
    weights = 12 * shape.tower_width**2
    return shape.tower_layers * (2 * tokens * weights + 4 * tokens**2 * shape.tower_width)


def saved_cost(shape: Shape, tokens: int) -> float:
    """What a forward saves by making only keys and values of all `tokens` in the last layer, the rest of supervised."""
    weights = 2 * shape.width**2 + 3 * shape.width * shape.inner
    return 2 * (tokens - shape.supervised) * weights


def trained_cost(shape: Shape, *, below: int, tokens: int, head: int) -> float:
    """A forward of all that is trained: projector, `below` layers at full length, the rest on `tokens`, the head."""
    projector = 2 * shape.visual * (shape.tower_width * shape.width + shape.width**2)
    return (
        projector
        + below * layer_cost(shape, shape.visual + shape.text)
        + (shape.layers - below) * layer_cost(shape, tokens)
        + 2 * head * shape.width * shape.vocabulary
    )


def costs(shape: Shape, stage: Stage) -> dict[str, float]:
    """What each way computes in a step, and ours if it ran the whole last layer; a backward costs two forwards."""
    full = shape.visual + shape.text
    below = stage.layer if stage.compresses else shape.layers
    student = keep_count(shape.visual, stage.student) + shape.text
    teacher = keep_count(shape.visual, stage.teacher) + shape.text
    tower = tower_cost(shape)
    saved = 3 * saved_cost(shape, student if stage.compresses else full)
    whole = tower + 3 * trained_cost(shape, below=below, tokens=student, head=shape.supervised)
    two = tower + 3 * trained_cost(shape, below=below, tokens=student, head=student)
    if stage.distils:
        upper = (shape.layers - below) * layer_cost(shape, teacher)
        saved += saved_cost(shape, teacher)
        whole += upper + 2 * shape.supervised * shape.width * shape.vocabulary
        two += tower + trained_cost(shape, below=below, tokens=teacher, head=teacher)
    return {
        "sft": tower + 3 * trained_cost(shape, below=shape.layers, tokens=full, head=full),
        "ours": whole - saved,
        "ours_whole": whole,
        "two_pass": two,
    }


def time_stage(
    model: Any, batch: dict[str, Tensor], objective: EPIC, step: int, total: int, *, rounds: int
) -> dict[str, Timing]:
    """All ways in one stage, after a look at whether they compute the same."""
    steps = steps_of(model, batch, objective, step, total)
    ours, theirs = steps["ours"](), steps["two_pass"]()
    if abs(ours - theirs) > 1e-3 * abs(theirs):
        raise SystemExit(f"step {step}: the losses are {ours} and {theirs}, so the times would mean nothing")
    return side_by_side(steps, rounds=rounds, warm_up=0)


def operations(shape: Shape, curriculum: Curriculum, *, stages: int) -> dict[str, float]:
    """Of each way, added up over `stages` parts of a curriculum."""
    total = dict.fromkeys(("sft", "ours", "ours_whole", "two_pass"), 0.0)
    for number in range(stages):
        stage = curriculum.at(2 * number + 1, 2 * stages, seed=0, layers=shape.layers)
        for way, cost in costs(shape, stage).items():
            total[way] += cost
    return total


def limits(shape: Shape, curriculum: Curriculum, *, stages: int) -> dict[str, float]:
    """Operations, ours over the other's."""
    total = operations(shape, curriculum, stages=stages)
    return {other: total["ours"] / total[other] for other in ("sft", "two_pass")}


def describe(shape: Shape) -> str:
    """What its proportions are."""
    forward = trained_cost(shape, below=shape.layers, tokens=0, head=shape.visual + shape.text) + tower_cost(shape)
    head = 2 * shape.width * shape.vocabulary / (layer_cost(shape, 1) - 4 * shape.width)
    share = tower_cost(shape) / forward
    return f"{shape}\ntower {share:.1%} of a forward, head {head:.2f} of a layer a position"


def measure(shape: Shape, *, stages: int, rounds: int, weight: float = 0.7) -> dict[str, Any]:
    """All ratios, with their limits."""
    model, batch = make_model(shape), make_batch(shape)
    figures: dict[str, Any] = {}
    for name, curriculum in (("tcd", tcd()), ("lcd", lcd())):
        objective = EPIC(Random(), curriculum, weight=weight)
        seconds: dict[str, list[Timing]] = {"sft": [], "ours": [], "two_pass": []}
        for number in range(stages):  # each from the middle of its part of the curriculum
            step, total = 2 * number + 1, 2 * stages
            stage = curriculum.at(step, total, seed=0, layers=shape.layers)
            timings = time_stage(model, batch, objective, step, total, rounds=rounds)
            for way, timing in timings.items():
                seconds[way].append(timing)
            print(f"{name} layer {stage.layer:2}, removed {stage.student:4.0%} and {stage.teacher:4.0%}: ", end="")
            print(", ".join(f"{way} {timing.median:.3f} s" for way, timing in timings.items()), flush=True)
        figures[f"{name}_seconds"] = {way: [asdict(timing) for timing in each] for way, each in seconds.items()}
        # Fine-tuning is the same in all stages: its time there is the stage's unit, or a slow minute would weigh more.
        units = [timing.median for timing in seconds["sft"]]
        mean = {
            way: sum(timing.median / unit for timing, unit in zip(each, units, strict=True)) / stages
            for way, each in seconds.items()
        }
        for other, limit in limits(shape, curriculum, stages=stages).items():
            figures[f"{name}_vs_{other}"] = mean["ours"] / mean[other]
            figures[f"{name}_vs_{other}_limit"] = limit
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--quick", action="store_true", help="a small shape, for a look")
    parser.add_argument("--limits", action="store_true", help="only the limits of LLaVA-1.5-7B, over 2,000 stages")
    parser.add_argument("--width", type=int, default=512, help="of the decoder; attention weighs less in a wide one")
    parser.add_argument("--stages", type=int, default=8, help="of each curriculum")
    parser.add_argument("--rounds", type=int, default=3, help="times that each way is timed in each stage")
    arguments = parser.parse_args()
    if arguments.limits:
        print(describe(LLAVA_7B))
        for name, curriculum in (("tcd", tcd()), ("lcd", lcd())):
            total = operations(LLAVA_7B, curriculum, stages=2000)
            for other in ("sft", "two_pass"):
                limit, whole = total["ours"] / total[other], total["ours_whole"] / total[other]
                print(f"{name}_vs_{other}_limit {limit:.3f}, {whole:.3f} with the whole last layer")
            print(f"{name}, two passes over sft: {total['two_pass'] / total['sft']:.3f}")
        return
    shape = QUICK if arguments.quick else of_width(arguments.width)
    print(f"{describe(shape)}, {torch.get_num_threads()} threads, float32, forward and backward")
    figures = measure(shape, stages=arguments.stages, rounds=arguments.rounds)
    for name, value in figures.items():
        if isinstance(value, float) and not name.endswith("_limit"):
            print(f"{name:16} {value:.3f}   limit {figures[f'{name}_limit']:.3f}")
    if arguments.json:
        out = {"shape": asdict(shape), "machine": machine(), "torch": torch.__version__, **figures}
        arguments.json.write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
