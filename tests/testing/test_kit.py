"""The kit itself: what it accepts, what it says, and that it is strict."""

import contextlib
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor

from tests.testing.gallery import ClaimsToIgnoreItsSeed, OneTooFew, Right, SwitchesGradOff
from tokencurric import Compressor, FastV, Linear, VisualView
from tokencurric.compressors import Tags
from tokencurric.errors import RangeError, ShapeError
from tokencurric.testing import (
    LawError,
    NotACompressorError,
    Plain,
    check_compressor,
    check_divergence,
    check_schedule,
    compressor_checks,
    parametrize_with_checks,
)
from tokencurric.testing.cases import KINDS, Case, RowSpec
from tokencurric.testing.check import name_of
from tokencurric.testing.laws.cost import work
from tokencurric.testing.packing import SIGNALS
from tokencurric.testing.plain import as_compressor
from tokencurric.testing.report import check_all
from tokencurric.testing.strategies import attention_maps, budgets, cases, views

pytestmark = pytest.mark.usefixtures("unchecked")
# Finding is enough here: explaining and shrinking what was found would take most of the time.
QUICK = settings(max_examples=2000, phases=[Phase.generate], database=None, deadline=None)
CHECKS = {check.name: check for check in compressor_checks()}


def longest(tokens: Tensor, keep: int, power: float = 2.0) -> Tensor:
    """The tokens of largest norm: a plain callable that is right."""
    norms = tokens.detach().float().abs().pow(power).sum(-1).nan_to_num(nan=-1.0)
    order = norms.sort(dim=1, descending=True, stable=True).indices
    mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return mask.scatter(1, order[:, :keep], True)


def longest_of_the_batch(tokens: Tensor, keep: int) -> Tensor:
    """One ranking for all rows: the budget holds for the batch, not for the row."""
    flat = tokens.detach().float().norm(dim=-1).flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(min(keep * tokens.shape[0], flat.numel())).indices] = True
    return mask.view(tokens.shape[:2])


@parametrize_with_checks([partial(longest, power=1.0)])
def test_a_plain_callable_can_pass(subject: object, check: object):
    check(subject)


def test_a_plain_callable_is_asked_what_it_can_answer():
    unasked = {name for name, check in CHECKS.items() if not check.claimed_by(longest)}
    assert {"ignores_padding", "keeps_tokens_only", "reads_what_it_declares", "takes_a_budget_a_row"} <= unasked
    assert "answers_each_row_alone" not in unasked


def test_a_plain_callable_can_be_wrong():
    with pytest.raises(LawError, match=r"longest_of_the_batch breaks `keeps_the_budget`") as caught:
        CHECKS["keeps_the_budget"](longest_of_the_batch)
    assert len(caught.value.case.rows) == 2


def test_a_plain_callable_may_claim_less():
    assert not CHECKS["nests"].claimed_by(Plain(longest, tags=Tags(nested=False)))
    assert CHECKS["nests"].claimed_by(Plain(longest))


def test_a_plain_callable_is_not_asked_about_padding():
    with pytest.raises(ShapeError, match="Plain needs one count for all rows, and rows without padding"):
        Plain(longest)(VisualView(tokens=torch.zeros(1, 2, 3), valid=torch.tensor([[True, False]])), keep=1)


def test_a_class_is_no_instance():
    with pytest.raises(
        NotACompressorError, match=r"got subject=FastV, a class.\nHint: pass an instance: FastV\(\), not FastV"
    ):
        check_compressor(FastV)


def test_what_is_nearly_a_compressor_is_told_what_it_lacks():
    class Nearly:
        needs = frozenset()

        def __call__(self, view, keep, *, seed=0):
            return view.mask

    with pytest.raises(NotACompressorError, match=r"got subject=.* without tags.\nHint: add tags = Tags\(\)"):
        check_compressor(Nearly())


def test_a_compressor_is_left_as_it_is():
    subject = FastV()
    assert as_compressor(subject) is subject
    assert isinstance(as_compressor(longest), Compressor)


def test_a_tag_is_held_against_its_claim():
    with pytest.raises(LawError, match=r"It is tagged deterministic; seed=0 keeps"):
        CHECKS["ignores_the_seed"](ClaimsToIgnoreItsSeed())


