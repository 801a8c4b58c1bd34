"""State of the forward passes under way: one per thread, so that threads do not see each other's."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from types import FrameType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import nn

from tokencurric.adapters.discovery import ModelParts
from tokencurric.errors import StateError

if TYPE_CHECKING:
    from tokencurric.adapters.decoding import CachePlan
    from tokencurric.adapters.record import Record, Request
    from tokencurric.adapters.seam import Call
    from tokencurric.adapters.tap import Tap

_CALL = nn.Module._call_impl.__code__


@dataclass(frozen=True, eq=False)
class Decoding:
    """A call that goes on after a compressed prompt.

    Args:
        plan: what the cache holds.
        call: the call.
    """

    plan: "CachePlan"
    call: "Call"


@dataclass(eq=False)
class Forward:
    """What hooks hold of the forward pass under way in one thread.

    Args:
        request: what this thread alone asked for; None takes what holds for all threads.
        record: of the latest prompt.
        decoding: of a call after a compressed prompt, where layers cannot carry it.
        call: call of the decoder under way, of models with an adapter.
        seen: what the roots were called with.
        features: what the model made of its images, and of its videos.
        tap: listens to a layer, and has not read yet.
        prompt: length of the prompt in tokens while `generate` runs; None outside of it.
    """

    request: "Request | None" = None
    record: "Record | None" = None
    decoding: Decoding | None = None
    call: "Call | None" = None
    seen: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    tap: "Tap | None" = None
    prompt: int | None = None


class Forwards:
    """The forward passes on one model.

    torch.compile cannot trace in which thread it runs, so compiled code shares one state, and a second thread that
    comes while the first is at work is refused.

    Args:
        parts: parts of the model.
        compiled: whether hooks may run in compiled code.
    """

    def __init__(self, parts: ModelParts, *, compiled: bool) -> None:
        self.compiled = compiled
        self._roots = frozenset(parts.roots)
        self._modules = self._roots | {parts.decoder}
        self._shared = Forward()
        self._own = threading.local()
        self._states = WeakSet([self._shared])  # those of threads that live
        self._turn = threading.Lock()  # held by the thread that the shared state belongs to
        self._generating: set[int] = set()  # threads that are in `generate`
        self._adding = threading.Lock()

    @property
    def now(self) -> Forward:
        """State of this thread."""
        if self.compiled or torch.compiler.is_compiling():
            return self._shared
        return self._mine()

    def _mine(self) -> Forward:
        found: Forward | None = getattr(self._own, "forward", None)
        if found is None:
            found = self._own.forward = Forward()
            with self._adding:
                self._states.add(found)
        return found

    def armed(self) -> "list[Tap]":
        """What listens to a layer now, in any thread."""
        with self._adding:
            return [state.tap for state in self._states if state.tap is not None]

    def refuse_company(self) -> None:
        """Raise if another thread is at work on the model, and the model is compiled.

        Raises:
            StateError: it is.
        """
        if self.compiled and self._others():
            raise StateError(
                "compress runs a compiled model from one thread at a time; another thread is at work on it.\n"
                "Hint: put a lock around the calls, or compress a model that is not compiled."
            )

    @contextmanager
    def generating(self, prompt: int | None) -> Iterator[None]:
        """Within, this thread runs one `generate`.

        Args:
            prompt: length of its prompt in tokens; None where that is unknown.
        """
        self.refuse_company()
        me, mine = get_ident(), self._shared if self.compiled else self._mine()
        before, mine.prompt = mine.prompt, prompt
        outermost = me not in self._generating
        self._generating.add(me)
        try:
            yield
        finally:
            mine.prompt = before
            if not self.compiled and self._mine() is not mine:
                self._own.forward, self._shared.prompt = mine, None
                self._turn.release()
            if outermost:
                self._generating.discard(me)

    def share(self) -> None:
        """From here to the end of its `generate` this thread runs compiled code; others wait until it is done."""
        if self.compiled or self._mine() is self._shared:
            return
        self._turn.acquire()
        self._shared.prompt = self._mine().prompt
        self._own.forward = self._shared

    def wait_for_others(self) -> None:
        """Wait until no other thread is in a call of the model or in its `generate`."""
        while self._others():
            time.sleep(0.01)

    def _others(self) -> bool:
        """Whether another thread is in a call of the model or in its `generate`.

        Where threads are is read off their stacks: a hook would not see a call that breaks off.
        """
        if threading.active_count() == 1:
            return False
        stacks = sys._current_frames()
        del stacks[get_ident()]
        return bool(self._generating & stacks.keys()) or any(_calls(frame, self._modules) for frame in stacks.values())

    def in_root(self) -> bool:
        """Whether this thread is in a call of a root. Taken for granted where code may be compiled: stacks differ."""
        if self.compiled or torch.compiler.is_compiling() or self._mine() is self._shared:
            return True
        return _calls(sys._getframe(), self._roots)


def _calls(frame: FrameType | None, modules: frozenset[nn.Module]) -> bool:
    """Whether one of `modules` is called in `frame` or around it."""
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals.get("self") in modules:
            return True
        frame = frame.f_back
    return False
