"""A check: one law, the cases it is tried on, and what is said when it breaks."""

import copy
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import settings
from hypothesis.strategies import SearchStrategy

from tokencurric.errors import TokencurricError
from tokencurric.testing.raised import Raised
from tokencurric.testing.search import Broken as Broken
from tokencurric.testing.search import Search


class LawError(TokencurricError, AssertionError):
    """A law does not hold; the message has its name, its sentence and the smallest case found.

    Args:
        message: what is said.
        case: the smallest case found, to try by hand: `case.view()`, `case.budget()`.
        raised: where the subject raised, if an exception is how it broke the law.
    """

    def __init__(self, message: str, case: Any = None, raised: Raised | None = None) -> None:
        super().__init__(message)
        self.case, self.raised = case, raised


@dataclass(frozen=True)
class Check:
    """One law, tried on many cases.

    Args:
        name: how it is called in reports and in `expected_failed_checks`.
        law: one sentence.
        cases: from the subject to a Hypothesis strategy of cases.
        body: raises `Broken` when the law does not hold for (subject, case).
        applies: whether the subject claims the law at all.
        prepare: from what the user passed to what the body expects.
        most: at most this many examples, for slow bodies; None leaves the number to Hypothesis' profile.
    """

    name: str
    law: str
    cases: Callable[[Any], SearchStrategy[Any]] = field(repr=False)
    body: Callable[[Any, Any], None] = field(repr=False)
    applies: Callable[[Any], bool] = field(repr=False)
    prepare: Callable[[Any], Any] = field(repr=False)
    most: int | None = field(default=None, repr=False)

    def __call__(self, subject: Any, *, examples: int | None = None) -> None:
        """Try the law on `subject`.

        Args:
            subject: what is checked. examples: cases to try; None takes the number of Hypothesis' current profile.

        Raises:
            LawError: a case breaks the law; the smallest one found is in the message.

        Warns:
            UserWarning: the search ended before all cases were tried, for time was up or most could not be judged.
        """
        search = self.examine(subject, examples=examples)
        if search is not None and search.cut:
            warnings.warn(f"`{self.name}` was tried on {told_cut(search)}, for {name_of(subject)}.", stacklevel=2)

    def examine(self, subject: Any, *, examples: int | None = None, known: Collection[Raised] = ()) -> Search | None:
        """Try the law on `subject`, and return how far that went.

        Args:
            subject: what is checked.
            examples: as for a call.
            known: exceptions that were reported before: no smaller case is looked for where one of them is met.

        Returns:
            The search; None if the law is not claimed.

        Raises:
            LawError: as a call.
        """
        prepared = self.prepare(subject)
        if not self.applies(prepared):
            return None
        search = Search(self._examples(examples), prepared, known)
        with _process_as_it_was():
            search.run(self.name, self.cases(prepared), lambda case: self.body(fresh(prepared), case))
        if search.seen is not None:
            raise self._error(subject, search)
        return search

    def claimed_by(self, subject: Any) -> bool:
        """Whether `subject` claims the law, by its tags or by what it is."""
        return self.applies(self.prepare(subject))

    def _examples(self, asked: int | None) -> int:
        wanted = settings.default.max_examples if asked is None and settings.default else asked
        return min(limit for limit in (wanted, self.most) if limit is not None)

    def _error(self, subject: Any, search: Search) -> LawError:
        lines = [f"{name_of(subject)} breaks `{self.name}`: {self.law}", *_indented(search.seen or "")]
        if search.case is not None:
            case = search.case
            lines += _indented(case.told(search.subject) if hasattr(case, "told") else f"case: {case!r}")
        return LawError("\n".join(lines), search.case, search.raised)


def told_cut(search: Search) -> str:
    """How far a search came that ended early."""
    others = f"; {search.undecided} others hung on rounding" if search.undecided else ""
    return f"{search.tried} of {search.examples} cases{others}"


@contextmanager
def _process_as_it_was() -> Iterator[None]:
    """Whatever the subject does to the process, what is checked next is not its victim."""
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)


def name_of(subject: Any) -> str:
    """What a report calls the subject: a function's name, or else its `repr`.

    Without addresses: processes that share a test run have to give a test the same name.
    """
    if inspect.isfunction(subject):
        return subject.__name__
    if isinstance(subject, functools.partial):
        given = [*map(repr, subject.args), *(f"{name}={value!r}" for name, value in subject.keywords.items())]
        return f"{name_of(subject.func)}({', '.join(given)})"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(subject))


def fresh(subject: Any) -> Any:
    """A copy, so that what a subject remembers does not outlive an example; itself if it cannot be copied."""
    try:
        return copy.deepcopy(subject)
    except Exception:
        return subject


_MANY = re.compile(r"\[(?:\d+, ){16,}\d+\]")


def _elided(numbers: re.Match[str]) -> str:
    each = numbers.group()[1:-1].split(", ")
    return f"[{', '.join(each[:6])}, ..., {', '.join(each[-3:])}] ({len(each)} numbers)"


def _indented(text: str) -> list[str]:
    return ["    " + _MANY.sub(_elided, line) for line in text.splitlines()]
