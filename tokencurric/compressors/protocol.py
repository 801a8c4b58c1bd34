"""The contract of a compressor."""

import inspect
import re
from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from jaxtyping import Bool
from torch import Tensor

from tokencurric.budget import Budget
from tokencurric.errors import NotACompressorError
from tokencurric.view import Signal, VisualView

_LONGEST = 32  # characters of a value's `repr` that an error shows
_WRITE_ONE = "write a class with needs, tags and __call__(view, keep, *, seed=0), see docs/write_a_compressor.md."


@dataclass(frozen=True, kw_only=True)
class Tags:
    """Which laws a compressor claims. The test kit holds it to them.

    Args:
        exact: each row keeps min(keep, its number of tokens).
        nested: under one seed the survivors of a smaller budget are among those of a larger one.
        deterministic: the seed does not change the answer.
        uses_position: the order of the tokens matters, so permuting them need not permute the answer.
        stage: where it stands: inside the language model, or before it.

    Example:
        >>> Tags(deterministic=False).nested
        True
    """

    exact: bool = True
    nested: bool = True
    deterministic: bool = True
    uses_position: bool = False
    stage: Literal["in_llm", "pre_llm"] = "in_llm"


@runtime_checkable
class Compressor(Protocol):
    """Decides which visual tokens survive. It sees tensors, never models.

    Laws, for every view, budget and seed:

    - budget: a row keeps exactly min(keep, its tokens), and only tokens, never padding;
    - identity: `keep` at or above a row's number of tokens keeps them all;
    - independence: a row alone, or beside others, or with other padding, gets the same answer;
    - purity: inputs, the process' random state and the compressor are left as they were; same seed, same answer;
    - nested (if tagged): survivors of a smaller budget are among those of a larger one;
    - equivariance (unless tagged `uses_position`): permuting the tokens permutes the answer.

    Scores are compared in float32, ties go to the lower position and NaN ranks last (`tokencurric.ranking`).
    """

    @property
    def needs(self) -> frozenset[Signal]:
        """The signals of `VisualView` that are read."""
        ...

    @property
    def tags(self) -> Tags:
        """The laws that are claimed."""
        ...

    def __call__(self, view: VisualView, keep: Budget, *, seed: int = 0) -> Bool[Tensor, "batch visual"]:
        """The mask of survivors."""
        ...


def require_compressor(value: Any, *, who: str, name: str = "compressor") -> Compressor:
    """Return `value` if it is a compressor. Every function that takes one calls this before it does anything else.

    Args:
        value: what the caller passed.
        who: the caller's function or class, as the error names it.
        name: the caller's argument, as the error names it.

    Returns:
        `value` itself.

    Raises:
        NotACompressorError: `value` is a string, a class, a plain function, or it lacks `needs`, `tags` or the
            arguments of a call.

    Example:
        >>> from tokencurric import FastV
        >>> require_compressor(FastV(), who="compress")
        FastV()
    """
    problem = _problem(value)
    if problem is None:
        kept: Compressor = value
        return kept
    got, hint = problem
    raise NotACompressorError(f"{who} needs a compressor; got {name}={got}.\nHint: {hint}")


def _problem(value: Any) -> tuple[str, str] | None:
    """What `value` is, and what to pass instead; None if it is a compressor."""
    if isinstance(value, str):
        return f"{_short(value)}, a string", "pass an instance, such as tokencurric.FastV(); names are not looked up."
    if isinstance(value, type):
        return f"{value.__name__}, a class", f"pass an instance: {value.__name__}(), not {value.__name__}."
    absent = [each for each in ("needs", "tags") if not hasattr(value, each)]
    if absent and inspect.isroutine(value):
        return f"{value.__name__}, a plain function", _WRITE_ONE
    if not callable(value):
        return f"{_short(value)}, which cannot be called", "pass an instance, such as tokencurric.FastV()."
    if absent:
        given = {"needs": "needs = frozenset()", "tags": "tags = Tags()"}
        lines = " and ".join(given[each] for each in absent)
        return f"{_short(value)} without {' and '.join(absent)}", f"add {lines} to its class."
    return _unlike_a_compressor(value)


def _unlike_a_compressor(value: Any) -> tuple[str, str] | None:
    """The same for an object that has all the attributes: what is wrong with their values."""
    signals, needs, who = get_args(Signal), value.needs, _short(value)
    if isinstance(needs, str) or not isinstance(needs, Set):
        return f"{who} with needs={_short(needs)}", 'make needs a set of signals, such as frozenset({"attention"}).'
    unknown = sorted(map(str, needs - set(signals)))
    if unknown:
        return f"{who} with the unknown signal {_short(unknown[0])}", f"the signals are {', '.join(signals)}."
    if not isinstance(value.tags, Tags):
        return f"{who} with tags={_short(value.tags)}", "make tags an instance of tokencurric.compressors.Tags."
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # some callables made in C have none
        return None
    try:
        signature.bind(None, 1, seed=0)
    except TypeError:
        return f"{who} with the call {_cut(str(signature))}", "give it the call (view, keep, *, seed=0)."
    return None


def _short(value: Any) -> str:
    """A `repr` of one line, without addresses."""
    return _cut(" ".join(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)).split()))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
