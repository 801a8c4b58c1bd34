"""The fit behind the slopes, what grows, and the figures."""

import pytest

from benchmarks.growth import SUITES, draw, measure, slope


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_slope_of_a_power_is_its_exponent(power):
    sizes = [2**number for number in range(7)]
    assert slope([(size, 3 * size**power) for size in sizes]) == pytest.approx(power)
    assert slope([(size, 1e-3 * size**power + (size < 8)) for size in sizes]) == pytest.approx(power), "small ones bend"


@pytest.mark.parametrize("name", SUITES)
def test_one_size_grows_at_a_time(name):
    suite = SUITES[name]
    assert set(suite.axes) <= set(suite.fixed)
    for axis, sizes in suite.axes.items():
        found = suite.points(axis)
        assert [each.pop(axis) for each in found] == sorted(sizes)
        assert all(each == {other: size for other, size in suite.fixed.items() if other != axis} for each in found)


@pytest.mark.parametrize("name", SUITES)
def test_a_figure_is_drawn_of_what_runs(tmp_path, name):
    pytest.importorskip("matplotlib")
    suite, axis = SUITES[name], "rows" if "rows" in SUITES[name].axes else "vocabulary"
    figures = {axis: measure(suite, axis, rounds=1, quick=True)}
    assert len(figures[axis]) > 1
    draw(suite, figures, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
