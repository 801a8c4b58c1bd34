"""A check: one law, the cases it is tried on, and what is said when it breaks."""

import copy
import functools
import inspect
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import FlakyFailure, Unsatisfiable
from hypothesis.strategies import SearchStrategy

from tokencurric.errors import TokencurricError


class LawError(TokencurricError, AssertionError):
    """A law does not hold; the message has its name, its sentence and the smallest case found.

    Args:
        message: what is said. case: the smallest case found, to try by hand: `case.view()`, `case.budget()`.
    """

    def __init__(self, message: str, case: Any = None) -> None:
        super().__init__(message)
        self.case = case


class Broken(Exception):
    """What the body of a law saw. The runner adds the law and the case."""


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
        """
        prepared = self.prepare(subject)
        if not self.applies(prepared):
            return
        tried: list[Any] = []

        # One seed a check: the verdict on the same code is the same in every run, and nothing is written to disk.
        @seed(zlib.crc32(self.name.encode()))
        @settings(
            settings.default,
            max_examples=self._examples(examples),
            database=None,
            deadline=None,
            derandomize=False,
            print_blob=False,
            phases=[phase for phase in settings().phases if phase in (Phase.generate, Phase.shrink)],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(self.cases(prepared))
        def holds(case: Any) -> None:
            tried[:] = [case]
            torch.default_generator.manual_seed(0)  # what draws from the process' generator shall at least shrink
            self.body(fresh(prepared), case)

        with _process_as_it_was():
            try:
                holds()
            except Broken as broken:
                raise self._error(subject, str(broken), tried) from None
            except Unsatisfiable:
                seen = "No case could be judged: in each the answer hung on differences as small as rounding."
                raise self._error(subject, seen, tried) from None
            except FlakyFailure:
                seen = "The same call gave different answers when it was repeated."
                raise self._error(subject, seen, tried) from None
            except Exception as error:
                raise self._error(subject, f"It raised {_short(error)}", tried) from error

    def claimed_by(self, subject: Any) -> bool:
        """Whether `subject` claims the law, by its tags or by what it is."""
        return self.applies(self.prepare(subject))

    def _examples(self, asked: int | None) -> int:
        wanted = settings.default.max_examples if asked is None and settings.default else asked
        return min(limit for limit in (wanted, self.most) if limit is not None)

    def _error(self, subject: Any, seen: str, tried: list[Any]) -> LawError:
        lines = [f"{name_of(subject)} breaks `{self.name}`: {self.law}", *_indented(seen)]
        for case in tried:
            told = case.told(self.prepare(subject)) if hasattr(case, "told") else f"case: {case!r}"
            lines += _indented(told)
        return LawError("\n".join(lines), *tried)


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


def _short(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    return text if len(text) <= 600 else text[:600] + " ..."


def _indented(text: str) -> list[str]:
    return ["    " + line for line in text.splitlines()]
