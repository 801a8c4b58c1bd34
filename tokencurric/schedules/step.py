"""Plateaus with jumps between them."""

from bisect import bisect_right
from dataclasses import dataclass

from tokencurric.schedules.joined import check_boundaries
from tokencurric.schedules.protocol import check_progress


@dataclass(frozen=True)
class Step:
    """values[i] between boundaries[i−1] and boundaries[i]; at a boundary the new value holds (right-continuous).

    Args:
        values: the plateaus, one more than boundaries. boundaries: ascending, inside (0, 1).

    Raises:
        RangeError: the numbers do not fit together, or a progress outside [0, 1].

    Example:
        >>> halves = Step(values=(0.5, 0.9), boundaries=(0.5,))
        >>> halves(0.49), halves(0.5)
        (0.5, 0.9)
    """

    values: tuple[float | int, ...]
    boundaries: tuple[float | int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "boundaries", tuple(self.boundaries))
        check_boundaries(self.boundaries, len(self.values), who="Step")

    def __call__(self, progress: float | int) -> float | int:
        """The value at `progress`."""
        check_progress(progress, who="Step")
        return self.values[bisect_right(self.boundaries, progress)]
