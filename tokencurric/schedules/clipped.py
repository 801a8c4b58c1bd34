"""A schedule kept inside a range."""

import math
from dataclasses import dataclass

from tokencurric.errors import RangeError
from tokencurric.schedules.protocol import Schedule


@dataclass(frozen=True)
class Clipped:
    """min(max(schedule(β), low), high).

    Raises:
        RangeError: low is above high, or what `schedule` raises.

    Example:
        >>> from tokencurric.schedules import Linear
        >>> Clipped(Linear(0.1, 0.6), high=0.3)(0.9)
        0.3
    """

    schedule: Schedule
    low: float | int = -math.inf
    high: float | int = math.inf

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise RangeError(
                f"Clipped needs low <= high; got low={self.low}, high={self.high}. No value lies between. Swap them."
            )

    def __call__(self, progress: float | int) -> float | int:
        """The value at `progress`."""
        return min(max(self.schedule(progress), self.low), self.high)
