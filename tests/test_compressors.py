"""Each method against its naive reference, and against what the published code keeps.

The laws that all compressors obey are tested in tests/testing.
"""

import importlib
import importlib.util
import inspect
import itertools
import json
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.testing.discovery import compressors
from tokencurric import DART, Compressor, FastV, Random, Uniform, VisualView
from tokencurric.compressors import dart
from tokencurric.compressors.dart import least_similar
from tokencurric.compressors.protocol import Tags
from tokencurric.compressors.uniform import _reverse_bits
from tokencurric.errors import RangeError
from tokencurric.testing.answers import question, same
from tokencurric.testing.cases import Case, RowSpec
from tokencurric.testing.strategies import cases

GOLDEN = json.loads((Path(__file__).parent / "golden" / "upstream_selections.json").read_text())


def file_of_reference(compressor: Compressor) -> str:
    """The file in tests/reference named like that of the compressor."""
    return f"tests.reference.{type(compressor).__module__.rpartition('.')[2]}"


def reference(compressor: Compressor) -> Any:
    return importlib.import_module(file_of_reference(compressor))


REFERENCED = [one for one in compressors() if importlib.util.find_spec(file_of_reference(one))]


def test_the_first_four_have_a_reference():
    assert {"Random", "Uniform", "FastV", "DART"} <= {type(one).__name__ for one in REFERENCED}


@pytest.mark.parametrize("compressor", REFERENCED, ids=repr)
@given(case=cases(kinds=("normal", "nan"), dtypes=False, most=14))
def test_keeps_what_its_reference_keeps(compressor: Compressor, case: Case):
    asked = question(compressor, case)
    expected = reference(compressor).survivors(asked.packed.view, case.budget(), seed=case.seed)
    found = asked.survivors(compressor)
    same(compressor, case, found, expected, told=f"kept {found}, the reference {expected}")


@pytest.mark.parametrize("compressor", [*compressors(), Compressor], ids=repr)
def test_the_call_is_that_of_the_protocol(compressor: Compressor):
    """By which a caller may leave the seed out, and has to name it."""
    parameters = inspect.signature(compressor.__call__).parameters.values()
    told = [(each.name, each.kind, each.default) for each in parameters if each.name != "self"]
    empty, place = inspect.Parameter.empty, inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert told == [("view", place, empty), ("keep", place, empty), ("seed", inspect.Parameter.KEYWORD_ONLY, 0)]


@pytest.mark.parametrize("compressor", compressors(), ids=repr)
def test_a_compressor_is_a_value(compressor: Compressor):
    names = vars(importlib.import_module("tokencurric.compressors"))
    assert eval(repr(compressor), dict(names)) == compressor
    assert hash(type(compressor)()) == hash(type(compressor)())
    assert compressor != object()
    with pytest.raises(FrozenInstanceError):
        compressor.anything = 1


