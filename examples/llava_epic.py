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
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

# Run as a script, this file belongs to no package: its neighbours are found from the folder above `examples`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.epic.borrowing import borrow, comparable
from examples.epic.measuring import costs, draw_kept, evaluate, processes
from examples.epic.options import STAGES, Options, parse_options
from examples.epic.questions import Data, prepare
from examples.epic.results import read_json, replace_stages, tabulate, write_json
from examples.epic.training import ready_for_training, save, train
from tokencurric.data import measure_rows
from tokencurric.evaluation.report import accuracy_rows, write_report


def load(options: Options) -> Any:
    """The base model, fresh."""
    # Adapters and DeepSpeed keep what is trained in float32 on their own; anything else needs the weights so.
    half = options.bf16 and (options.lora > 0 or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true")
    return AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.bfloat16 if half else torch.float32)


def saved(stage: str, options: Options) -> Path:
    """Folder of the stage's trained weights."""
    return options.output / ("checkpoint" if stage == "epic" else f"checkpoint-{stage}")


def run(stage: str, processor: Any, data: Data, options: Options) -> tuple[dict[str, Any], Any]:
    """Train one stage from the base (the stage "base" is not trained), save it, and ask all questions.

    Returns:
        Outcomes, seconds and notes; the model.
    """
    model, seconds, clock, notes = load(options), {}, time.time(), []
    if stage == "base":
        model = model.to(processes().device)
    else:
        trainer = train(stage, ready_for_training(model, options), processor, data, options)
        notes = save(trainer, saved(stage, options))
        model = trainer.accelerator.unwrap_model(trainer.model)
        seconds["train"] = round(time.time() - clock, 1)
        clock = time.time()
    found = {"outcomes": evaluate(stage, model, processor, data, options)}
    seconds["evaluate"] = round(time.time() - clock, 1)
    return found | {"seconds": seconds, "notes": notes}, model


def load_trained(stage: str, options: Options) -> Any:
    """The model of a stage that was finished by an earlier process."""
    model = load(options)
    if stage != "base":
        if options.lora:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, saved(stage, options))
        else:
            model = AutoModelForImageTextToText.from_pretrained(saved(stage, options), dtype=model.dtype)
    return model.to(processes().device)


def illustrate(model: Any, data: Data, options: Options) -> dict[str, Any]:
    """What a report shows beside the answers; a part that fails is a note, for the answers are there."""
    found: dict[str, Any] = {"illustrated": True, "efficiency": [], "notes": []}
    # All processes take part, since a sharded model needs them; the main one draws.
    for title, make in (("Images with the kept tokens", draw_kept), ("What a prompt costs", costs)):
        try:
            made = make(model, data, options)
        except Exception as error:
            found["notes"].append(f"{title}: failed with {type(error).__name__}: {error}")
        else:
            if make is costs:
                found["efficiency"] = made
    return found


def asked(answers: dict[str, Any], data: Data, options: Options) -> list[str]:
    """For a run without questions: what it did, and what it did not."""
    if data.prompts:
        return []
    trained = [stage for stage in answers["outcomes"] if stage != "base"]
    did = ", ".join(f"{stage} was trained and saved in {saved(stage, options)}" for stage in trained)
    return [
        f"{did or 'Nothing was trained'}. No question was asked, so no accuracy was measured: --eval-data was not "
        "given. To ask: --stages base --model FOLDER_OF_THE_WEIGHTS --eval-data FILE, in another --output."
    ]


def conclude(answers: dict[str, Any], data: Data, options: Options) -> None:
    """Tables from the answers, as results.json, report.html and text."""
    outcomes, borrowed, notes = borrow(answers["outcomes"], options, data)
    notes = [*asked(answers, data, options), *answers.get("notes", []), *notes]
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
    try:
        report = str(write_report(options.output))
    except Exception as error:  # results.json has all that was measured
        report = f"not written, {type(error).__name__}: {error}"
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
    options = parse_options(arguments)
    if options.optimizer == "muon" and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise SystemExit(
            "--optimizer muon does not run under DeepSpeed, which cuts matrices into flat shards. "
            "Hint: --optimizer adamw."
        )
    try:
        run_stages(options)
    except KeyboardInterrupt:
        if processes().is_main_process:
            print(
                f"\nInterrupted. The same command with --resume goes on with what is finished in {options.output}.",
                file=sys.stderr,
            )
        raise SystemExit(130) from None


def run_stages(options: Options) -> None:
    """Begin, or go on with, the run in the output folder."""
    begun, state = time.time(), processes()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if state.is_main_process:
        if not options.resume:
            shutil.rmtree(options.output / "stages", ignore_errors=True)
            for name in ("answers.json", "metrics.jsonl", "results.json", "kept.png"):
                (options.output / name).unlink(missing_ok=True)
        options.output.mkdir(parents=True, exist_ok=True)
    answers: dict[str, Any] = read_json(options.output / "answers.json") if options.resume else {}
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

    fresh = {"outcomes": {}, "wall_time": {}, "efficiency": [], "notes": [], "settings": options.plain()}
    answers = fresh | {"illustrated": bool(answers.get("efficiency"))} | answers
    answers |= {"comparable": comparable(options, data), "torch": torch.__version__}
    if state.is_main_process:
        write_json(options.output / "answers.json", answers)
    before, model, of = answers["wall_time"].get("total", 0.0), None, None
    for stage in options.stages:
        if stage in answers["outcomes"]:
            continue  # resumed: this one was finished
        model = None  # makes room for the next one
        found, model = run(stage, processor, data, options)
        of = stage
        answers["outcomes"][stage], answers["wall_time"][stage] = found["outcomes"], found["seconds"]
        answers["notes"] += found["notes"]
        answers["wall_time"]["total"] = round(before + time.time() - begun, 1)
        if state.is_main_process:
            write_json(options.output / "answers.json", answers)
        state.wait_for_everyone()
    last = options.stages[-1]
    if data.prompts and not answers["illustrated"]:
        shown = illustrate(model if of == last else load_trained(last, options), data, options)
        answers |= shown | {"notes": answers["notes"] + shown["notes"]}
        answers["wall_time"]["total"] = round(before + time.time() - begun, 1)
        if state.is_main_process:
            write_json(options.output / "answers.json", answers)
        state.wait_for_everyone()
    if state.is_main_process:
        conclude(answers, data, options)


if __name__ == "__main__":
    main()
