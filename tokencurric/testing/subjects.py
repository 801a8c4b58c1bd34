"""All checks of a compressor, a schedule, a divergence and a compressed model."""

from types import ModuleType

from tokencurric.testing.check import Check
from tokencurric.testing.laws import (
    budget,
    cost,
    divergences,
    draws,
    endurance,
    execution,
    independence,
    numerics,
    purity,
    schedules,
    signals,
    sizes,
)


def _of(*modules: ModuleType) -> tuple[Check, ...]:
    """The checks defined in `modules`: a law that is written there needs no entry in a list."""
    return tuple(value for module in modules for value in vars(module).values() if isinstance(value, Check))


def compressor_checks() -> tuple[Check, ...]:
    """The laws of a compressor.

    Example:
        >>> from tokencurric import Uniform
        >>> checks = {check.name: check for check in compressor_checks()}
        >>> checks["keeps_the_budget"](Uniform(), examples=5)
    """
    return _of(budget, independence, purity, draws, endurance, numerics, signals, execution, sizes, cost)


def schedule_checks() -> tuple[Check, ...]:
    """The laws of a schedule.

    What a schedule claims is read from its attributes: `start` and `end` (it moves from one to the other without
    turning back, unless `monotone` is False), `low` and `high` (it stays between), `values` (it takes no other).

    Example:
        >>> from tokencurric import Linear
        >>> for check in schedule_checks():
        ...     check(Linear(0.0, 0.5), examples=5)
    """
    return _of(schedules)


def divergence_checks() -> tuple[Check, ...]:
    """The laws of a divergence, alone and as part of `ConsistencyLoss`.

    Example:
        >>> from tokencurric.losses import forward_kl
        >>> for check in divergence_checks():
        ...     check(forward_kl, examples=5)
    """
    return _of(divergences)


def model_checks() -> tuple[Check, ...]:
    """The laws of compression inside a model; their subject is a `Prompted`. Needs the extra `hf`.

    Example:
        >>> [check.name for check in model_checks()][:2]
        ['equals_the_masked_model', 'generates_what_a_recompute_gives']
    """
    from tokencurric.testing.laws import models

    return _of(models)
