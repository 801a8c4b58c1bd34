"""The kit against compressors that are known to be wrong, and against one that is right."""

import pytest

from tests.testing.gallery import ALL, GALLERY, RIGHT, KeepsTheFirst, LikesThePrompt, Right
from tokencurric.testing import Check, LawError, check_compressor, compressor_checks, parametrize_with_checks, search
from tokencurric.testing.cases import Case, RowSpec

# The mistakes that are looked for here are not those of types.
pytestmark = pytest.mark.usefixtures("unchecked")
CHECKS = {check.name: check for check in compressor_checks()}
FEW_TOKENS = 6


@pytest.mark.parametrize("kind", GALLERY, ids=lambda kind: kind.__name__)
def test_a_mistake_is_caught_with_a_small_counterexample(kind: type[Right], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "TO_SHRINK", 60.0)  # the smallest that there is, on a busy machine too
    check = CHECKS[kind.caught_by]
    with pytest.raises(LawError) as caught:
        check(kind(), examples=40)
    told = str(caught.value)
    assert kind.__name__ in told
    assert check.name in told
    assert check.law in told
    # A few laws have sizes of their own; and where no case can be judged, none is shown.
    if check.name != "holds_at_real_sizes" and check.most != 1 and kind is not KeepsTheFirst:
        assert sum(row.count for row in caught.value.case.rows) <= FEW_TOKENS, told


@pytest.mark.slow
@pytest.mark.parametrize("kind", GALLERY, ids=lambda kind: kind.__name__)
def test_a_mistake_is_called_by_its_name_alone(kind: type[Right]):
    broken = set()
    for name, check in CHECKS.items():
        try:
            check(kind(), examples=40)
        except LawError:
            broken.add(name)
    assert kind.caught_by in broken
    again = {"holds_at_real_sizes"}  # what is wrong for a few tokens is so for many
    assert kind.also == ALL or broken <= {kind.caught_by} | kind.also | again


@pytest.mark.slow
@parametrize_with_checks([kind() for kind in RIGHT])
def test_what_is_right_passes(subject: Right, check: Check):
    check(subject)


def test_every_check_catches_something():
    uncaught = CHECKS.keys() - {kind.caught_by for kind in GALLERY}
    # A replay differs only where the same question gets different answers, which has a check of its own.
    assert uncaught == {"replays_under_checkpointing"}


# What a law could take for a mistake of these is what makes them interesting.
NEARLY = {
    "LikesThePrompt": ["follows_a_permutation", "breaks_ties_by_position", "ranks_nan_last", "holds_at_real_sizes"],
    "StartsAnywhere": ["draws_anew", "heeds_every_bit", "takes_every_seed"],
    "StoresWhatItNeeds": ["forgets", "never_tires"],
    "HeedsPart": ["heeds_every_bit", "takes_every_seed"],
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in RIGHT for name in NEARLY.get(kind.__name__, [])], ids=str
)
def test_what_looks_wrong_is_not_accused(kind: type[Right], name: str):
    assert CHECKS[name].claimed_by(kind())
    CHECKS[name](kind(), examples=40)


def test_without_prompt_text_all_tokens_tie():
    """The case in which a compressor was accused that is right: it is among those that are drawn."""
    case = Case(rows=(RowSpec(count=3, text=0), RowSpec(count=3, text=1)), keep=2)
    scores = LikesThePrompt().scores(case.view({"text_tokens"}), 0)
    assert scores[0].tolist() == [0.0] * 3
    assert len(set(scores[1].tolist())) == 3


def test_three_lines_tell_a_stranger_what_is_wrong():
    with pytest.raises(
        LawError, match=r"(?s)OneTooFew\(\): .* BROKEN    keeps_the_budget.*exactly min\(keep, its number"
    ):
        check_compressor(GALLERY[0](), examples=10)
