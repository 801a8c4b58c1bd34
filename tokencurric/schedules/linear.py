"""A straight line."""

from dataclasses import dataclass

from tokencurric.schedules.protocol import between, check_progress


@dataclass(frozen=True)
class Linear:
    """start + (end − start)·β.

    Raises:
        RangeError: when called with a progress outside [0, 1].

    Example:
        >>> Linear(0.0, 0.5)(0.5)
        0.25

    Source: EPIC (arXiv:2510.00515) §3, the ramps of ratio bounds and margin.
    """

    start: float | int
    end: float | int

    def __call__(self, progress: float | int) -> float | int:
        """The value at `progress`."""
        check_progress(progress, who="Linear")
        return between(self.start, self.end, progress)
