"""Looking for a case that breaks a law, for so long and no longer."""

import time
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import FlakyFailure, Unsatisfiable, UnsatisfiedAssumption
from hypothesis.strategies import SearchStrategy

from tokencurric.testing.raised import Raised

# Seconds of processor time. A subject that obeys and answers in milliseconds never comes near the first two, so what
# is found out about it is the same on every machine.
FOR_ALL = 20.0  # a check of up to 100 cases may take
FOR_EACH = 0.2  # and each further case
TO_SHRINK = 2.0  # once a case is found, for smaller ones
UNDECIDED = 20  # cases that cannot be judged end a search, unless a fifth as many could
_WAITING = 30  # a second of waiting, for a device or a lock, counts as a thirtieth of one


class Broken(Exception):
    """What the body of a law saw. The runner adds the law and the case."""


class _Enough(BaseException):
    """Ends Hypothesis' search. No `Exception`, which Hypothesis would take for one more finding."""


class Clock:
    """Processor time since it was made; waiting counts too, at a discount.

    Example:
        >>> 0 <= Clock().seconds < 1
        True
    """

    def __init__(self) -> None:
        self._processor, self._wall = time.process_time(), time.perf_counter()

    @property
    def seconds(self) -> float:
        """Spent until now."""
        return max(time.process_time() - self._processor, (time.perf_counter() - self._wall) / _WAITING)


@dataclass
class Search:
    """What a search has come to.

    Args:
        examples: cases to try.
        subject: whose exceptions are located.
        known: exceptions that are not worth a smaller case, since they were reported before.
        tried: cases that were judged.
        undecided: cases that could not be judged, since the answer hung on differences as small as rounding.
        seen: what the smallest breaking case showed; None if none broke the law.
        case: that case.
        raised: where it raised, if that is what it did.
        cut: whether it ended before all cases were tried, and none was found.
    """

    examples: int
    subject: Any
    known: Collection[Raised] = ()
    tried: int = 0
    undecided: int = 0
    seen: str | None = None
    case: Any = None
    raised: Raised | None = None
    cut: bool = False
    _clock: Clock = field(default_factory=Clock, repr=False)
    _since: Clock | None = field(default=None, repr=False)

    @property
    def limit(self) -> float:
        """Seconds that the search may take before it has found anything."""
        return max(FOR_ALL, FOR_EACH * self.examples)

    def run(self, name: str, cases: SearchStrategy[Any], body: Callable[[Any], None]) -> None:
        """Try `body` on cases until one raises, then on smaller ones.

        Args:
            name: of the law. It seeds the search, so the same code meets the same cases in every run.
            cases: what is drawn from.
            body: returns if the law holds for a case.
        """

        @seed(zlib.crc32(name.encode()))
        @settings(
            settings.default,
            max_examples=self.examples,
            database=None,
            deadline=None,
            derandomize=False,
            print_blob=False,
            phases=[phase for phase in settings().phases if phase in (Phase.generate, Phase.shrink)],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(cases)
        def holds(case: Any) -> None:
            self._stop_in_time()
            torch.default_generator.manual_seed(0)  # what draws from the process' generator shall at least shrink
            try:
                body(case)
            except UnsatisfiedAssumption:
                self.undecided += 1
                raise
            except Exception as error:
                self._note(case, error)
                raise
            self.tried += 1

        try:
            holds()
        except _Enough:
            self.cut = self.seen is None
        except Unsatisfiable:
            self.cut = True
        except FlakyFailure:
            self.seen, self.raised = "The same call gave different answers when it was repeated.", None
        except Exception:
            if self.seen is None:  # not from the body: the strategy of cases, or Hypothesis itself
                raise
        if self.seen is None and not self.tried:
            self.seen = (
                "No case could be judged: in each the answer hung on ties, or on differences as small as rounding."
            )

    def _stop_in_time(self) -> None:
        if self._since is None:
            judged = self.tried + self.undecided
            if judged and (
                self._clock.seconds > self.limit or self.undecided > min(UNDECIDED, 4 * self.examples) + 4 * self.tried
            ):
                raise _Enough
        elif self.raised in self.known or self._since.seconds > TO_SHRINK:
            raise _Enough

    def _note(self, case: Any, error: Exception) -> None:
        if self._since is None:
            self._since = Clock()
        if self.seen is None or _size(case) <= _size(self.case):
            self.raised = None if isinstance(error, Broken) else Raised.of(error, self.subject)
            self.case, self.seen = case, str(error) if self.raised is None else self.raised.told


def _size(case: Any) -> tuple[int, int]:
    """What a smaller case has less of: tokens, then words to describe it."""
    return sum(row.count for row in getattr(case, "rows", ())), len(repr(case))
