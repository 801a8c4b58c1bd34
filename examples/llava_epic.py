"""Train a LLaVA with EPIC, and show what it bought: `python examples/llava_epic.py`.

Without arguments everything is here: a LLaVA of 0.9 million parameters, and pictures composed from easy-VQA. The base
model answers questions at several numbers of visual tokens, is trained, and answers the same questions again. With
`--model`, `--data` and `--images` the same steps run on the real thing, alone or under `accelerate launch`.

All stages start from the same base and see the same data in the same order:
    base    as it is
    sft     fine-tuned without compression: what training on these data brings by itself
    direct  the highest ratio from the first step on, no teacher: training without curriculum and distillation
    epic    progressive consistency distillation (arXiv:2510.00515)
"""

import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

# Run as a script, this file belongs to no package: its neighbours are found from the folder above `examples`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.epic.borrowing import borrow, comparable
from examples.epic.measuring import costs, draw_kept, evaluate
from examples.epic.options import STAGES, Options, parse_options
from examples.epic.questions import Data, prepare
from examples.epic.results import read_json, replace_stages, tabulate, write_json
from examples.epic.training import ready_for_training, train
from tokencurric.data import measure_rows
from tokencurric.evaluation.report import accuracy_rows, write_report


def load(options: Options) -> Any:
    """The base model, fresh."""
    # Adapters and DeepSpeed keep what is trained in float32 on their own; anything else needs the weights so.
    half = options.bf16 and (options.lora > 0 or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true")
    return AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.bfloat16 if half else torch.float32)


def run(stage: str, processor: Any, data: Data, options: Options) -> tuple[dict[str, Any], Any]:
    """Train one stage from the base (the stage "base" is not trained), save it, and ask all questions.

    Returns:
        Outcomes and seconds; the model.
    """
    model, seconds, clock = load(options), {}, time.time()
    if stage == "base":
        model = model.to(PartialState().device)
    else:
        trainer = train(stage, ready_for_training(model, options), processor, data, options)
        trainer.save_model(str(options.output / ("checkpoint" if stage == "epic" else f"checkpoint-{stage}")))
        model = trainer.accelerator.unwrap_model(trainer.model)
        seconds["train"] = round(time.time() - clock, 1)
        clock = time.time()
    found = {"outcomes": evaluate(stage, model, processor, data, options)}
    seconds["evaluate"] = round(time.time() - clock, 1)
    return found | {"seconds": seconds}, model


def conclude(answers: dict[str, Any], data: Data, options: Options) -> None:
    """Tables from the answers, as results.json, report.html and text."""
    outcomes, borrowed, notes = borrow(answers["outcomes"], options, data)
    outcomes = {stage: outcomes[stage] for stage in STAGES if outcomes.get(stage)}
    replace_stages(options.output / "metrics.jsonl", borrowed)
    results = {
        **tabulate(outcomes, [data.kinds[number] for number in sorted(data.kinds)]),
        "efficiency": answers["efficiency"],
        "questions": len(data.kinds),
        "trained_with": options.compressor,
        "curriculum": options.curriculum,
        "layer": options.layer,
        "steps": options.steps,
        "seed": options.seed,
        "wall_time": answers["wall_time"],
        "shipped": sorted(set(outcomes) - set(answers["outcomes"])),
        "notes": notes,
        "settings": options.plain(),
    }
    write_json(options.output / "results.json", results)
    report = write_report(options.output)
    if outcomes:
        print(f"\nright answers in %, {len(data.kinds)} questions, ± one standard error")
        for name in outcomes["base"] if "base" in outcomes else next(iter(outcomes.values())):
            if name != "blind":
                print(f"\n{name}" + (" (trained with)" if name == options.compressor else ""))
                for row in accuracy_rows(results, name):
                    print(f"  {row[0]:8}" + "".join(f"{cell:>13}" for cell in row[1:]))
    print("", *notes, f"report: {report}", sep="\n")


def main(arguments: list[str] | None = None) -> None:
    """Run the stages, writing down what was found after each, and make the report."""
    options, begun, state = parse_options(arguments), time.time(), PartialState()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if state.is_main_process:
        if not options.resume:
            shutil.rmtree(options.output / "stages", ignore_errors=True)
            for name in ("answers.json", "metrics.jsonl", "results.json", "kept.png"):
                (options.output / name).unlink(missing_ok=True)
        options.output.mkdir(parents=True, exist_ok=True)
    answers = read_json(options.output / "answers.json") if options.resume else {}
    if answers and (differing := options.differing(answers["settings"])):
        changed = ", ".join(f"--{name.replace('_', '-')}" for name in differing)
        raise SystemExit(
            f"The run in {options.output} began with another {changed}: its stages would not be comparable with those "
            "that are left. Give the settings it began with, or another --output."
        )
    processor = AutoProcessor.from_pretrained(options.model)
    with state.main_process_first():
        data = prepare(options, processor, write=state.is_main_process)
    if options.group_rows and set(options.stages) != {"base"}:
        data = replace(data, sizes=measure_rows(data.train.file, data.collate))  # a few minutes for LLaVA's 665,000

    answers = {"outcomes": {}, "wall_time": {}, "efficiency": [], "settings": options.plain()} | answers
    answers |= {"comparable": comparable(options, data), "torch": torch.__version__}
    if state.is_main_process:
        write_json(options.output / "answers.json", answers)
    before = answers["wall_time"].get("total", 0.0)
    for stage in options.stages:
        if stage in answers["outcomes"]:
            continue  # resumed: this one was finished
        found, model = run(stage, processor, data, options)
        answers["outcomes"][stage], answers["wall_time"][stage] = found["outcomes"], found["seconds"]
        if state.is_main_process:
            if data.prompts and stage == options.stages[-1]:
                draw_kept(model, data, options)
                answers["efficiency"] = costs(model, data, options)
            answers["wall_time"]["total"] = round(before + time.time() - begun, 1)
            write_json(options.output / "answers.json", answers)
        state.wait_for_everyone()
    if state.is_main_process:
        conclude(answers, data, options)


if __name__ == "__main__":
    main()
