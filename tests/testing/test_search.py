"""How long a check takes, and how an exception is reported."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

from tests.testing import gallery
from tests.testing.gallery import DrawsFromTheProcess, NeedsAToken, OneTooFew, Right
from tokencurric import DART
from tokencurric.testing import Check, LawError, check_compressor, compressor_checks, search
from tokencurric.testing.check import Broken
from tokencurric.testing.raised import Raised
from tokencurric.testing.report import check_all

pytestmark = pytest.mark.usefixtures("unchecked")
CHECKS = {check.name: check for check in compressor_checks()}
NUMBERS = st.integers(0, 10**6)


def law(body, cases=NUMBERS) -> Check:
    """A check of anything at all."""
    return Check(
        name="a_law",
        law="Some sentence.",
        cases=lambda _: cases,
        body=body,
        applies=lambda _: True,
        prepare=lambda subject: subject,
    )


def busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_shrinking_ends_in_time_and_the_finding_is_reported(monkeypatch):
    def slow_and_wrong(subject, number):
        busy(0.02)
        if number > 17:
            raise Broken(f"{number} is too much.")

    monkeypatch.setattr(search, "TO_SHRINK", 0.1)
    start = time.process_time()
    with pytest.raises(LawError, match=r"\d+ is too much") as caught:
        law(slow_and_wrong)(None, examples=100)
    assert time.process_time() - start < 1.5
    assert f"{caught.value.case} is too much." in str(caught.value)
    # With more time the same finding is shrunk to the end.
    monkeypatch.setattr(search, "TO_SHRINK", 60.0)
    with pytest.raises(LawError, match="18 is too much"):
        law(slow_and_wrong)(None, examples=100)


def test_a_slow_subject_is_tried_on_fewer_cases_and_that_is_named(monkeypatch):
    monkeypatch.setattr(search, "FOR_ALL", 0.2)
    monkeypatch.setattr(search, "FOR_EACH", 0.0)
    slow = law(lambda subject, number: busy(0.05))
    with pytest.warns(UserWarning, match=r"`a_law` was tried on \d of 100 cases, for 'slow'"):
        slow("slow", examples=100)
    report = check_all("slow", [slow], examples=100)
    assert report.passed == ("a_law",)
    assert "of 100 cases" in report.cut["a_law"]
    assert f"ok        a_law ({report.cut['a_law']})" in repr(report)


@pytest.mark.filterwarnings("error")
def test_a_subject_that_is_quick_and_right_is_tried_on_all():
    for subject, name in ((Right(), "keeps_the_budget"), (DART(), "answers_each_row_alone")):
        found = CHECKS[name].examine(subject, examples=60)
        assert (found.tried, found.cut) == (60, False)


def test_waiting_counts_at_a_discount():
    clock = search.Clock()
    time.sleep(0.4)
    assert 0.4 / 30 <= clock.seconds < 0.3


def test_what_can_never_be_judged_is_broken_and_soon():
    judged = []

    def undecided(subject, number):
        judged.append(number)
        assume(False)

    with pytest.raises(LawError, match="No case could be judged"):
        law(undecided)(None, examples=1000)
    assert len(judged) < 30


def test_a_search_that_finds_nothing_is_the_same_each_time():
    seen = []
    for _ in range(2):
        met = []
        law(lambda subject, number, met=met: met.append(number))(None, examples=20)
        seen.append(met)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > 10


def test_a_subject_that_draws_takes_seconds():
    """It took minutes: each law tried a thousand cases of which it could judge none."""
    start = time.process_time()
    with pytest.raises(LawError, match="BROKEN    repeats_itself"):
        check_all(DrawsFromTheProcess(), [check for check in compressor_checks() if check.name != "compiles"])
    assert time.process_time() - start < 30


@pytest.mark.parametrize("name", ["keeps_the_budget", "repeats_itself", "nests"])
def test_a_bound_is_kept_by_each_check(name: str):
    start = time.process_time()
    with pytest.raises(LawError):
        CHECKS[name](OneTooFew() if name == "keeps_the_budget" else DrawsFromTheProcess(), examples=100)
    assert time.process_time() - start < search.TO_SHRINK + 4


def line_of(text: str) -> int:
    lines = Path(gallery.__file__).read_text(encoding="utf-8").splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if text in line]
    return number


def test_an_exception_is_reported_once_with_its_place():
    with pytest.raises(LawError) as caught:
        check_compressor(NeedsAToken(), examples=20)
    told = str(caught.value)
    place = (
        f"gallery.py:{line_of('attention - attention.amin(1, keepdim=True)')}, in scores: return attention - attention"
    )
    assert told.count("It raised IndexError") == told.count(place) == 1
    assert "BROKEN    answers_with_a_mask\n" in told
    assert "BROKEN    keeps_the_budget (raises what `answers_with_a_mask` does)" in told
    assert told.count("(raises what") >= 3


def test_exceptions_from_two_lines_are_two():
    def first(subject, number):
        raise ValueError("one")

    def second(subject, number):
        raise ValueError("one")

    checks = [replace(law(first), name="first"), replace(law(second), name="second"), replace(law(first), name="third")]
    with pytest.raises(LawError) as caught:
        check_all(None, checks, examples=5)
    assert str(caught.value).count("It raised ValueError: one") == 2
    assert "BROKEN    third (raises what `first` does)" in str(caught.value)
    assert "BROKEN    second\n" in str(caught.value)


def test_the_place_is_in_the_code_of_the_subject_and_not_in_a_library():
    class Mine:
        def __call__(self):
            return self.choose()

        def choose(self):
            return torch.zeros(2).topk(3)  # raises in torch

    class Nested:
        def __call__(self):
            from statistics import mean

            return mean([])  # raises in the standard library, in Python

    for subject, function in ((Mine(), "choose"), (Nested(), "__call__")):
        try:
            subject()
        except Exception as error:
            raised = Raised.of(error, subject)
        assert (raised.function, Path(raised.file).name) == (function, "test_search.py")
    assert raised.kind == "StatisticsError"
