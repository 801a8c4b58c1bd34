"""What EpicTrainer does at the beginning of a training and of its epochs."""

from collections.abc import Callable
from typing import Any

from tokencurric.data.grouping import GroupedSampler
from tokencurric.distill import EPIC
from tokencurric.resuming import TrainerCallback


class LookAhead(TrainerCallback):
    """Has the objective look at all its stages once the number of steps is known.

    Args:
        objective: what is trained.
    """

    def __init__(self, objective: EPIC) -> None:
        self.objective = objective

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the stages."""
        self.objective.preflight(kwargs["model"], state.max_steps, args.seed)


class CheckLosses(TrainerCallback):
    """Has the objective look at its losses where Trainer reads numbers anyway, and before anything is saved.

    Args:
        objective: what is trained.
    """

    def __init__(self, objective: EPIC) -> None:
        self.objective = objective

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look where the step is logged, saved or evaluated."""
        if control.should_log or control.should_save or control.should_evaluate:
            self.objective.check_losses()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look after an epoch."""
        self.objective.check_losses()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look after the training."""
        self.objective.check_losses()


class TellEpoch(TrainerCallback):
    """Sets the epoch of the sampler: on resuming with several processes, data loaders do not reach as far as to it.

    Args:
        sampler: returns the sampler of the training, or None.
    """

    def __init__(self, sampler: Callable[[], GroupedSampler | None]) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch."""
        sampler = self.sampler()
        if sampler is not None:
            sampler.set_epoch(int(state.epoch or 0))
