"""What seeds and row keys must mean: real ones are large, and every bit of theirs counts."""

from collections.abc import Sequence
from dataclasses import replace

from tokencurric.compressors import Compressor
from tokencurric.curriculum import tcd
from tokencurric.draws import hash_ints
from tokencurric.testing.answers import question, with_rows
from tokencurric.testing.cases import Case
from tokencurric.testing.check import Broken
from tokencurric.testing.laws.claims import compressor_law, knows_padding

# What a training passes is a hash of its seed and the step: any number of 64 bits, without a sign.
REAL_SEEDS = (
    *(2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1),
    *(tcd().at(step, 5000, seed=42, layers=32).seed for step in range(6)),
)

_BITS = 16  # numbers of samples and seeds that people write are below 2**16
_PAIRS = 16  # of numbers that differ in one bit
_DRAWS = 64  # with small numbers, and with hashes


@compressor_law(
    "Every seed is taken from 0 to 2**64 - 1, as a training passes them.",
    applies=knows_padding,
    examples=50,
    kinds=("normal",),
    dtypes=False,
    keyed=True,
    seeds=REAL_SEEDS,
)
def takes_every_seed(subject: Compressor, case: Case) -> None:
    """It answers, keeps as many tokens as under seed 0, and the same ones when it is asked again."""
    asked = question(subject, case)
    kept = asked.survivors(subject)
    small = question(subject, replace(case, seed=0)).survivors(subject)
    if subject.tags.exact and [len(each) for each in kept] != [len(each) for each in small]:
        raise Broken(f"With seed={case.seed} it keeps {kept}, with seed=0 other numbers of tokens: {small}.")
    if asked.survivors(subject) != kept:
        raise Broken(f"With seed={case.seed} it keeps {kept} once and other tokens the next time.")


@compressor_law(
    "Seeds that differ in one bit are other draws, and so are keys of samples.",
    applies=lambda subject: not subject.tags.deterministic,
    examples=1,
    kinds=("normal",),
    least=8,
    batch=1,
    dtypes=False,
    keyed=True,
)
def heeds_every_bit(subject: Compressor, case: Case) -> None:
    """Of 16 pairs that differ in one of the lower 16 bits some get different draws; so do hashes of 64 bits."""
    half = replace(case.alone(0), keep=case.rows[0].count // 2)
    for what in ("row_key", "seed"):
        for bit in range(_BITS):
            numbers = [hash_ints(i) % 2**_BITS for i in range(_PAIRS)]
            if what == "row_key":
                here, there = (_draw(subject, half, what, each) for each in (numbers, [n ^ 1 << bit for n in numbers]))
                differ = here != there
            else:
                differ = any(_differ(subject, half, n, n ^ 1 << bit) for n in numbers)
            if not differ:
                raise Broken(f"Of {_PAIRS} pairs of a {what} that differ in bit {bit} alone, all get the same draw.")
        small = len(set(_draw(subject, half, what, range(_DRAWS))))
        large = len(set(_draw(subject, half, what, [_hash(i, what) for i in range(_DRAWS)])))
        if 2 * large < small:
            raise Broken(
                f"Of {_DRAWS} draws {small} differ with {what} = 0 to {_DRAWS - 1}, but only {large} with numbers of "
                "64 bits, as a training passes them."
            )


def _hash(number: int, what: str) -> int:
    return hash_ints(number) if what == "seed" else hash_ints(number) - 2**63  # keys are int64


def _differ(subject: Compressor, case: Case, seed: int, other: int) -> bool:
    here, there = _draw(subject, case, "seed", (seed, other))
    return here != there


def _draw(subject: Compressor, case: Case, what: str, numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """The survivors for each of `numbers`: keys of the rows of one batch, or seeds of one row."""
    if what == "seed":
        return [tuple(question(subject, replace(case, seed=seed)).survivors(subject)[0]) for seed in numbers]
    row = case.rows[0].content(subject.needs)
    return [
        tuple(kept) for kept in with_rows(subject, case, [replace(row, key=key) for key in numbers]).survivors(subject)
    ]
