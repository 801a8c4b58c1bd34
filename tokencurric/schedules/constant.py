"""A value that stays."""

from dataclasses import dataclass

from tokencurric.schedules.protocol import check_progress


@dataclass(frozen=True)
class Constant:
    """`value` at every progress.

    Raises:
        RangeError: when called with a progress outside [0, 1].

    Example:
        >>> Constant(0.9)(0.5)
        0.9
    """

    value: float | int

    def __call__(self, progress: float | int) -> float | int:
        """The value at `progress`."""
        check_progress(progress, who="Constant")
        return self.value
