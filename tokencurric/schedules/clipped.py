"""A schedule kept inside a range."""

import math
from dataclasses import dataclass

from tokencurric.errors import RangeError
from tokencurric.schedules.protocol import Schedule


@dataclass(frozen=True)
class Clipped:
    """min(max(schedule(β), low), high); None leaves a side open.

    Raises:
        RangeError: low is above high, or what `schedule` raises.

    Example:
        >>> from tokencurric.schedules import Linear
        >>> Clipped(Linear(0.1, 0.6), high=0.3)(0.9)
        0.3
    """

    schedule: Schedule
    low: float | int | None = None
    high: float | int | None = None

    def __post_init__(self) -> None:
        low, high = -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high
        if not low <= high:
            raise RangeError(
                f"Clipped needs low <= high; got low={self.low}, high={self.high}. No value lies between. Swap them."
            )

    def __call__(self, progress: float | int) -> float | int:
        """The value at `progress`."""
        value = self.schedule(progress)
        value = value if self.low is None else max(value, self.low)
        return value if self.high is None else min(value, self.high)
