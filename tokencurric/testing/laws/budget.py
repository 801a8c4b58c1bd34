"""How many survive, and who may."""

from dataclasses import replace
from typing import Any

import torch

from tokencurric.compressors import Compressor
from tokencurric.testing.answers import question, same
from tokencurric.testing.cases import Case
from tokencurric.testing.check import Broken
from tokencurric.testing.laws.claims import compressor_law, knows_padding

# Values and layouts in which rows differ clearly, for laws that compare two answers.
CLEAR: dict[str, Any] = {"kinds": ("normal",), "dtypes": False, "least": 2, "partial": True}


@compressor_law("The answer is a boolean mask [batch visual] where the tokens are, for every view.")
def answers_with_a_mask(subject: Compressor, case: Case) -> None:
    """Shape, dtype and device of the answer."""
    asked = question(subject, case)
    mask = asked.mask(subject)
    if mask.dtype != torch.bool or mask.device != asked.packed.view.tokens.device:
        raise Broken(f"The answer has dtype {mask.dtype} on {mask.device}; it must be torch.bool, with the tokens.")


@compressor_law(
    "Each row keeps exactly min(keep, its number of tokens).", applies=lambda subject: subject.tags.exact, dtypes=False
)
def keeps_the_budget(subject: Compressor, case: Case) -> None:
    """Exact budget, for all kinds of values: ties, NaN and infinities too."""
    for row, kept in enumerate(question(subject, case).survivors(subject)):
        if len(kept) != case.kept(row):
            raise Broken(f"Row {row} must keep {case.kept(row)} of its {case.rows[row].count} tokens; it keeps {kept}.")


@compressor_law("Only tokens survive, never padding.", applies=knows_padding, dtypes=False)
def keeps_tokens_only(subject: Compressor, case: Case) -> None:
    """No True outside `valid`."""
    asked = question(subject, case)
    wrong = asked.mask(subject).bool() & ~asked.packed.view.mask
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise Broken(f"Row {row} keeps entry {column}, which is padding: valid is False there.")


@compressor_law("A budget at or above a row's number of tokens keeps them all.", dtypes=False)
def keeps_all_when_allowed(subject: Compressor, case: Case) -> None:
    """Identity at n, at n + 1, and far above."""
    most = max(row.count for row in case.rows)
    for keep in (most, most + 1, most + 100):
        for row, kept in enumerate(question(subject, replace(case, keep=keep)).survivors(subject)):
            if len(kept) != case.rows[row].count:
                raise Broken(f"With keep={keep}, row {row} of {case.rows[row].count} tokens keeps only {kept}.")


@compressor_law(
    "One count a row means for each row what that count alone means.", applies=knows_padding, neighbours=1, **CLEAR
)
def takes_a_budget_a_row(subject: Compressor, case: Case) -> None:
    """A tensor of counts against single counts."""
    keeps = case.keep if isinstance(case.keep, tuple) else tuple((case.keep + row) for row in range(len(case.rows)))
    each = question(subject, replace(case, keep=keeps)).survivors(subject)
    for row, keep in enumerate(keeps):
        single = question(subject, replace(case, keep=keep)).survivors(subject)
        same(
            subject,
            replace(case, keep=keeps),
            each[row],
            single[row],
            told=f"keep={list(keeps)} keeps {each[row]} in row {row}; keep={keep} keeps {single[row]} there.",
        )


@compressor_law(
    "One count a row means the same in every dtype of whole numbers.",
    applies=knows_padding,
    counted=("int32", "int16", "int8", "uint8"),
    kinds=("normal",),
    dtypes=False,
)
def takes_counts_of_every_dtype(subject: Compressor, case: Case) -> None:
    """A tensor of counts against the same counts as int64; none, all and more than all among them."""
    other, usual = (question(subject, one).survivors(subject) for one in (case, replace(case, counted="int64")))
    if other != usual:
        raise Broken(f"With the counts as {case.counted} it keeps {other}; the same counts as int64 keep {usual}.")


@compressor_law(
    "Under one seed, the survivors of a smaller budget are among those of a larger one.",
    applies=lambda subject: subject.tags.nested,
    dtypes=False,
    kinds=("normal", "duplicates", "ties", "zeros", "nan"),
)
def nests(subject: Compressor, case: Case) -> None:
    """The teacher sees all that the student sees."""
    most = max(row.count for row in case.rows)
    step = max(1, most // 16)  # every budget of a short row, some of a long one
    before: list[list[int]] = [[] for _ in case.rows]
    for keep in range(0, most + 1, step):
        now = question(subject, replace(case, keep=keep)).survivors(subject)
        for row, (small, large) in enumerate(zip(before, now, strict=True)):
            if not set(small) <= set(large):
                raise Broken(f"In row {row}, keep={keep - step} keeps {small}, but keep={keep} keeps {large}.")
        before = now