SOME = [CHECKS["keeps_the_budget"], CHECKS["keeps_tokens_only"]]
REASON = {"keeps_the_budget": "drops one on purpose"}


def test_an_expected_failure_is_reported_as_such():
    report = check_all(OneTooFew(), SOME, REASON)
    assert report.failed == {}
    assert report.expected == REASON
    assert "expected  keeps_the_budget: drops one on purpose" in repr(report)


def test_an_expected_failure_that_passes_is_a_failure():
    with pytest.raises(LawError, match=r"`keeps_the_budget` was expected to fail .*and did not. Take it off the list"):
        check_all(Right(), SOME, REASON)


def test_an_expected_failure_must_be_the_name_of_a_check():
    with pytest.raises(RangeError, match=r"expected_failed_checks needs names of checks; got \['keeps_budget'\]"):
        check_compressor(Right(), expected_failed_checks={"keeps_budget": "a slip"})
    with pytest.raises(RangeError, match="expected_failed_checks needs names of checks"):
        parametrize_with_checks([Right()], expected_failed_checks={"keeps_budget": "a slip"})


def test_the_same_code_gets_the_same_verdict():
    told = []
    for _ in range(2):
        torch.manual_seed(len(told))
        with pytest.raises(LawError) as caught:
            CHECKS["keeps_the_budget"](OneTooFew())
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_a_counterexample_can_be_tried_by_hand():
    with pytest.raises(LawError) as caught:
        CHECKS["keeps_the_budget"](OneTooFew())
    case = caught.value.case
    assert repr(case) in str(caught.value)
    again = eval(repr(case), {"Case": Case, "RowSpec": RowSpec, **vars(sys.modules["tokencurric.testing.packing"])})
    assert again == case
    wrong, right = (kind()(again.view({"attention"}), again.budget()).sum(1) for kind in (OneTooFew, Right))
    assert not torch.equal(wrong, right)


def test_a_wrong_schedule_and_a_wrong_divergence_are_caught():
    class Late(Linear):
        def __call__(self, progress):
            return super().__call__(min(1.0, progress * 0.9))

    with pytest.raises(LawError, match="breaks `meets_its_ends`"):
        check_schedule(Late(0.0, 1.0), examples=5)

    def squares(student, teacher, *, temperature=1.0):
        return (student - teacher.detach()).square().sum(-1)

    with pytest.raises(LawError, match=r"(?s)BROKEN    vanishes_at_equality.*scales_with"):
        check_divergence(squares, examples=10)


def test_work_is_counted():
    few, many = (work(FastV(), rows=2, tokens=n) for n in (64, 128))
    assert few.operations == many.operations > 5
    assert 1.5 < many.elements / few.elements < 2.5


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_of_their_kind(kind: str):
    values = RowSpec(12, kind=kind, seed=3).content({"attention"}).signals["attention"]
    distinct = len({repr(x) for x in values.tolist()})
    finite = bool(values.isfinite().all())
    expected = {
        "normal": distinct > 8 and finite,
        "close": distinct > 8 and float(values.max() - values.min()) < 0.02,
        "duplicates": 1 < distinct <= 3,
        "zeros": distinct == 1 and float(values.sum()) == 0,
        "ties": distinct <= 3,
        "huge": float(values.max()) > 1e28,
        "tiny": 0 < float(values.max()) < 1e-38,
        "nan": bool(values.isnan().any()) and not bool(values.isnan().all()),
        "inf": bool(values.isinf().any()) and not bool(values.isnan().any()),
    }
    assert expected[kind]


def test_a_signal_does_not_depend_on_which_others_are_asked_for():
    row = RowSpec(4, seed=5)
    assert torch.equal(row.content({"keys"}).signals["keys"], row.content(SIGNALS).signals["keys"])


