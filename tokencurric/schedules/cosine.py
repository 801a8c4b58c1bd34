"""Half a cosine: slow, fast, slow."""

import math
from dataclasses import dataclass

from tokencurric.schedules.protocol import between, check_progress


@dataclass(frozen=True)
class Cosine:
    """end + (start − end)·(1 + cos πβ)/2.

    Raises:
        RangeError: when called with a progress outside [0, 1].

    Example:
        >>> Cosine(0.0, 1.0)(0.0), round(Cosine(0.0, 1.0)(0.5), 9)
        (0.0, 0.5)

    Source: Loshchilov and Hutter 2016, SGDR (arXiv:1608.03983) eq. 5, one period.
    """

    start: float | int
    end: float | int

    def __call__(self, progress: float | int) -> float | int:
        """The value at `progress`."""
        check_progress(progress, who="Cosine")
        done = (1.0 - math.cos(math.pi * progress)) / 2.0
        return between(self.start, self.end, done)
