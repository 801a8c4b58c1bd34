"""What a call must leave alone, and what its answer must not depend on besides its arguments."""

import copy
import pickle
import random
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tokencurric.compressors import Compressor
from tokencurric.testing.answers import Question, question, unchecked
from tokencurric.testing.cases import Case
from tokencurric.testing.check import Broken, fresh
from tokencurric.testing.laws.claims import compressor_law
from tokencurric.view import VisualView

# Enough tokens for two draws to differ almost surely.
MANY: dict[str, Any] = {"kinds": ("normal",), "least": 2, "partial": True, "dtypes": False, "keyed": True}

SEVERAL = 50  # examples, of laws that ask four questions or more in each, and break in nearly every one or in none

# All values, but a budget that is no edge case: that has checks of its own.
ANYTHING: dict[str, Any] = {"least": 2, "partial": True, "dtypes": False}


@compressor_law(
    "The same question gets the same answer, whatever the process has drawn meanwhile.", examples=SEVERAL, **MANY
)
def repeats_itself(subject: Compressor, case: Case) -> None:
    """Two calls with the generators of the process in different states."""
    asked = question(subject, case)
    torch.manual_seed(1)
    first = asked.survivors(subject)
    for again in range(2, 6):
        torch.manual_seed(again)
        second = asked.survivors(subject)
        if first != second:
            raise Broken(f"It keeps {first} once and {second} the next time.")


@compressor_law(
    "The seed changes nothing.", applies=lambda subject: subject.tags.deterministic, examples=SEVERAL, **MANY
)
def ignores_the_seed(subject: Compressor, case: Case) -> None:
    """What the tag `deterministic` claims."""
    first = question(subject, case).survivors(subject)
    for seed in (case.seed + 1, case.seed + 2, 2**40):
        other = question(subject, replace(case, seed=seed)).survivors(subject)
        if other != first:
            raise Broken(f"It is tagged deterministic; seed={case.seed} keeps {first}, seed={seed} keeps {other}.")


@compressor_law(
    "Another seed, or another sample, is another draw.",
    applies=lambda subject: not subject.tags.deterministic,
    examples=5,
    kinds=("normal",),
    least=4,
    dtypes=False,
    keyed=True,
)
def draws_anew(subject: Compressor, case: Case) -> None:
    """What the tag `deterministic=False` is for: of 20 draws of half a row, some differ."""
    half = replace(case.alone(0), keep=case.rows[0].count // 2)
    row = half.rows[0]
    by_seed = [replace(half, seed=seed) for seed in range(20)]
    by_key = [replace(half, rows=(replace(row, key=key),)) for key in range(20)]
    for what, variants in (("seed", by_seed), ("row_key", by_key)):
        answers = [question(subject, one).survivors(subject) for one in variants]
        if all(answer == answers[0] for answer in answers):
            raise Broken(f"It is tagged deterministic=False; for {what} = 0 to 19 it keeps {answers[0]} every time.")


@compressor_law("A call leaves the process as it was: random state, grad mode, default dtype.", **ANYTHING)
def leaves_the_process_alone(subject: Compressor, case: Case) -> None:
    """Nothing global."""
    asked = question(subject, case)
    before = _process()
    with unchecked():  # checks of types by sampling draw from the process' generator
        asked.mask(subject)
    touched = [name for name, value in _process().items() if value != before[name]]
    if touched:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        raise Broken(f"The call changed: {', '.join(touched)}.")


def _process() -> dict[str, object]:
    state: dict[str, object] = {
        "the random state of torch": torch.get_rng_state().numpy().tobytes(),
        "the random state of Python": random.getstate(),
        "the grad mode": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
        "the use of deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }
    try:
        import numpy as np
    except ImportError:
        return state
    return state | {"the random state of NumPy": repr(np.random.get_state())}


@compressor_law("No answer depends on what was asked before.", examples=SEVERAL, **MANY)
def forgets(subject: Compressor, case: Case) -> None:
    """A subject that has answered other questions, of the same shape too, against one that has answered none."""
    asked = question(subject, case)
    others = [
        replace(case, rows=tuple(replace(row, seed=row.seed + 1, key=row.key + 1) for row in case.rows)),
        replace(case, keep=0),
        replace(case, keep=max(row.count for row in case.rows)),
        replace(case, seed=case.seed + 1),
    ]
    new = asked.survivors(fresh(subject))
    for other in others:
        used = fresh(subject)
        question(used, other).mask(used)
        again = asked.survivors(used)
        if new != again:
            raise Broken(f"At first it keeps {new}; after another call, the same question gets {again}.")


@compressor_law("What is passed in is not written to.", **ANYTHING)
def leaves_its_inputs_alone(subject: Compressor, case: Case) -> None:
    """Values, versions and flags of every tensor of the view, and of the budget."""
    asked = question(subject, case)
    given = _tensors(asked)
    before = {name: (x.detach().clone(), x._version, x.requires_grad) for name, x in given.items()}
    asked.mask(subject)
    for name, now in given.items():
        value, version, flag = before[name]
        if now._version != version or not _equal(now, value):
            raise Broken(f"The call wrote to {name}.")
        if now.requires_grad != flag or now.grad is not None:
            raise Broken(f"The call changed what autograd knows of {name}.")


def _tensors(asked: Question) -> dict[str, Tensor]:
    view = {item.name: getattr(asked.packed.view, item.name) for item in fields(VisualView)}
    return {name: x for name, x in (view | {"keep": asked.keep}).items() if isinstance(x, Tensor)}


def _equal(now: Tensor, before: Tensor) -> bool:
    """Equal bit by bit, where NaN equals itself."""
    return bool(((now == before) | (now.isnan() & before.isnan())).all())


@compressor_law(
    "A choice is no function to differentiate: nothing is saved for a backward pass.",
    kinds=("normal",),
    dtypes=False,
    least=2,
    partial=True,
)
def saves_nothing_for_backward(subject: Compressor, case: Case) -> None:
    """With inputs that require a gradient, as hidden states do in training."""
    live = replace(case, packing=replace(case.packing, requires_grad=True))
    asked = question(subject, live)
    saved: list[tuple[int, ...]] = []

    def note(x: Tensor) -> Tensor:
        saved.append(tuple(x.shape))
        return x

    with torch.enable_grad(), saved_tensors_hooks(note, lambda x: x):
        mask = asked.mask(subject)
    if saved or mask.requires_grad:
        raise Broken(
            f"Autograd kept tensors of shapes {saved[:4]} for a backward pass that never comes. "
            "Decorate __call__ with @torch.no_grad()."
        )


@compressor_law("A copy, and what comes back from pickling, answers alike.", examples=10, **MANY)
def survives_copy_and_pickle(subject: Compressor, case: Case) -> None:
    """As a checkpoint or a second process needs it."""
    asked = question(subject, case)
    answer = asked.survivors(subject)
    for how, other in (("deepcopy", copy.deepcopy(subject)), ("pickle", pickle.loads(pickle.dumps(subject)))):
        if asked.survivors(other) != answer:
            raise Broken(f"It keeps {answer}; after {how} it keeps {asked.survivors(other)}.")
