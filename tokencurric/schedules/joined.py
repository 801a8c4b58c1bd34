"""One schedule after another."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from tokencurric.errors import RangeError
from tokencurric.schedules.protocol import Schedule, check_progress


def check_boundaries(boundaries: tuple[float | int, ...], pieces: int, *, who: str) -> None:
    """Raise unless `boundaries` cut [0, 1] into `pieces`.

    Raises:
        RangeError: their number is not pieces − 1, or they are not strictly ascending inside (0, 1).

    Example:
        >>> check_boundaries((0.25, 0.5), 3, who="Step")
    """
    if len(boundaries) != pieces - 1:
        raise RangeError(
            f"{who} needs one boundary fewer than pieces; got {pieces} pieces and boundaries={boundaries}. "
            "A boundary is where the next piece begins."
        )
    edges = (0.0, *boundaries, 1.0)
    if not all(a < b for a, b in pairwise(edges)):
        raise RangeError(
            f"{who} needs boundaries strictly ascending between 0 and 1; got boundaries={boundaries}. "
            "They are fractions of training. Sort them and leave out 0 and 1."
        )


@dataclass(frozen=True)
class Joined:
    """pieces[i] between boundaries[i−1] and boundaries[i], each running through its own 0 to 1 there.

    Args:
        pieces: schedules, one more than boundaries. boundaries: ascending, inside (0, 1).

    Raises:
        RangeError: the numbers do not fit together, or a progress outside [0, 1].

    Example:
        >>> from tokencurric.schedules import Constant, Linear
        >>> warm = Joined(pieces=(Linear(0.0, 0.9), Constant(0.9)), boundaries=(0.5,))
        >>> warm(0.25), warm(0.75)
        (0.45, 0.9)
    """

    pieces: tuple[Schedule, ...]
    boundaries: tuple[float | int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", tuple(self.pieces))
        object.__setattr__(self, "boundaries", tuple(self.boundaries))
        check_boundaries(self.boundaries, len(self.pieces), who="Joined")

    def __call__(self, progress: float | int) -> float | int:
        """The value at `progress`."""
        check_progress(progress, who="Joined")
        i = bisect_right(self.boundaries, progress)
        edges = (0.0, *self.boundaries, 1.0)
        return self.pieces[i]((progress - edges[i]) / (edges[i + 1] - edges[i]))
