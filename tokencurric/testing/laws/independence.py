"""What an answer must not depend on: neighbours, padding, the order of the tokens."""

from dataclasses import replace

import torch
from hypothesis import assume
from torch import Tensor

from tokencurric.compressors import Compressor
from tokencurric.testing.answers import question, same, with_rows
from tokencurric.testing.cases import KINDS, Case
from tokencurric.testing.check import Broken
from tokencurric.testing.laws.budget import CLEAR
from tokencurric.testing.laws.claims import compressor_law, knows_padding
from tokencurric.testing.packing import VISUAL, Row
from tokencurric.testing.ties import tied


@compressor_law(
    "A row alone gets the answer it gets beside others.",
    first=("normal",),
    kinds=KINDS,
    dtypes=False,
    keyed=True,
    least=2,
    neighbours=1,
    partial=True,
)
def answers_each_row_alone(subject: Compressor, case: Case) -> None:
    """The first row has clear values; its neighbours hold anything, and stand after or before it."""
    keep = case.keep[::-1] if isinstance(case.keep, tuple) else case.keep
    turned = replace(case, rows=case.rows[::-1], keep=keep)
    others = len(case.rows) - 1
    alone = question(subject, case.alone(0)).survivors(subject)[0]
    for batch, row, where in ((case, 0, "before"), (turned, others, "after")):
        together = question(subject, batch).survivors(subject)[row]
        told = f"The first row keeps {alone} alone, and {together} {where} {others} others."
        same(subject, case.alone(0), together, alone, told=told)


@compressor_law(
    "Padding changes nothing, wherever it stands and whatever it holds.", applies=knows_padding, keyed=True, **CLEAR
)
def ignores_padding(subject: Compressor, case: Case) -> None:
    """The packing that was drawn against no more padding than ragged rows need, at the right."""
    bare = replace(case, packing=replace(case.packing, place="right", extra=0, text_extra=0, fill="zeros"))
    padded, plain = (question(subject, one).survivors(subject) for one in (case, bare))
    same(
        subject,
        bare,
        padded,
        plain,
        told=f"With this padding the rows keep {padded}; with zeros at the right, {plain}.",
    )


@compressor_law(
    "Permuting the tokens of a row permutes the answer.",
    applies=lambda subject: not subject.tags.uses_position,
    least=2,
    partial=True,
    kinds=("normal", "close"),
    dtypes=False,
)
def follows_a_permutation(subject: Compressor, case: Case) -> None:
    """The tokens of every row in reverse, and in another order; positions stay with the places.

    Tokens that tie may change places, since of them the earlier ones survive.
    """
    before = question(subject, case).survivors(subject)
    for shift in (0, 1):
        orders = [_order(row.count, shift) for row in case.rows]
        rows = [_moved(row.content(subject.needs), order) for row, order in zip(case.rows, orders, strict=True)]
        moved = with_rows(subject, case, rows).survivors(subject)
        back = [sorted(int(order[i]) for i in kept) for order, kept in zip(orders, moved, strict=True)]
        assume(
            not any(_tie(subject, case, row, old, new) for row, (old, new) in enumerate(zip(before, back, strict=True)))
        )
        same(
            subject,
            case,
            back,
            before,
            told=f"In order the rows keep {before}; with their tokens in the order {[o.tolist() for o in orders]} "
            f"they keep {back} (numbers of the tokens before they were moved).",
        )


def _tie(subject: Compressor, case: Case, row: int, old: list[int], new: list[int]) -> bool:
    """Whether what went and what came in its place tie."""
    gone, come = sorted(set(old) - set(new)), sorted(set(new) - set(old))
    pairs = {(gone[at], come[at]) for at in (0, -1)} if gone and len(gone) == len(come) else set()
    return bool(pairs) and all(tied(subject, case, row, one, other) for one, other in pairs)


def _order(count: int, shift: int) -> Tensor:
    return torch.arange(count).flip(0) if shift == 0 else torch.arange(count).roll(shift)


def _moved(row: Row, order: Tensor) -> Row:
    return row.changed(lambda x: x[order])


@compressor_law(
    "Of tokens that cannot be told apart, the earlier ones survive.",
    applies=lambda subject: not subject.tags.uses_position,
    kinds=("duplicates", "zeros"),
    dtypes=False,
    least=2,
    partial=True,
)
def breaks_ties_by_position(subject: Compressor, case: Case) -> None:
    """Twins are equal in all that is declared, and their numbers are such that sums and products are exact."""
    for number, kept in enumerate(question(subject, case).survivors(subject)):
        survives = torch.zeros(case.rows[number].count, dtype=torch.bool)
        survives[kept] = True
        wrong = _twins(case.rows[number].content(subject.needs)).triu(1) & ~survives[:, None] & survives
        if bool(wrong.any()):
            early, late = wrong.nonzero()[0].tolist()
            raise Broken(f"Row {number} keeps token {late} and drops token {early}, its twin before it.")


def _twins(row: Row) -> Tensor:
    """Which tokens are equal in everything that is said of them."""
    facts = [row.tokens, *(x for name, x in row.signals.items() if name in VISUAL)]
    said = torch.cat([x.reshape(len(x), -1) if len(x) else x.new_zeros(0, 1) for x in facts], dim=1)
    kinds: Tensor = said.unique(dim=0, return_inverse=True)[1]
    return kinds[:, None] == kinds
