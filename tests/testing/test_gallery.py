"""The kit against compressors that are known to be wrong, and against one that is right."""

import pytest

from tests.testing.gallery import ALL, GALLERY, Right
from tokencurric.testing import Check, LawError, check_compressor, compressor_checks, parametrize_with_checks

# The mistakes that are looked for here are not those of types.
pytestmark = pytest.mark.usefixtures("unchecked")
CHECKS = {check.name: check for check in compressor_checks()}
FEW_TOKENS = 6


@pytest.mark.parametrize("kind", GALLERY, ids=lambda kind: kind.__name__)
def test_a_mistake_is_caught_with_a_small_counterexample(kind: type[Right]):
    check = CHECKS[kind.caught_by]
    with pytest.raises(LawError) as caught:
        check(kind(), examples=40)
    told = str(caught.value)
    assert kind.__name__ in told
    assert check.name in told
    assert check.law in told
    if check.most != 1:  # a check of one example measures it at a size of its own
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
    assert kind.also == ALL or broken <= {kind.caught_by} | kind.also


@pytest.mark.slow
@parametrize_with_checks([Right()])
def test_what_is_right_passes(subject: Right, check: Check):
    check(subject)


def test_every_check_catches_something():
    uncaught = CHECKS.keys() - {kind.caught_by for kind in GALLERY}
    # A replay differs only where the same question gets different answers, which has a check of its own.
    assert uncaught == {"replays_under_checkpointing"}


def test_three_lines_tell_a_stranger_what_is_wrong():
    with pytest.raises(
        LawError, match=r"(?s)OneTooFew\(\): .* BROKEN    keeps_the_budget.*exactly min\(keep, its number"
    ):
        check_compressor(GALLERY[0](), examples=10)
