"""Random: tokens in the order of a hash of (seed, sample, token)."""

from tests.reference.rows import best, budget_of


def splitmix(state: int) -> int:
    """One output of the splitmix64 generator."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def score(seed: int, sample: int, token: int) -> int:
    """The upper half of the hash, as a signed number of 32 bits."""
    upper = splitmix(splitmix(splitmix(seed % 2**64) ^ sample) ^ token) >> 32
    return upper - 2**32 if upper >= 2**31 else upper


def survivors(view, keep, *, seed=0) -> list[list[int]]:
    answer = []
    for row, count in enumerate(view.mask.sum(1)):
        sample = row if view.row_key is None else int(view.row_key[row])
        scores = [score(seed, sample, token) for token in range(int(count))]
        answer.append(sorted(best(scores)[: budget_of(keep, row)]))
    return answer