def test_tags_claim_what_most_methods_do():
    told = {each.name: (each.default, each.kw_only) for each in fields(Tags)}
    claims = {"exact": True, "nested": True, "deterministic": True, "uses_position": False, "stage": "in_llm"}
    assert told == {name: (default, True) for name, default in claims.items()}
    assert Tags() == Tags(**claims) != Tags(nested=False)
    with pytest.raises(FrozenInstanceError):
        Tags().nested = False


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5))
def test_uniform_reverses_the_bits_of_ranks(ranks: list[int]):
    expected = [int(f"{rank:032b}"[::-1], 2) // 2 for rank in ranks]
    assert _reverse_bits(torch.tensor(ranks)).tolist() == expected


def pictures(seed: int) -> VisualView:
    """Two rows as large as those of a real model, the second one shorter."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=g)

    return VisualView(
        tokens=drawn(576, 32),
        valid=torch.arange(576) < torch.tensor([[576], [300]]),
        row_key=torch.tensor([5, 6]),
        normed_tokens=drawn(576, 32),
        keys=drawn(576, 2, 16),
        attention=drawn(576).softmax(-1),
        normed_text_tokens=drawn(40, 32),
        text_keys=drawn(40, 2, 16),
        text_valid=torch.arange(40) < torch.tensor([[40], [7]]),
    )


def kept_by(mask: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask]


@pytest.mark.parametrize("compressor", REFERENCED, ids=repr)
def test_keeps_what_its_reference_keeps_of_a_whole_picture(compressor: Compressor):
    view = pictures(0)
    answer = kept_by(compressor(view, 128, seed=3))
    assert answer == reference(compressor).survivors(view, 128, seed=3)
    # The control: another picture gets, unless nothing of it is read, another answer; another budget always does.
    assert bool(compressor.needs) == (kept_by(compressor(pictures(1), 128, seed=3)) != answer)
    assert kept_by(compressor(view, 127, seed=3)) != answer


def drawn(golden: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, slice]:
    """Keys, hidden states and attention of a golden case, and where its visual tokens stand."""
    g = torch.Generator().manual_seed(golden["seed"])
    start, visual, heads, width = golden["start"], golden["visual"], golden["heads"], golden["head_dim"]
    length = start + visual + golden["text_after"]
    keys = torch.randn(1, heads, length, width, generator=g)
    hidden = torch.randn(1, length, heads * width, generator=g)
    attention = torch.rand(1, heads, length, length, generator=g).tril()
    return keys, hidden, attention / attention.sum(-1, keepdim=True), slice(start, start + visual)


def positions(mask: Tensor, where: slice) -> list[int]:
    return [where.start + i for i in mask[0].nonzero().flatten().tolist()]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: str(golden["seed"]))
def test_fastv_keeps_what_the_published_code_keeps(golden: dict[str, Any]):
    _, hidden, attention, where = drawn(golden)
    wanted = golden["fastv_kept"]
    view = VisualView(tokens=hidden[:, where], attention=attention.mean(1)[:, -1, where])
    assert positions(FastV()(view, keep=len(wanted)), where) == wanted
    reversed_view = VisualView(tokens=hidden[:, where], attention=-attention.mean(1)[:, -1, where])
    assert positions(FastV()(reversed_view, keep=len(wanted)), where) != wanted


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: str(golden["seed"]))
def test_dart_takes_for_each_pivot_what_the_published_code_takes(golden: dict[str, Any]):
    _, hidden, _, where = drawn(golden)
    order, share = golden["dart_pivot_order"], golden["dart_per_pivot"]
    pivots = torch.zeros(1, where.stop - where.start, dtype=torch.bool)
    pivots[0, torch.tensor(golden["dart_visual_pivots"]) - where.start] = True

    def kept(shares: Tensor) -> list[int]:
        return positions(pivots | least_similar(hidden[:, where], hidden[:, order], shares, ~pivots), where)

    assert kept(torch.full((1, len(order)), share)) == golden["dart_kept"]
    assert kept(torch.full((1, len(order)), share + 1)) != golden["dart_kept"]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: str(golden["seed"]))
def test_dart_finds_the_published_pivots(golden: dict[str, Any]):
    keys, hidden, _, where = drawn(golden)
    by_token = keys.transpose(1, 2)
    view = VisualView(
        tokens=hidden[:, where],
        normed_tokens=hidden[:, where],
        keys=by_token[:, where],
        normed_text_tokens=hidden[:, where.stop :],
        text_keys=by_token[:, where.stop :],
    )
    assert positions(DART()(view, keep=4), where) == sorted(golden["dart_visual_pivots"])
    text = reference(DART()).pivots(view.text_keys[0].tolist(), 4)
    assert [where.stop + i for i in text] == golden["dart_text_pivots"]


def test_dart_without_prompt_text_has_visual_pivots_only():
    case = Case(rows=(RowSpec(40, text=0),), keep=20)
    found = question(DART(), case).survivors(DART())
    with_text = question(DART(), replace(case, rows=(RowSpec(40, text=6),))).survivors(DART())
    assert len(found[0]) == 20
    assert found != with_text


@pytest.mark.parametrize("pivots", [{"visual_pivots": 0}, {"text_pivots": -1}])
def test_dart_without_a_visual_pivot_is_refused(pivots: dict[str, int]):
    with pytest.raises(RangeError, match=r"DART needs visual_pivots >= 1 and text_pivots >= 0; got visual_pivots="):
        DART(**pivots)


@given(st.integers(1, 8), st.integers(0, 8))
def test_dart_keeps_the_budget_with_any_number_of_pivots(visual: int, text: int):
    case = Case(rows=(RowSpec(20, text=5), RowSpec(3, text=0, seed=1)), keep=9)
    subject = DART(visual_pivots=visual, text_pivots=text)
    assert [len(kept) for kept in question(subject, case).survivors(subject)] == [9, 3]


DRAWS, TOKENS, KEEP = 4000, 12, 5
FAIR, FAIR_PAIR = KEEP / TOKENS, KEEP * (KEEP - 1) / (TOKENS * (TOKENS - 1))


def unfairness(masks: Tensor) -> float:
    """The largest deviation of a token's or a pair's share of the draws, in standard deviations of a fair draw."""
    kept = masks.double()
    both = kept.T @ kept / DRAWS
    each = both.diagonal()
    pairs = both[torch.triu(torch.ones_like(both), 1).bool()]
    off_each = (each - FAIR).abs().max() / (FAIR * (1 - FAIR) / DRAWS) ** 0.5
    off_pair = (pairs - FAIR_PAIR).abs().max() / (FAIR_PAIR * (1 - FAIR_PAIR) / DRAWS) ** 0.5
    return float(max(off_each, off_pair))


def test_random_is_fair_over_samples_and_over_seeds():
    tokens = torch.zeros(DRAWS, TOKENS, 1)
    by_sample = Random()(VisualView(tokens=tokens), keep=KEEP, seed=7)
    one = VisualView(tokens=tokens[:1])
    by_seed = torch.cat([Random()(one, keep=KEEP, seed=seed) for seed in range(DRAWS)])
    # 78 numbers; one in a million fair draws deviates by five standard deviations in one of them.
    assert unfairness(by_sample) < 5
    assert unfairness(by_seed) < 5
    # The control: a draw that is a little unfair to one token.
    biased = by_sample.clone()
    biased[: DRAWS // 10, 0] = True
    assert unfairness(biased) > 5


def test_random_differs_between_neighbouring_seeds_and_samples():
    view = VisualView(tokens=torch.zeros(2, 64, 1))
    masks = [Random()(view, keep=32, seed=seed) for seed in (0, 1)]
    for a, b in ((masks[0][0], masks[0][1]), (masks[0][0], masks[1][0]), (masks[0][1], masks[1][0])):
        assert 4 < int((a & b).sum()) < 28


@pytest.mark.parametrize("keep", [1, 2, 3, 7, 16, 48])
def test_uniform_leaves_no_long_gap(keep: int):
    n = 144
    (kept,) = question(Uniform(), Case(rows=(RowSpec(n),), keep=keep)).survivors(Uniform())
    edges = [*kept, n + kept[0]]
    # Bit reversal halves gaps: the longest is at most twice what an even spread over the next power of two has.
    assert max(b - a for a, b in itertools.pairwise(edges)) <= 2 * 256 / keep


def test_key_norms_are_the_same_in_parts(monkeypatch):
    """On a CPU norms of keys are made in parts that fit into the cache."""
    torch.manual_seed(0)
    for keys in (torch.randn(3, 5, 2, 4), torch.randn(2, 7, 2, 4).bfloat16(), torch.randn(0, 4, 2, 4)):
        whole = torch.linalg.vector_norm(keys.float(), ord=1, dim=(2, 3))
        for size in (1, 17, 2**20):
            monkeypatch.setattr(dart, "_IN_CACHE", size)
            torch.testing.assert_close(dart._l1_norm(keys), whole)
