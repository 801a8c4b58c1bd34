"""Running all checks on one subject, in a notebook, a script or under pytest."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokencurric.errors import RangeError
from tokencurric.testing.check import Check, LawError, name_of, told_cut
from tokencurric.testing.raised import Raised
from tokencurric.testing.subjects import compressor_checks, divergence_checks, model_checks, schedule_checks


@dataclass(frozen=True, repr=False)
class Report:
    """What the checks found. Its `repr` is meant to be read.

    Args:
        subject: `repr` of what was checked.
        passed: names of laws that hold.
        unclaimed: names of laws that its tags do not claim.
        expected: name to reason.
        failed: name to what was found.
        alike: name of a failed law to an earlier one that met the same exception.
        cut: name of a law that holds to how many cases were judged, if the search ended before all were.
    """

    subject: str
    passed: tuple[str, ...]
    unclaimed: tuple[str, ...]
    expected: Mapping[str, str]
    failed: Mapping[str, str]
    alike: Mapping[str, str] = field(default_factory=dict)
    cut: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        head = f"{self.subject}: {len(self.passed)} laws hold, {len(self.failed)} broken"
        lines = [head, *(f"  ok        {name}" + self._note(name, self.cut) for name in self.passed)]
        lines += [f"  expected  {name}: {reason}" for name, reason in self.expected.items()]
        lines += [f"  unclaimed {name}" for name in self.unclaimed]
        lines += [f"  BROKEN    {name}" + self._note(name, self.alike) for name in self.failed]
        return "\n\n".join(["\n".join(lines), *(text for name, text in self.failed.items() if name not in self.alike)])

    def _note(self, name: str, notes: Mapping[str, str]) -> str:
        said = notes.get(name)
        return "" if said is None else f" (raises what `{said}` does)" if notes is self.alike else f" ({said})"


def check_compressor(
    compressor: Any, *, expected_failed_checks: Mapping[str, str] | None = None, examples: int | None = None
) -> Report:
    """Hold a compressor, or a plain callable (tokens, keep), to the laws that it claims by its tags.

    Args:
        compressor: an instance. expected_failed_checks: names of checks that must fail, each with the reason.
        examples: cases a check; None takes the number of Hypothesis' current profile.

    Returns:
        A report that says what was checked.

    Raises:
        LawError: laws are broken, or one that was expected to break holds. The report is the message: for each law its
            name, its sentence and the smallest case found that breaks it; an exception that several laws meet is
            shown once, with the file and line where the compressor raised it.

    Example:
        >>> from tokencurric import Uniform
        >>> report = check_compressor(Uniform(), examples=2)
        >>> "nests" in report.passed, report.failed
        (True, {})
    """
    return check_all(compressor, compressor_checks(), expected_failed_checks, examples)


def check_schedule(
    schedule: Any, *, expected_failed_checks: Mapping[str, str] | None = None, examples: int | None = None
) -> Report:
    """Hold a schedule to its laws; arguments and errors as for `check_compressor`.

    Example:
        >>> from tokencurric import Cosine
        >>> check_schedule(Cosine(0.0, 0.9), examples=5).failed
        {}
    """
    return check_all(schedule, schedule_checks(), expected_failed_checks, examples)


def check_divergence(
    divergence: Any, *, expected_failed_checks: Mapping[str, str] | None = None, examples: int | None = None
) -> Report:
    """Hold a divergence to its laws; arguments and errors as for `check_compressor`.

    Example:
        >>> from tokencurric.losses import reverse_kl
        >>> check_divergence(reverse_kl, examples=5).failed
        {}
    """
    return check_all(divergence, divergence_checks(), expected_failed_checks, examples)


def check_model(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    expected_failed_checks: Mapping[str, str] | None = None,
    examples: int | None = None,
    **more: Any,
) -> Report:
    """Hold `compress` to its laws on a model of yours. Needs the extra `hf`.

    Args:
        model: of transformers, in evaluation mode. inputs: a batch as its processor makes it, without labels.
        expected_failed_checks, examples: as for `check_compressor`. more: as for `Prompted`.

    Returns:
        A report that says what was checked.

    Raises:
        LawError: as for `check_compressor`. UnsupportedModelError: `compress` refuses the model.

    Example:
        >>> from tokencurric.testing import check_model
        >>> check_model(model, inputs)  # doctest: +SKIP
    """
    from tokencurric.testing.models import Prompted

    return check_all(Prompted(model, inputs, **more), model_checks(), expected_failed_checks, examples)


def check_all(
    subject: Any, checks: Iterable[Check], expected: Mapping[str, str] | None = None, examples: int | None = None
) -> Report:
    """Run `checks` on `subject`; arguments and errors as for `check_compressor`."""
    checks, reasons = tuple(checks), dict(expected or {})
    _know(reasons, checks)
    passed, unclaimed, failed, excused = [], [], {}, {}
    alike: dict[str, str] = {}
    cut: dict[str, str] = {}
    first: dict[Raised, str] = {}  # laws that met an exception, each the first to do so
    for check in checks:
        if not check.claimed_by(subject):
            unclaimed.append(check.name)
            continue
        try:
            search = check.examine(subject, examples=examples, known=first.keys())
        except LawError as error:
            if check.name in reasons:
                excused[check.name] = reasons[check.name]
                continue
            failed[check.name] = str(error)
            if error.raised is not None and first.setdefault(error.raised, check.name) != check.name:
                alike[check.name] = first[error.raised]
        else:
            passed.append(check.name)
            if search is not None and search.cut:
                cut[check.name] = told_cut(search)
    for name in reasons.keys() - excused.keys():
        failed[name] = f"`{name}` was expected to fail ({reasons[name]}), and did not. Take it off the list."
    report = Report(name_of(subject), tuple(passed), tuple(unclaimed), excused, failed, alike, cut)
    if failed:
        raise LawError(repr(report))
    return report


def parametrize_with_checks(
    subjects: Sequence[Any],
    *,
    checks: Sequence[Check] | None = None,
    expected_failed_checks: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a pytest test of each pair of a subject and a law that it claims.

    The test takes `subject` and `check`, and calls one with the other.

    Args:
        subjects: compressors, or plain callables (tokens, keep), also partials of either.
        checks: others than `compressor_checks()`.
        expected_failed_checks: names of checks that must fail for each subject that claims them, with the reason.

    Raises:
        RangeError: an expected failure is the name of no check.

    Example:
        >>> from tokencurric import FastV
        >>> @parametrize_with_checks([FastV()])
        ... def test_fastv(subject, check):
        ...     check(subject)
    """
    import pytest

    checks, reasons = tuple(checks or compressor_checks()), dict(expected_failed_checks or {})
    _know(reasons, checks)
    pairs = []
    for subject in subjects:
        for check in checks:
            if check.claimed_by(subject):
                marks = [pytest.mark.xfail(reason=reasons[check.name], strict=True)] if check.name in reasons else []
                pairs.append(pytest.param(subject, check, marks=marks, id=f"{name_of(subject)}-{check.name}"))
    return pytest.mark.parametrize(("subject", "check"), pairs)


def _know(reasons: Mapping[str, str], checks: Iterable[Check]) -> None:
    known = [check.name for check in checks]
    unknown = sorted(reasons.keys() - set(known))
    if unknown:
        raise RangeError(
            f"expected_failed_checks needs names of checks; got {unknown}. A name that is wrong would excuse nothing. "
            f"The checks are {', '.join(known)}."
        )
