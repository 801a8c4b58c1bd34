"""What is declared in `needs`, and what is read."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from tokencurric.compressors import Compressor
from tokencurric.errors import MissingSignalError
from tokencurric.testing.answers import Question, question
from tokencurric.testing.cases import Case
from tokencurric.testing.check import Broken
from tokencurric.testing.laws.claims import compressor_law, knows_padding
from tokencurric.testing.packing import SIGNALS

_LOOKED_AT = frozenset({"shape", "ndim", "dtype", "device", "size", "dim", "is_floating_point", "__get__", "__len__"})


class Undeclared(Tensor):
    """A signal that nobody may compute with: one may see that it is there, and its shape."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Raise, unless only the shape or the like is asked for."""
        if getattr(func, "__name__", "") in _LOOKED_AT:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise Broken("It reads a signal that it does not declare in `needs`.")


@compressor_law(
    "What `needs` declares is all that is read: no other signal is touched, or changes the answer.",
    applies=knows_padding,
    kinds=("normal",),
    dtypes=False,
)
def reads_what_it_declares(subject: Compressor, case: Case) -> None:
    """A view that has every signal, the undeclared ones raising when they are computed with."""
    declared = question(subject, case).survivors(subject)
    for name in sorted(set(SIGNALS) - subject.needs):
        packed = case.pack({*subject.needs, name})
        signal: Tensor = getattr(packed.view, name)
        view = replace(packed.view, **{name: signal.as_subclass(Undeclared)})
        try:
            more = Question(replace(packed, view=view), case.budget(), case.seed).survivors(subject)
        except Broken:
            raise Broken(f"It reads {name!r}, but declares needs={sorted(subject.needs)}.") from None
        if more != declared:
            raise Broken(f"It keeps {declared}, but {more} if the view has {name!r}, which `needs` does not declare.")


@compressor_law(
    "Without a signal that it declares, it refuses with MissingSignalError and names the signal.",
    applies=lambda subject: bool(subject.needs),
    examples=10,
    kinds=("normal",),
    least=1,
)
def refuses_without_a_signal(subject: Compressor, case: Case) -> None:
    """Each declared signal is left out in turn."""
    for name in sorted(subject.needs):
        try:
            question(subject, case, signals=subject.needs - {name}).mask(subject)
        except MissingSignalError as error:
            if name not in str(error):
                raise Broken(f"Without {name!r} the error does not name it: {error}") from None
        else:
            raise Broken(
                f"It declares {name!r}, but answers without it. Read it by view.signal(...), or do not declare it."
            )
