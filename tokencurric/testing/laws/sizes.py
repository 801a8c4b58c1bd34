"""The sizes of real images: what holds for eight tokens need not hold for three thousand."""

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption

from tokencurric.compressors import Compressor
from tokencurric.testing.cases import Case, RowSpec
from tokencurric.testing.check import Broken, Check
from tokencurric.testing.laws import budget, independence, numerics
from tokencurric.testing.laws.claims import knows_padding
from tokencurric.testing.packing import Packing
from tokencurric.testing.plain import as_compressor

# 576 tokens are LLaVA-1.5's, 2880 LLaVA-NeXT's. Beyond 127 and 255 end numbers of 8 bits, beyond 256 and 2048 the whole
# numbers that bfloat16 and float16 can count.
_USUAL = RowSpec(576, text=40, kind="distinct", seed=1)
_LARGE = RowSpec(2880, text=300, kind="distinct", seed=2)
REAL = (
    Case(rows=(replace(_USUAL, count=160), RowSpec(8, kind="distinct")), keep=(140, 4), packing=Packing(place="left")),
    Case(rows=(_USUAL, replace(_USUAL, count=300, seed=3)), keep=192, seed=1),
    Case(rows=(_USUAL, replace(_USUAL, seed=4)), keep=(575, 257), packing=Packing(dtype="bfloat16", extra=1), seed=2),
    Case(rows=(_LARGE, _USUAL), keep=(2500, 129), packing=Packing(place="left", dtype="float16"), seed=3),
)

IN_EVERY_DTYPE: tuple[Check, ...] = (
    budget.keeps_the_budget,
    budget.keeps_tokens_only,
    budget.keeps_all_when_allowed,
    budget.takes_a_budget_a_row,
    budget.nests,
    independence.answers_each_row_alone,
    independence.ignores_padding,
)
IN_FULL_PRECISION: tuple[Check, ...] = (
    independence.follows_a_permutation,
    numerics.answers_alike_in_every_dtype,
    numerics.ranks_nan_last,
)


def _holds(subject: Compressor, case: Case) -> None:
    full = replace(case, packing=replace(case.packing, dtype="float32"))
    for law, one in [*((law, case) for law in IN_EVERY_DTYPE), *((law, full) for law in IN_FULL_PRECISION)]:
        if not law.applies(subject):
            continue
        try:
            law.body(subject, one)
        except UnsatisfiedAssumption:
            continue
        except Broken as broken:
            most = max(row.count for row in case.rows)
            raise Broken(f"With {most} tokens it breaks `{law.name}`: {law.law}\n{broken}") from None


def _cases(subject: Compressor) -> st.SearchStrategy[Case]:
    if knows_padding(subject):
        return st.sampled_from(REAL)
    return st.sampled_from([Case(rows=(row, row), keep=row.count // 2) for row in (_USUAL, _LARGE)])


holds_at_real_sizes = Check(
    name="holds_at_real_sizes",
    law="What holds for a few tokens holds for as many as real images have.",
    cases=_cases,
    body=_holds,
    applies=lambda _: True,
    prepare=as_compressor,
    most=len(REAL),
)
