"""Looking something up by name in other people's code, so that it is either found or missed aloud.

A name that a model lacks can mean two things: the model has no such thing, or the release calls it otherwise now. To
tell one from the other each look-up names examples that have it. While an example still has the name, its absence
elsewhere is an answer; once it is gone from an example, the answer is not to be trusted.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from tokencurric.errors import MissingDependencyError, StateError

F = TypeVar("F", bound=Callable[..., Any])


@runtime_checkable
class Lookup(Protocol):
    """Something that is looked up by name.

    Args:
        names: every name that it has had, the newest first.
        on: dotted paths of examples in other packages that have it under one of them.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that it has had, the newest first."""
        ...

    @property
    def on(self) -> tuple[str, ...]:
        """Dotted paths of examples that have it under one of its names."""
        ...

    def gone(self) -> Iterator[str]:
        """A line for each example of the installed releases that has none of the names any more."""
        ...


@dataclass(frozen=True)
class Argument:
    """An argument of functions that are not ours, which may have another name in another release.

    Args:
        names: every name that it has had, the newest first.
        on: dotted paths of functions that take it.

    Example:
        >>> cache = Argument("cache", "past_key_values")
        >>> cache.read({"past_key_values": 7}), cache.write({"past_key_values": 7}, 8)
        (7, {'past_key_values': 8})
    """

    names: tuple[str, ...]
    on: tuple[str, ...]

    def __init__(self, *names: str, on: tuple[str, ...] = ()) -> None:
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "on", on)

    def read(self, arguments: Mapping[str, Any]) -> Any:
        """The value that a call brings, whichever name it came by; None if it brings none.

        Args:
            arguments: keyword arguments of the call, or an output by name.

        Raises:
            StateError: two names bring two values.
        """
        found = None
        # Outputs of transformers answer to their fields' old names, too, but do not list them.
        for name, value in arguments.items():
            if name not in self.names or value is None or value is found:
                continue
            if found is not None:
                raise StateError(f"A call needs one of {', '.join(self.names)}; got two that differ.\nHint: Pass one.")
            found = value
        return found

    def write(self, arguments: Mapping[str, Any], value: Any) -> dict[str, Any]:
        """The arguments with another value, under the name that came; as they are where none came.

        Args:
            arguments: keyword arguments of the call.
            value: replaces the one that is there.
        """
        return {name: value if name in self.names else each for name, each in arguments.items()}

    def name_in(self, function: Callable[..., Any]) -> str | None:
        """The name that `function` gives this argument; None if its signature has none that is known.

        Args:
            function: any callable; what `functools.wraps` wrapped has the signature of what is inside.

        Example:
            >>> Argument("cache", "past_key_values").name_in(lambda hidden, past_key_values=None: hidden)
            'past_key_values'
        """
        takes = inspect.signature(function).parameters
        return next((name for name in self.names if name in takes), None)

    def gone(self) -> Iterator[str]:
        """A line for each function in `on` that takes it by none of its names any more."""
        for path in self.on:
            function = resolve(path)
            if function is MISSING or (function is not None and self.name_in(function) is None):
                yield f"{path} takes no argument {' or '.join(self.names)}"


@dataclass(frozen=True)
class Attribute:
    """An attribute of classes that are not ours: of a config, a module, an output, a cache.

    Args:
        name: of the attribute.
        on: dotted paths of classes (or modules) that have it, also if each instance is given it.

    Example:
        >>> list(Attribute("weight", on=("torch.nn.Linear",)).gone())
        []
        >>> list(Attribute("wait", on=("torch.nn.Linear",)).gone())
        ['torch.nn.Linear has no attribute wait']
    """

    name: str
    on: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The name."""
        return (self.name,)

    def gone(self) -> Iterator[str]:
        """A line for each class in `on` that does not have it any more."""
        for path in self.on:
            owner = resolve(path)
            if owner is MISSING or (owner is not None and not _has(owner, self.name)):
                yield f"{path} has no attribute {self.name}"


@dataclass(frozen=True)
class Override:
    """A method of another's class that a class of ours replaces: if nobody calls it any more, ours never runs.

    Args:
        name: of the method.
        on: dotted path of the class.

    Example:
        >>> Override("forward", on=("torch.nn.Linear",)).overridden_by(lambda self, input: input)
        Traceback (most recent call last):
        ...
        tokencurric.errors.StateError: Override of forward needs a method of that name; got <lambda>.
    """

    name: str
    on: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The name."""
        return (self.name,)

    def overridden_by(self, method: F) -> F:
        """Decorate the method of ours.

        Args:
            method: takes what the other one takes.

        Raises:
            StateError: it has another name.
            MissingDependencyError: the installed release has no such method, or calls it with other arguments.
        """
        if method.__name__ != self.name:
            raise StateError(f"Override of {self.name} needs a method of that name; got {method.__name__}.")
        for line in chain(self.gone(), self._unlike(method)):
            raise MissingDependencyError(
                f"tokencurric needs a release that it was tried with; {line}.\n"
                "Hint: Install the range of versions that tokencurric[hf] names, or a newer tokencurric."
            )
        return method

    def gone(self) -> Iterator[str]:
        """A line if the class has no such method any more, or nothing in its module calls it."""
        for path in self.on:
            owner = resolve(path)
            if owner is None:
                continue
            if owner is MISSING or not callable(getattr(owner, self.name, None)):
                yield f"{path} has no method {self.name}"
            elif not re.search(rf"\bself\.{self.name}\b", _source(owner)):
                yield f"{path} does not call its method {self.name}"

    def _unlike(self, method: Callable[..., Any]) -> Iterator[str]:
        for path in self.on:
            owner = resolve(path)
            if owner is None or owner is MISSING:
                continue
            ours, theirs = (inspect.signature(each).parameters for each in (method, getattr(owner, self.name)))
            more = [name for name in theirs if name not in ours]
            if more and not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in ours.values()):
                yield f"{path}.{self.name} takes {', '.join(more)} besides"


class _Missing:
    """What a dotted path leads to where its package is installed and has no such thing."""


MISSING = _Missing()


def resolve(path: str) -> Any:
    """What a dotted path names; None if its package is not installed, MISSING if it is and has no such thing.

    Example:
        >>> resolve("torch.nn.Linear").__name__, resolve("no_such_package.Thing"), resolve("torch.nn.Lenear") is MISSING
        ('Linear', None, True)
    """
    names = path.split(".")
    if find_spec(names[0]) is None:
        return None
    found: Any = import_module(names[0])
    for number, name in enumerate(names[1:], start=2):
        if not hasattr(found, name):
            try:
                import_module(".".join(names[:number]))
            except ImportError:
                return MISSING
        if not hasattr(found, name):
            return MISSING
        found = getattr(found, name)
    return found


def _has(owner: Any, name: str) -> bool:
    if hasattr(owner, name):
        return True
    if not isinstance(owner, type):
        return False
    # DeepSpeed gives its attributes to weights, which its classes call `param`.
    given = re.compile(rf"\b(?:self|param)\.{name}\s*(:[^=\n]+)?=[^=]")
    for each in owner.__mro__[:-1]:
        if name in vars(each).get("__annotations__", {}) or given.search(_source(each)):
            return True
    return False


def _source(owner: type) -> str:
    """The module that a class is made in: to cut the class out of it would take long."""
    try:
        return _text(inspect.getsourcefile(owner))
    except TypeError:  # built in
        return ""


@cache
def _text(path: str | None) -> str:
    return "" if path is None else Path(path).read_text(encoding="utf-8")
