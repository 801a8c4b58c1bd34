"""Looking something up by name in other people's code, so that it is either found or missed aloud."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokencurric.errors import StateError


@dataclass(frozen=True)
class Argument:
    """An argument of functions that are not ours, which may have another name in another release.

    Args:
        names: every name that it has had, the newest first.

    Example:
        >>> cache = Argument("cache", "past_key_values")
        >>> cache.read({"past_key_values": 7}), cache.write({"past_key_values": 7}, 8)
        (7, {'past_key_values': 8})
    """

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)

    def read(self, arguments: Mapping[str, Any]) -> Any:
        """The value that a call brings, whichever name it came by; None if it brings none.

        Args:
            arguments: keyword arguments of the call.

        Raises:
            StateError: two names bring two values.
        """
        found = None
        for name in self.names:
            value = arguments.get(name)
            if value is None or value is found:
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
