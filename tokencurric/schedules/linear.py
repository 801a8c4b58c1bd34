"""A straight line."""

from dataclasses import dataclass

from tokencurric.schedules.protocol import check_progress


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
        return self.start * (1.0 - progress) + self.end * progress  # exact at both ends
