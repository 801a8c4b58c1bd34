"""Training with EPIC on transformers' Trainer."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokencurric.callbacks import CheckLosses, LookAhead, TellEpoch
from tokencurric.data.grouping import GroupedSampler
from tokencurric.data.sizes import RowSizes
from tokencurric.distill import EPIC, EpicOutput
from tokencurric.errors import DataError, RangeError, ShapeError, StateError
from tokencurric.hosts.names import (
    COLLATOR,
    COLUMNS,
    COMPUTE_LOSS,
    EVALUATION_LOOP,
    LOG,
    PREDICTION_STEP,
    SAVE,
    TRAIN_SAMPLER,
)
from tokencurric.recipe import describe_objective
from tokencurric.resuming import ResumableTrainer, gather_object

_log = logging.getLogger(__name__)
RECIPE = "tokencurric.json"
_PER_TOKEN = frozenset(
    {"sft_loss", "consistency_loss", "feature_loss"}
)  # averaged over supervised tokens, the rest over batches


class EpicTrainer(ResumableTrainer):
    """transformers' Trainer with the loss of an `EPIC` objective.

    Everything else is Trainer's: optimizers, schedules, accumulation, mixed precision, distribution, callbacks.
    Checkpoints are whole or absent, see `ResumableTrainer`. The curriculum's state follows from the step alone, so a
    resumed run equals an uninterrupted one. Losses are divided by the supervised tokens of the whole accumulated batch.
    It logs both losses, ratios, layer, margin and kept tokens. Saved models are plain checkpoints of their class, plus
    `tokencurric.json` with compressor and curriculum. Evaluation is the cross-entropy without compression, averaged
    over supervised tokens. After training the hooks are gone. A loss that is NaN or infinite ends the training before
    anything is saved after it.

    Args:
        args: and all others, as for transformers.Trainer. Batches need `labels`; `row_key` (the sample's number in the
            data) makes draws follow the sample. Columns reach the collator as they are.
        objective: what is minimised.
        sizes: of the training rows (`tokencurric.data.measure_rows`): rows of like length then share a batch, rows with
            pictures and rows without do not, as in LLaVA's training. None leaves the order to `args`.

    Raises:
        RangeError: an argument of the training contradicts the objective. ShapeError: `sizes` are not of the rows.

    Example:
        >>> EpicTrainer(model=model, args=arguments, objective=EPIC(DART(), tcd()),  # doctest: +SKIP
        ...             train_dataset=data, data_collator=collator).train()
    """

    objective: EPIC

    def __init__(self, *args: Any, objective: EPIC, sizes: RowSizes | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor != 0:
            raise RangeError(
                f"EpicTrainer needs label_smoothing_factor=0; got {self.args.label_smoothing_factor}. The objective "
                "makes its own cross-entropy, without smoothing. Leave the argument out."
            )
        if self.compute_loss_func is not None:
            raise RangeError(
                "EpicTrainer needs compute_loss_func=None; got a function. The objective is the loss. Leave it out."
            )
        if self.args.n_gpu > 1:
            raise StateError(
                f"EpicTrainer needs one process a device; got one process with {self.args.n_gpu} (DataParallel). "
                "Replicas would share one set of hooks. Start it with `accelerate launch`, or show it one device."
            )
        self.objective = objective
        self.model_accepts_loss_kwargs = True  # has Trainer count the supervised tokens of the accumulated batch
        self.loss_is_scaled_for_ga = True
        if self.compute_metrics is not None:
            raise RangeError(
                "EpicTrainer needs compute_metrics=None; got a function. Evaluation makes no logits beside the loss. "
                "Measure answers with compress(...) and generate, as tokencurric.evaluation does."
            )
        if self.is_deepspeed_enabled and (self.optimizer is not None or self.lr_scheduler is not None):
            raise RangeError(
                "EpicTrainer needs optimizers=(None, None) under DeepSpeed, which would drop what is passed. "
                "Hint: choose the optimizer by `optim` of the arguments, or by an `optimizer` block of its config."
            )
        if isinstance(objective.teacher, nn.Module):
            objective.teacher.to(self.args.device)
        if sizes is not None and self.args.train_sampling_strategy != "random":
            raise RangeError(
                "EpicTrainer needs train_sampling_strategy='random' with sizes=...; got "
                f"{self.args.train_sampling_strategy!r}. Both would say which rows share a batch. Leave one out."
            )
        self.sizes = sizes
        self.sampler: GroupedSampler | None = None  # of the training, once its data loader is made
        self._noted: dict[str, float | Tensor] = {}
        self._evaluated: list[Tensor] = []  # [2] each: a batch's summed cross-entropy and its supervised tokens
        self.add_callback(LookAhead(objective))
        self.add_callback(CheckLosses(objective))
        self.add_callback(TellEpoch(lambda: self.sampler))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers.Trainer.train; the hooks are taken off at the end, also after an error."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.objective.detach()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers.Trainer.evaluate: the mean cross-entropy without compression."""
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            if not self.is_in_train:
                self.objective.detach()

    @EVALUATION_LOOP.overridden_by
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As transformers.Trainer.evaluation_loop, with the loss of all supervised tokens, each counted once.

        Raises:
            DataError: the data have no supervised token.
        """
        self._evaluated = []
        found = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        here = torch.stack(self._evaluated).double().sum(0).tolist() if self._evaluated else [0.0, 0.0]
        self._evaluated = []
        sums, tokens = map(sum, zip(*gather_object([here]), strict=True))
        if tokens == 0:
            raise DataError(
                f"{description} needs supervised tokens; got none in {found.num_samples} rows. "
                "Hint: look at the labels that the collator makes."
            )
        metrics = {**(found.metrics or {}), f"{metric_key_prefix}_loss": sums / tokens}
        return found._replace(metrics=metrics)

    @PREDICTION_STEP.overridden_by
    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As transformers.Trainer.prediction_step; rows that fill up the last batch of the ranks count nowhere."""
        state, labels = self.accelerator.gradient_state, inputs.get("labels")
        if labels is not None and self.args.world_size > 1 and state.end_of_dataloader and state.remainder > 0:
            places = self.args.process_index * len(labels) + torch.arange(len(labels), device=labels.device)
            inputs = {**inputs, "labels": labels.masked_fill((places >= state.remainder)[:, None], -100)}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not served: there are no logits to return.

        Raises:
            StateError: always.
        """
        raise StateError(
            "EpicTrainer cannot predict: only positions that predict a supervised token reach the output head. Use "
            "compress(...) and generate, as tokencurric.evaluation does."
        )

    @COMPUTE_LOSS.overridden_by
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's loss in training, the uncompressed cross-entropy in evaluation."""
        if model.training:
            out = self.objective(
                model, inputs, self.state.global_step, self.state.max_steps, self.args.seed, num_items_in_batch
            )
            self._note(out)
        else:
            out = self.objective.uncompressed(model, inputs, num_items_in_batch)
            mean, tokens = map(torch.as_tensor, (out.metrics["sft_loss"], out.metrics["supervised_tokens"]))
            self._evaluated.append(torch.stack([mean * tokens, tokens.to(mean)]))
        loss = out.loss
        if num_items_in_batch is None:
            loss = loss / getattr(self, "current_gradient_accumulation_steps", 1)
        elif self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages over ranks what was divided by all tokens
        return (loss, {"loss": loss}) if return_outputs else loss

    @LOG.overridden_by
    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As transformers.Trainer.log, with the objective's metrics since the last time."""
        if "loss" in logs and self._noted:
            names = sorted(self._noted)
            here = torch.tensor([float(self._noted[name]) for name in names], device=self.args.device)
            sums = self.accelerator.reduce(here, "sum").tolist()
            totals = dict(zip(names, sums, strict=True))
            tokens, batches = totals.pop("supervised_tokens"), totals.pop("batches")
            for name, total in totals.items():
                logs[name] = total / max(1.0, tokens if name in _PER_TOKEN else batches)
            logs["supervised_tokens"] = tokens
            self._noted = {}
        super().log(logs, *args, **kwargs)

    def save_merged(self, directory: str | Path) -> None:
        """Save a copy of a LoRA model with its adapter merged in, as a plain checkpoint of the base model.

        Args:
            directory: where to. The copy needs the model's memory once more while it is written.

        Raises:
            StateError: the model has no adapter to merge.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not hasattr(model, "merge_and_unload"):
            raise StateError(
                f"save_merged needs a PEFT model; got {type(model).__name__}. There is no adapter to merge. "
                "save_model already writes a plain checkpoint."
            )
        self.objective.detach()  # hooks are not copied; the next step attaches them again
        copy.deepcopy(model).merge_and_unload().save_pretrained(directory)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)
        self._write_recipe(directory)

    def _note(self, out: EpicOutput) -> None:
        """Sum metrics up where they are, without waiting for the device."""
        values = {name: value for name, value in out.metrics.items() if name != "loss"}
        tokens = values["supervised_tokens"]
        for name, value in {**values, "batches": 1}.items():
            scaled = value * tokens if name in _PER_TOKEN else value
            self._noted[name] = self._noted.get(name, 0.0) + scaled

    def _write_recipe(self, directory: str | Path) -> None:
        text = json.dumps(describe_objective(self.objective), indent=2)
        Path(directory, RECIPE).write_text(text + "\n", encoding="utf-8")

    # Trainer's own seams

    @TRAIN_SAMPLER.overridden_by
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.sizes is None:
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if len(rows) != len(self.sizes):
            raise ShapeError(
                f"EpicTrainer needs sizes of the rows it trains on; got {len(self.sizes)} sizes for {len(rows)} rows. "
                "They say which rows share a batch. Measure the same data set."
            )
        together = self.args.world_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.sampler = GroupedSampler(self.sizes, self._train_batch_size, together=together, seed=seed)
        return self.sampler

    @SAVE.overridden_by
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self._write_recipe(str(output_dir or self.args.output_dir))

    def _complete(self, draft: Path) -> None:
        self._write_recipe(draft)  # also where weights are sharded and `_save` is not called

    def _check_resumed(self, folder: str) -> None:
        recipe, now = Path(folder, RECIPE), describe_objective(self.objective)
        if not recipe.exists():
            _log.warning("%s has no %s: whether it had the same objective is not checked.", folder, RECIPE)
            return
        before = json.loads(recipe.read_text(encoding="utf-8"))
        if before != now:
            changed = {name: (before.get(name), now[name]) for name in now if before.get(name) != now[name]}
            raise StateError(
                f"EpicTrainer can only go on with the objective it began with; {folder} has another "
                f"(before, now): {changed}. The run would be neither of the two. Use the former objective, or start a "
                "new run from the saved weights."
            )

    @COLLATOR.overridden_by
    def _get_collator_with_removed_columns(
        self, data_collator: Callable[..., Any], description: str | None = None
    ) -> Callable[..., Any]:
        return data_collator  # the collator knows what it needs; row_key is no argument of the model

    @COLUMNS.overridden_by
    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return dataset
