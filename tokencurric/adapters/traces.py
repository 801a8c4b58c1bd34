"""Hooks and attributes on a model's modules, all in one place: taken off at the end, and left out of copies."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

_COPY = "__reduce_ex__"  # what copy.deepcopy, pickle and torch.save call
_ABSENT = object()


@dataclass(eq=False)
class _Put:
    """An attribute of a module's own dictionary, and what stood there before."""

    value: Any
    before: Any


@dataclass(eq=False)
class Traces:
    """What one user of hooks has put on modules.

    While something is there, `copy.deepcopy`, `pickle` and `torch.save` of such a module see it without: a copy is a
    plain model. After `remove` the modules are as they were, also if two users leave in another order than they came.

    Example:
        >>> layer, traces = nn.Linear(2, 2), Traces()
        >>> traces.before(layer, lambda module, args: print("called"))
        >>> traces.put(layer, "note", 1)
        >>> twin = __import__("copy").deepcopy(layer)
        >>> "note" in vars(layer), "note" in vars(twin), len(twin._forward_pre_hooks)
        (True, False, 0)
        >>> traces.remove()
        >>> "note" in vars(layer), len(layer._forward_pre_hooks)
        (False, 0)
    """

    _handles: dict[nn.Module, list[RemovableHandle]] = field(default_factory=dict)
    _attributes: dict[nn.Module, dict[str, _Put]] = field(default_factory=dict)

    def before(self, module: nn.Module, hook: Callable[..., Any], **how: Any) -> None:
        """Register a hook that runs before `module`.

        Args:
            module: module to hook.
            hook: called as by `nn.Module.register_forward_pre_hook`.
            how: keyword arguments of that method.
        """
        self._copies_of(module)
        self._handles.setdefault(module, []).append(module.register_forward_pre_hook(hook, **how))

    def after(self, module: nn.Module, hook: Callable[..., Any], **how: Any) -> None:
        """Register a hook that runs after `module`.

        Args:
            module: module to hook.
            hook: called as by `nn.Module.register_forward_hook`.
            how: keyword arguments of that method.
        """
        self._copies_of(module)
        self._handles.setdefault(module, []).append(module.register_forward_hook(hook, **how))

    def put(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of the instance, whatever the class has under that name.

        Args:
            module: module that gets the attribute.
            name: name of the attribute; each name once per module.
            value: its value.
        """
        self._copies_of(module)
        self._attributes.setdefault(module, {})[name] = _Put(value, vars(module).get(name, _ABSENT))
        object.__setattr__(module, name, value)

    def remove(self) -> None:
        """Take everything off; it may be called again."""
        for module, handles in self._handles.items():
            for handle in handles:
                handle.remove()
            self._forget(module)
        for module, attributes in self._attributes.items():
            for name, put in attributes.items():
                self._take_back(module, name, put)
            self._forget(module)
        self._handles.clear()
        self._attributes.clear()

    def without(self, module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
        """The instance dictionary of `module` without what is here.

        Args:
            module: module that is copied.
            state: its dictionary, or that without the traces of others.
        """
        numbers = {handle.id for handle in self._handles.get(module, ())}
        kept = {name: _without(numbers, value) if "_hooks" in name else value for name, value in state.items()}
        for name, put in self._attributes.get(module, {}).items():
            if kept.get(name, _ABSENT) is put.value:
                _restore(kept, name, put.before)
        return kept

    def _take_back(self, module: nn.Module, name: str, put: _Put) -> None:
        for other in _copier(module).users if _COPY in vars(module) else ():
            over = other._attributes.get(module, {}).get(name)
            if over is not None and over is not put and over.before is put.value:
                over.before = put.before  # somebody came later, and will leave later
                return
        if vars(module).get(name, _ABSENT) is not put.value:
            return  # somebody else has replaced it since
        if put.before is _ABSENT:
            object.__delattr__(module, name)
        else:
            object.__setattr__(module, name, put.before)

    def _copies_of(self, module: nn.Module) -> None:
        if not isinstance(vars(module).get(_COPY), _Copier):
            object.__setattr__(module, _COPY, _Copier(module, vars(module).get(_COPY)))
        users = _copier(module).users
        if self not in users:
            users.append(self)

    def _forget(self, module: nn.Module) -> None:
        if not isinstance(vars(module).get(_COPY), _Copier):
            return
        copier = _copier(module)
        if self in copier.users:
            copier.users.remove(self)
        if not copier.users:
            object.__delattr__(module, _COPY)
            if copier.before is not None:
                object.__setattr__(module, _COPY, copier.before)


class _Copier:
    """`__reduce_ex__` of one module while there are traces on it."""

    def __init__(self, module: nn.Module, before: Any) -> None:
        self.module, self.before = module, before
        self.users: list[Traces] = []  # in the order of their coming

    def __call__(self, protocol: Any) -> Any:
        reduce = type(self.module).__reduce_ex__.__get__(self.module) if self.before is None else self.before
        reduced = reduce(protocol)
        if not isinstance(reduced, tuple) or len(reduced) < 3 or not isinstance(reduced[2], dict):
            raise TypeError(
                f"cannot copy a {type(self.module).__name__} while compression is at work on it: it copies itself its "
                "own way. Hint: copy it outside of the context."
            )
        state: dict[str, Any] = {name: value for name, value in reduced[2].items() if name != _COPY}
        if self.before is not None:
            state[_COPY] = self.before
        for user in reversed(self.users):
            state = user.without(self.module, state)
        return *reduced[:2], state, *reduced[3:]


def _copier(module: nn.Module) -> _Copier:
    copier: _Copier = vars(module)[_COPY]
    return copier


def _without(numbers: set[int], hooks: Any) -> Any:
    if not isinstance(hooks, dict):
        return hooks
    return type(hooks)((number, hook) for number, hook in hooks.items() if number not in numbers)


def _restore(state: dict[str, Any], name: str, before: Any) -> None:
    if before is _ABSENT:
        del state[name]
    else:
        state[name] = before
