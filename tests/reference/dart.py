"""DART: for each pivot in turn, the tokens that are least similar to it."""

import math

from tests.reference.rows import best, budget_of, tokens_of

VISUAL_PIVOTS = TEXT_PIVOTS = 4


def pivots(keys: list, number: int) -> list[int]:
    """The tokens of largest L1 key norm, the largest first."""
    return best([sum(abs(x) for head in token for x in head) for token in keys])[:number]


def cosine(a: list[float], b: list[float]) -> float:
    size = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot if size == 0 or math.isnan(size) else dot / size


def survivors(view, keep, *, seed=0) -> list[list[int]]:
    answer = []
    for row in range(view.tokens.shape[0]):
        keys = tokens_of(view.keys, view.valid, row)
        tokens = tokens_of(view.normed_tokens, view.valid, row)
        text = tokens_of(view.normed_text_tokens, view.text_valid, row)
        text_keys = tokens_of(view.text_keys, view.text_valid, row)

        budget = min(budget_of(keep, row), len(tokens))
        first = pivots(keys, VISUAL_PIVOTS)
        kept = first[:budget]
        turns = [tokens[i] for i in first] + [text[i] for i in pivots(text_keys, TEXT_PIVOTS)]
        rest = budget - len(kept)
        for turn, pivot in enumerate(turns):
            share = rest // len(turns) + (turn < rest % len(turns))
            left = [i for i in range(len(tokens)) if i not in kept]
            order = best([-cosine(tokens[i], pivot) for i in left])
            kept = kept + [left[i] for i in order[:share]]
        answer.append(sorted(kept))
    return answer