@given(cases(least=1))
def test_content_stands_where_the_columns_say(case: Case):
    packed = case.pack({"attention"})
    for number, row in enumerate(case.rows):
        content = row.content({"attention"})
        found = packed.view.tokens.detach()[number, packed.columns[number]]
        torch.testing.assert_close(found, content.tokens.to(found.dtype), equal_nan=True)
        assert packed.view.mask[number].nonzero().flatten().tolist() == packed.columns[number]


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@pytest.mark.parametrize(
    "sort",
    [
        lambda view: view.valid is not None and bool((view.counts == 0).any()),
        lambda view: not view.tokens.is_contiguous() and view.tokens.shape[0] > 1,
        lambda view: view.tokens.requires_grad,
        lambda view: view.tokens.dtype is torch.bfloat16,
        lambda view: view.tokens.dtype is torch.float64,
        lambda view: bool(view.tokens.isnan().any()),
        lambda view: view.valid is not None and not bool(view.valid[0, 0]) and bool(view.valid[0, -1]),
        lambda view: view.tokens.shape[1] == 0,
        lambda view: view.row_key is None,
        lambda view: view.positions is not None,
    ],
)
def test_views_of_every_sort_are_drawn(sort):
    assert sort(find(views(), sort, settings=QUICK))


def test_budgets_of_every_sort_are_drawn():
    rows = [3, 5]
    for sort in (0, 1, 5, 6):
        assert (
            find(budgets(rows), lambda keep, sort=sort: isinstance(keep, int) and keep == sort, settings=QUICK) == sort
        )
    each = find(budgets(rows), lambda keep: isinstance(keep, Tensor) and int(keep[0]) > 3, settings=QUICK)
    assert int(each[0]) == 4
    assert find(budgets([]), lambda keep: True, settings=QUICK) in (0, 1)


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@given(attention_maps(), st.data())
def test_attention_maps_are_shares(attention: Tensor, data: st.DataObject):
    assert attention.ndim == 2
    assert not bool(attention.isnan().any())


SUITE = """
from tokencurric import FastV
from tokencurric.budget import row_budget
from tokencurric.testing import compressor_checks, parametrize_with_checks

SOME = [check for check in compressor_checks() if check.name in ("keeps_the_budget", "keeps_tokens_only")]


class Generous(FastV):
    def __call__(self, view, keep, *, seed=0):
        return super().__call__(view, row_budget(keep, view.mask) + 1)


@parametrize_with_checks([FastV(), Generous()], checks=SOME, expected_failed_checks={"keeps_the_budget": "generous"})
def test_it(subject, check):
    check(subject)
"""


def test_under_pytest_an_expected_failure_is_strict(tmp_path: Path):
    (tmp_path / "test_mine.py").write_text(SUITE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert "XFAIL" in done.stdout
    assert "Generous()-keeps_the_budget" in done.stdout
    assert "FAILED" in done.stdout
    assert "[XPASS(strict)] generous" in done.stdout
    assert "2 passed" in done.stdout


def test_without_hypothesis_the_kit_says_what_to_install():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import tokencurric\n"
        "try:\n    import tokencurric.testing\n"
        "except tokencurric.TokencurricError as error:\n    print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert "MissingDependencyError tokencurric.testing needs the package hypothesis" in done.stdout
    assert "pip install 'tokencurric[testing]'" in done.stdout


def test_names_hold_no_addresses():
    """Or the workers of pytest-xdist would collect different tests."""

    class Nameless:
        pass

    assert name_of(partial(longest, power=1.0)) == "longest(power=1.0)"
    assert name_of(partial(partial(longest, 2), power=1.0)) == "longest(2, power=1.0)"
    assert name_of(Nameless()).endswith("Nameless object>")


@pytest.mark.parametrize("name", ["leaves_the_process_alone", "keeps_the_budget"])
def test_what_a_subject_does_to_the_process_is_undone(name: str):
    """Or the next subject would be blamed for it."""
    with contextlib.suppress(LawError):
        CHECKS[name](SwitchesGradOff(), examples=3)
    assert torch.is_grad_enabled()


def test_what_hangs_on_an_exact_tie_is_let_off():
    """Tokens 0 and 5 get the same attention: which of them goes is a matter of place, and no law's."""
    case = Case(rows=(RowSpec(count=7, text=0, kind="close"),), keep=6)
    attention = case.view({"attention"}).attention
    assert attention is not None
    assert attention[0, 0] == attention[0, 5] == attention.min()
    with pytest.raises(UnsatisfiedAssumption):
        CHECKS["follows_a_permutation"].body(FastV(), case)
