"""One stage of training: the objective that makes the stage what it is, and transformers' Trainer around it."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import set_seed

from examples.epic.optimizer import MuonAndAdamW
from examples.epic.options import COMPRESSORS, Options
from examples.epic.questions import Data
from examples.epic.results import read_lines, write_lines
from tokencurric import EPIC, ConsistencyLoss, EpicTrainer
from tokencurric.checkpoints import put_in_place
from tokencurric.curriculum import constant

DIRECT = 8 / 9  # removed from the first step on: as much as the smallest budget that is evaluated


def make_objective(stage: str, options: Options) -> EPIC:
    """What sets the stages apart: nothing removed, the highest ratio at once without a teacher, or EPIC."""
    compressor = COMPRESSORS[options.compressor]
    if stage == "sft":
        return EPIC(compressor, constant(0.0, layer=options.layer), weight=0.0)
    if stage == "direct":
        return EPIC(compressor, constant(DIRECT, layer=options.layer), weight=0.0)
    loss = ConsistencyLoss(temperature=options.temperature)
    return EPIC(compressor, options.make_curriculum(), weight=options.weight, loss=loss)


def train(stage: str, model: Any, processor: Any, data: Data, options: Options) -> EpicTrainer:
    """Train `model` in place. Seed, data order, steps and optimizer are the same in every stage."""
    folder = options.output / "stages" / stage
    lines = options.output / "metrics.jsonl"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps or -1,
        num_train_epochs=options.epochs or 1.0,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.lr,
        lr_scheduler_type=options.schedule,
        lr_scheduler_kwargs=falling(options),
        warmup_steps=options.warmup,  # below 1 it is a share of the steps
        weight_decay=0.0,
        bf16=options.bf16,
        use_cpu=not torch.accelerator.is_available(),  # said aloud: bf16 is refused else
        activation_checkpointing=options.gradient_checkpointing,
        logging_steps=options.log_every,
        save_steps=options.save_every,
        save_total_limit=1,
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=options.seed,
        report_to="none",
        disable_tqdm=False,
    )
    trainer = EpicTrainer(
        model=model,
        args=arguments,
        objective=make_objective(stage, options),
        sizes=data.sizes,
        train_dataset=data.train,
        data_collator=data.collate,
        processing_class=processor,
        optimizers=(MuonAndAdamW(model, options.lr) if options.optimizer == "muon" else None, None),
        callbacks=[Lines(lines, stage)],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar(stage))
    trainer.train(resume_from_checkpoint=trainer.last_checkpoint() if options.resume else None)
    return trainer


def save(trainer: EpicTrainer, folder: Path) -> list[str]:
    """Save the trained weights, whole or not at all; notes on what was not."""
    draft = folder.with_name(folder.name + ".partial")
    main = trainer.accelerator.is_main_process
    if main:
        shutil.rmtree(draft, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(draft))
    trainer.accelerator.wait_for_everyone()
    notes = []
    if main and draft.is_dir():
        put_in_place(draft, folder)
    elif main:  # FSDP's sharded weights
        stages = trainer.args.output_dir
        notes = [f"{folder.name}: no plain checkpoint was written; `accelerate merge-weights` makes one of {stages}."]
    trainer.accelerator.wait_for_everyone()
    return notes


def falling(options: Options) -> dict[str, Any]:
    """A stable learning rate falls to zero in the last fifth: a curriculum is hardest at the end, and has to learn."""
    if options.schedule != "warmup_stable_decay":
        return {}
    if options.steps is None:
        raise ValueError("--schedule warmup_stable_decay needs --steps: it is told when to begin to fall")
    return {"num_decay_steps": max(1, options.steps // 5), "min_lr_ratio": 0.0}


def ready_for_training(model: Any, options: Options) -> Any:
    """Freeze what is not trained, or put adapters into the decoder."""
    if options.lora:
        from peft import LoraConfig, get_peft_model

        set_seed(options.seed)  # adapters start from a draw
        maps = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        return get_peft_model(
            model, LoraConfig(r=options.lora, lora_alpha=2 * options.lora, lora_dropout=0.0, target_modules=maps)
        )
    if not options.train_tower:
        model.model.vision_tower.requires_grad_(False)
    return model


class Bar(ProgressCallback):
    """A progress bar that shows the latest figures beside it, instead of a line for each."""

    training_bar: Any

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self.training_bar.set_description(f"train {self.stage}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show loss, layer and how much is removed."""
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.3f}"}
            if "student_ratio" in logs:
                shown |= {"removed": f"{logs['student_ratio']:.0%}", "layer": f"{logs['layer']:.0f}"}
            self.training_bar.set_postfix(shown, refresh=False)


class Lines(TrainerCallback):
    """Appends every logged step to a file, one JSON object a line."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take out what an interrupted run wrote after its last checkpoint."""
        if state.is_world_process_zero:
            done = state.global_step
            lines = read_lines(self.path)
            write_lines(self.path, [each for each in lines if each["stage"] != self.stage or each["step"] <= done])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append a line."""
        if state.is_world_process_zero and logs and "loss" in logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": self.stage, "step": state.global_step, **logs}) + "\n")
