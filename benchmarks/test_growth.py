"""The fit behind the slopes, and the figure."""

import pytest

from benchmarks.growth import AXES, FIXED, draw, measure, shapes, slope


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_slope_of_a_power_is_its_exponent(power):
    sizes = [2**number for number in range(7)]
    assert slope([(size, 3 * size**power) for size in sizes]) == pytest.approx(power)
    assert slope([(size, 1e-3 * size**power + (size < 8)) for size in sizes]) == pytest.approx(power), "small ones bend"


def test_one_size_grows_at_a_time():
    for axis in AXES:
        found = [{"visual": shape.visual, "batch": shape.batch, "dim": shape.dim} for _, shape in shapes(axis, 3)]
        assert [sizes.pop(axis) for sizes in found] == [size for size, _ in shapes(axis, 3)]
        assert all(sizes == {name: size for name, size in FIXED.items() if name != axis} for sizes in found)


def test_a_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    draw({axis: measure(axis, doublings=1, rounds=1) for axis in AXES}, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
