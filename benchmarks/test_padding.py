"""The benchmark of padding on few rows: what it prints must be in order."""

import pytest

from benchmarks.padding import measure


@pytest.mark.parametrize("batch", [2, 16])
def test_orders_are_between_the_least_and_the_bound(batch):
    (row,) = measure(6000, (batch,)).values()
    grouped = row["length+kind"]
    assert row["sorted"]["padding"] <= grouped["padding"] <= row["bound"]["padding"]
    assert grouped["padding"] < row["random"]["padding"] / 5
    assert grouped["kept_padding"] < row["length"]["kept_padding"] < row["random"]["kept_padding"]
    assert grouped["mixed"] <= batch / 6000 < row["length"]["mixed"] <= row["random"]["mixed"]
