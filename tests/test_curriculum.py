"""Presets against the papers' numbers, and what a stage depends on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencurric import Constant, Curriculum, Linear, Stage, icd, lcd, tcd
from tokencurric.curriculum import DeepToShallow, constant
from tokencurric.errors import RangeError
from tokencurric.testing.strategies import curricula, progress

TOTAL = 1000

# low, high, margin and layer of a decoder of 32 layers, at the start, in the middle and towards the end.
TABLE = {
    "tcd": (tcd(), [(0.0, 0.05, 0.0, 2), (0.25, 0.475, 0.15, 2), (0.5, 0.9, 0.3, 2)]),
    "tcd, code": (tcd(variant="code"), [(0.1, 0.1, 0.1, 2), (0.18, 0.42, 0.3, 2), (0.26, 0.74, 0.3, 2)]),
    "lcd": (lcd(), [(0.2, 0.9, 0.0, 32), (0.2, 0.9, 0.15, 17), (0.2, 0.9, 0.3, 2)]),
    "icd": (icd(), [(0.0, 0.05, 0.0, 32), (0.25, 0.475, 0.15, 17), (0.5, 0.9, 0.3, 2)]),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_has_the_numbers_of_its_table(name: str):
    curriculum, rows = TABLE[name]
    for beta, (low, high, margin, layer) in zip((0.0, 0.5, 1.0), rows, strict=True):
        assert curriculum.low(beta) == pytest.approx(low)
        assert curriculum.high(beta) == pytest.approx(high)
        assert curriculum.margin(beta) == pytest.approx(margin)
        if isinstance(curriculum.layer, DeepToShallow):
            assert curriculum.layer.value(beta, layers=32) == pytest.approx(layer)
        else:
            assert curriculum.layer(beta) == layer


def test_stages_stay_what_they_were():
    """A run that is resumed with another version of this library draws what it would have drawn."""
    assert tcd().at(30, 100, seed=7, layers=32) == Stage(
        layer=2,
        layers=32,
        student=0.2859594856336932,
        teacher=0.2859594856336932 - 0.09,
        margin=0.09,
        progress=0.3,
        seed=17641771265849953532,
    )
    other = icd().at(60, 100, layers=32)
    assert (other.layer, other.student, other.seed) == (14, 0.49609652281382455, 10322047681363630443)


def test_the_published_script_stops_widening_its_margin():
    assert [round(tcd(variant="code").margin(beta), 6) for beta in (0.2, 0.39, 0.4, 0.41)] == [0.2, 0.295, 0.3, 0.3]


def test_presets_take_another_layer():
    assert tcd(layer=5).at(0, 10, layers=8).layer == 5
    assert lcd(last=4).layer.value(1.0, layers=8) == 4
    assert icd(last=4).layer.value(1.0, layers=8) == 4


def test_constant_is_a_ratio_at_a_layer():
    stage = constant(0.75, layer=1, margin=0.25).at(3, 10, seed=5, layers=4)
    assert (stage.student, stage.teacher, stage.layer, stage.margin) == (0.75, 0.5, 1, 0.25)
    assert constant(0.75).at(3, 10, layers=4).teacher == 0.75


STEPS = st.integers(0, TOTAL - 1)
SEEDS = st.integers(0, 2**40)


@given(curricula(), STEPS, SEEDS)
def test_a_stage_keeps_within_its_bounds(curriculum: Curriculum, step: int, seed: int):
    stage = curriculum.at(step, TOTAL, seed, layers=6)
    beta = step / TOTAL
    assert stage.progress == beta
    assert curriculum.low(beta) - 1e-12 <= stage.student <= curriculum.high(beta) + 1e-12
    assert stage.margin == curriculum.margin(beta)
    assert stage.teacher == max(0.0, stage.student - stage.margin)
    assert 0 <= stage.layer <= stage.layers == 6


@given(curricula(), st.lists(STEPS, min_size=1, max_size=5), SEEDS)
def test_a_stage_depends_on_nothing_that_was_asked_before(curriculum: Curriculum, steps: list[int], seed: int):
    first = curriculum.at(steps[0], TOTAL, seed, layers=6)
    for step in steps:
        curriculum.at(step, TOTAL, seed, layers=6)
    assert curriculum.at(steps[0], TOTAL, seed, layers=6) == first
    assert eval(repr(first), {"Stage": Stage}) == first


def test_another_step_or_seed_is_another_draw():
    ratios = {lcd().at(step, TOTAL, seed, layers=6).student for step in range(30) for seed in range(30)}
    assert len(ratios) == 900
    seeds = {lcd().at(step, TOTAL, seed, layers=6).seed for step in range(30) for seed in range(30)}
    assert len(seeds) == 900
    # The seed for the compressor is no rescaled ratio.
    stages = [lcd().at(step, TOTAL, 0, layers=6) for step in range(200)]
    by_seed = sorted(range(200), key=lambda i: stages[i].seed)
    by_ratio = sorted(range(200), key=lambda i: stages[i].student)
    assert by_seed != by_ratio


def test_ratios_fall_evenly_between_the_bounds():
    total = 4000
    drawn = sorted((lcd().at(step, total, 3, layers=6).student - 0.2) / 0.7 for step in range(total))
    far = max(max(abs(x - i / total), abs(x - (i + 1) / total)) for i, x in enumerate(drawn))
    assert far < 1.95 / total**0.5  # Kolmogorov and Smirnov: exceeded by one in a thousand fair draws
    assert max(abs(x**1.2 - i / total) for i, x in enumerate(drawn)) > 1.95 / total**0.5


@pytest.mark.parametrize(("value", "layer"), [(2.49, 2), (2.5, 3), (3.5, 4), (0.0, 0), (5.6, 6)])
def test_a_layer_is_rounded_half_up(value: float, layer: int):
    zero = Constant(0.0)
    assert Curriculum(low=zero, high=zero, margin=zero, layer=Constant(value)).at(0, 1, layers=6).layer == layer


@given(progress(), st.integers(1, 40), st.integers(0, 40))
def test_the_deep_layer_moves_from_the_top_to_its_last(beta: float, layers: int, last: int):
    value = DeepToShallow(last=last).value(beta, layers=layers)
    assert value == pytest.approx(layers * (1 - beta) + last * beta)


@pytest.mark.parametrize(
    ("layer", "student", "teacher", "compresses", "distils"),
    [
        (2, 0.5, 0.3, True, True),
        (2, 0.5, 0.5, True, False),
        (6, 0.5, 0.3, False, False),
        (2, 0.0, 0.0, False, False),
        (0, 0.1, 0.0, True, True),
    ],
)
def test_a_stage_knows_whether_there_is_something_to_do(
    layer: int, student: float, teacher: float, compresses: bool, distils: bool
):
    stage = Stage(layer=layer, layers=6, student=student, teacher=teacher, margin=0.2, progress=0.5, seed=0)
    assert (stage.compresses, stage.distils) == (compresses, distils)


@pytest.mark.parametrize(("step", "total"), [(-1, 10), (10, 10), (0, 0)])
def test_a_step_outside_the_training_is_refused(step: int, total: int):
    with pytest.raises(RangeError, match=rf"Curriculum\.at needs 0 <= step < total; got step={step}, total={total}"):
        tcd().at(step, total, layers=6)


def curriculum_of(*, low: float = 0.2, high: float = 0.4, margin: float = 0.1, layer: float = 2) -> Curriculum:
    return Curriculum(low=Constant(low), high=Constant(high), margin=Constant(margin), layer=Constant(layer))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"low": 0.5}, "Curriculum needs 0 <= low <= high <= 1; got low=0.5, high=0.4 at progress 0"),
        ({"low": -0.1}, "Curriculum needs 0 <= low <= high <= 1"),
        ({"high": 1.1}, "Curriculum needs 0 <= low <= high <= 1"),
        ({"high": float("nan")}, "Curriculum needs 0 <= low <= high <= 1"),
        ({"margin": -0.1}, "Curriculum needs margin >= 0; got margin=-0.1"),
        ({"margin": float("nan")}, "Curriculum needs margin >= 0"),
        ({"layer": 7}, "Curriculum needs 0 <= layer <= 6, the depth of the decoder; got layer=7"),
        ({"layer": -1}, "Curriculum needs 0 <= layer <= 6"),
    ],
)
def test_a_value_without_meaning_is_refused(wrong: dict[str, float], words: str):
    assert curriculum_of().at(0, 10, layers=6).compresses
    with pytest.raises(RangeError, match=words):
        curriculum_of(**wrong).at(0, 10, layers=6)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_variant_is_refused():
    with pytest.raises(RangeError, match="tcd needs variant 'paper' or 'code'; got variant='talk'"):
        tcd(variant="talk")


def test_bounds_may_meet():
    equal = Curriculum(low=Linear(0.0, 1.0), high=Linear(0.0, 1.0), margin=Constant(0.0))
    assert [equal.at(step, 4, layers=3).student for step in range(4)] == [0.0, 0.25, 0.5, 0.75]
