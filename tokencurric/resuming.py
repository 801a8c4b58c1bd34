"""transformers' Trainer with checkpoints that are whole or absent, and resuming from the newest whole one."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokencurric import checkpoints
from tokencurric.defects import defect
from tokencurric.errors import MissingDependencyError, StateError
from tokencurric.hosts.names import (
    LOAD_BEST_MODEL,
    LOAD_FROM_CHECKPOINT,
    OUTPUT_DIR,
    PUSH_FROM_CHECKPOINT,
    RUN_EPOCH,
    SAVE_CHECKPOINT,
)

try:
    from accelerate.utils import gather_object as gather_object
    from transformers import PreTrainedModel as PreTrainedModel  # from here, so that one place reports what is missing
    from transformers import Trainer
    from transformers import TrainerCallback as TrainerCallback
except ImportError as error:
    raise MissingDependencyError(
        f"EpicTrainer needs transformers' Trainer; importing it failed with: {error}. It runs the training loop. "
        "Install tokencurric[hf]."
    ) from error

_log = logging.getLogger(__name__)
_STATE = "trainer_state.json"


class ResumableTrainer(Trainer):
    """transformers' Trainer, made safe against being killed at any moment.

    A checkpoint is written to `unfinished/` in the output folder, brought to the disk, listed in
    `tokencurric-contents.json` and renamed to its place; older ones are deleted after that. Resuming takes the newest
    whole checkpoint and warns of damaged ones that it passes over; a damaged one that is named is refused with the
    reason. Resuming a training that had finished loads it and returns.

    Checkpoints of transformers' own Trainer can be resumed from as long as their files are complete.

    Args:
        *args: as for transformers.Trainer.
        **kwargs: as for transformers.Trainer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._drafts: Path | None = None  # stands for the output folder while a checkpoint is written

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers.Trainer.train.

        Args:
            resume_from_checkpoint: True for the newest whole checkpoint, a checkpoint's path, or None to start anew.
            *args: as for transformers.Trainer.train.
            **kwargs: as for transformers.Trainer.train.

        Raises:
            StateError: there is no whole checkpoint, or the one named is damaged.
        """
        if resume_from_checkpoint in (None, False):
            return super().train(None, *args, **kwargs)
        if resume_from_checkpoint is True:
            chosen = self.last_checkpoint()
            if chosen is None:
                raise StateError(
                    f"train(resume_from_checkpoint=True) found no whole checkpoint in {self.args.output_dir}. "
                    "Hint: leave the argument out to start anew."
                )
        else:
            chosen = str(resume_from_checkpoint)
            reason = defect(chosen)
            if reason is not None:
                raise StateError(
                    f"train(resume_from_checkpoint={chosen!r}) cannot resume: {reason}. "
                    "Hint: pass True for the newest whole checkpoint."
                )
        self._check_resumed(chosen)
        return super().train(chosen, *args, **kwargs)

    def last_checkpoint(self) -> str | None:
        """Path of the newest checkpoint in the output folder that is whole on every node, None if there is none.

        All processes must call this together. Damaged checkpoints that are newer are logged as warnings.
        """
        run = Path(str(self.args.output_dir))
        if self.args.should_save:
            checkpoints.recover(run)
        self.accelerator.wait_for_everyone()
        here = {step: defect(path) for step, path in checkpoints.numbered(run).items()}
        everywhere: list[dict[int, str | None]] = gather_object([here])
        for step in sorted({step for found in everywhere for step in found}, reverse=True):
            reasons = [found.get(step, "the folder does not exist") for found in everywhere]
            reason = next((each for each in reasons if each is not None), None)
            if reason is None:
                return str(run / f"checkpoint-{step}")
            if self.args.should_save:
                _log.warning("Passed over %s: %s.", run / f"checkpoint-{step}", reason)
        return None

    def _check_resumed(self, folder: str) -> None:
        """Refuse a checkpoint that this training is no continuation of."""

    def _complete(self, draft: Path) -> None:
        """Add files to a checkpoint before it is sealed; called by processes that save."""

    # Trainer's own seams

    @OUTPUT_DIR.overridden_by
    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._drafts is None else str(self._drafts)

    @SAVE_CHECKPOINT.overridden_by
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        drafts = run / checkpoints.UNFINISHED
        if self.args.should_save:
            checkpoints.recover(run)
        self.accelerator.wait_for_everyone()
        self._drafts = drafts
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            best = f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step and ((drafts / best).is_dir() or (run / best).is_dir()):
                self.state.best_model_checkpoint = str(run / best)
            if self.args.should_save:
                self.state.save_to_json(str(drafts / name / _STATE))  # the best checkpoint under its final name
                self._complete(drafts / name)
                checkpoints.seal(drafts / name)
        except Exception as error:
            if self.args.should_save:
                checkpoints.discard(drafts)
            raise StateError(
                f"{name} could not be written to {run}: {error}. "
                "Hint: earlier checkpoints are untouched; make room or fix the cause, then resume."
            ) from error
        finally:
            self._drafts = None
        if self.args.should_save:
            checkpoints.put_in_place(drafts / name, run / name)
            keep = {run / name, Path(self.state.best_model_checkpoint or run / name)}
            checkpoints.rotate(run, self.args.save_total_limit, keep)
            checkpoints.recover(run)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(run / name))

    @PUSH_FROM_CHECKPOINT.overridden_by
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._drafts is None:  # otherwise it is pushed when it is in place
            super()._push_from_checkpoint(checkpoint_folder)

    @RUN_EPOCH.overridden_by
    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]
        else:  # resumed after its last step
            self.control.should_training_stop = True

    @LOAD_FROM_CHECKPOINT.overridden_by
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._restore(resume_from_checkpoint, self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    @LOAD_BEST_MODEL.overridden_by
    def _load_best_model(self) -> None:
        folder = str(self.state.best_model_checkpoint)
        reason = defect(folder, resume=False)
        if reason is not None:
            raise StateError(
                f"The best checkpoint {folder} cannot be loaded: {reason}. "
                "Hint: train with load_best_model_at_end=False to keep the last weights."
            )
        if not self._restore(folder, self.model):
            super()._load_best_model()

    def _restore(self, directory: str, model: nn.Module | None) -> bool:
        """Load weights by the model's own `from_pretrained`; False where Trainer's way is needed.

        `save_pretrained` writes some families, LLaVA among them, under other names than their modules have. Trainer
        reads them back by name and only warns of those it does not find: the run would go on from fresh weights.
        """
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded or not isinstance(model, PreTrainedModel):
            return False
        # In the widest type, so that no weight is rounded on its way into a model of several types.
        loaded = type(model).from_pretrained(directory, config=model.config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict(), strict=True)
        return True
