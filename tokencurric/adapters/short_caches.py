"""Caches that outlive the context that shortened them: the plain model would take them for whole."""

import threading
from functools import partial
from typing import Any
from weakref import WeakSet

from tokencurric.adapters.decoding import plan_of
from tokencurric.errors import StateError


class ShortCaches:
    """The caches that one context shortened. Once it is closed they refuse to grow, until another context takes them.

    A plain model would count positions from what layer 0 holds, and make masks for it: an error in some cases, other
    logits in the rest.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._caches: WeakSet[Any] = WeakSet()

    def take(self, cache: Any) -> None:
        """A cache that a forward of this context goes on from, or leaves.

        Args:
            cache: cache of a transformers model.
        """
        vars(cache).pop("update", None)
        with self._lock:
            self._caches.add(cache)

    def close(self) -> None:
        """Have all of them refuse to grow."""
        with self._lock:
            for cache in self._caches:
                if plan_of(cache) is not None:
                    vars(cache)["update"] = partial(_refuse, cache)
            self._caches.clear()


def _refuse(cache: Any, *args: Any, **kwargs: Any) -> Any:
    if int(cache.get_seq_length()) == 0:  # it was reset, and belongs to no prompt
        del vars(cache)["update"], cache._tokencurric
        return cache.update(*args, **kwargs)
    raise StateError(
        "cache holds a compressed prompt, and the context that compressed it is closed.\n"
        "Hint: go on inside of a compress context, or call cache.reset() before the next prompt."
    )
