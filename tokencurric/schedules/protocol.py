"""The contract of a schedule, and the check that all of them share."""

from typing import Protocol, runtime_checkable

from tokencurric.errors import RangeError


@runtime_checkable
class Schedule(Protocol):
    """A pure function of progress β = step / total, from 0 (the first step) to 1 (approached, never reached).

    The schedules of this package are frozen dataclasses: they have a `repr` that makes them again, equality and
    pickling, and they keep no count.
    """

    def __call__(self, progress: float | int) -> float | int:
        """The value at `progress`."""
        ...


def check_progress(progress: float | int, *, who: str) -> None:
    """Raise unless 0 <= progress <= 1.

    Raises:
        RangeError: otherwise, also for NaN.

    Example:
        >>> check_progress(0.5, who="Linear")
    """
    if not 0.0 <= progress <= 1.0:
        raise RangeError(
            f"{who} needs 0 <= progress <= 1; got progress={progress}. It is step / total. "
            "Pass the fraction of training that is done."
        )


def between(start: float | int, end: float | int, done: float | int) -> float | int:
    """Interpolate: start + (end − start)·done, exact at both ends and where they are equal, never turning back.

    Example:
        >>> between(0.9, 0.9, 0.3), between(0.0, 0.3, 1.0)
        (0.9, 0.3)
    """
    return start + (end - start) * done if done < 0.5 else end - (end - start) * (1.0 - done)
