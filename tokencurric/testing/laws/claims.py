"""How a law of compressors becomes a check."""

from collections.abc import Callable
from typing import Any

from hypothesis.strategies import SearchStrategy

from tokencurric.compressors import Compressor
from tokencurric.testing.cases import Case
from tokencurric.testing.check import Check
from tokencurric.testing.plain import Plain, as_compressor
from tokencurric.testing.strategies.cases import cases

Body = Callable[[Compressor, Case], None]


def anyone(_: Compressor) -> bool:
    """Every compressor claims the law."""
    return True


def knows_padding(subject: Compressor) -> bool:
    """The subject takes views, so it can be asked about padding, signals, row keys and budgets a row."""
    return not isinstance(subject, Plain)


def compressor_law(
    law: str, *, applies: Callable[[Compressor], bool] = anyone, examples: int | None = None, **asked: Any
) -> Callable[[Body], Check]:
    """Make a check of a function (subject, case) that raises `Broken`; `asked` goes to `strategies.cases`."""

    def strategy(subject: Compressor) -> SearchStrategy[Case]:
        return cases(**asked) if knows_padding(subject) else cases(**(asked | {"dense": True}))

    def made(body: Body) -> Check:
        name: str = body.__name__
        return Check(
            name=name, law=law, cases=strategy, body=body, applies=applies, prepare=as_compressor, most=examples
        )

    return made
