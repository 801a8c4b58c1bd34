"""Plans on caches of any kind: noted on the object, or on the keys and values in a list, tuple or dict.

An object that takes attributes carries the plan itself. A bare container does not, and models make new ones in each
step, so there the plan is noted on the tensors inside. It stays with them for as long as they live, also in a copy.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from tokencurric.adapters.decoding import CachePlan

_NAME = "_tokencurric"
_PLAIN = (str, bytes, int, float, bool, type(None))


def note_plan(cache: Any, plan: CachePlan) -> bool:
    """Note `plan` on a cache, instead of what was noted before.

    Args:
        cache: cache of any kind.
        plan: what the layers of the cache hold.

    Returns:
        Whether there was anything to note it on: an object that takes attributes, or a tensor in it.

    Example:
        >>> import torch
        >>> note_plan([], CachePlan(())), note_plan([torch.zeros(1)], CachePlan(()))
        (False, True)
    """
    bearers = list(_bearers(cache))
    for bearer in bearers:
        setattr(bearer, _NAME, plan)
    return bool(bearers)


def noted_plans(cache: Any) -> list[CachePlan]:
    """The plans noted on a cache: none where it is unknown, several where its tensors are of several prompts.

    Example:
        >>> import torch
        >>> cache = {"keys": torch.zeros(1)}
        >>> len(noted_plans(cache)), note_plan(cache, CachePlan(())), len(noted_plans(cache))
        (0, True, 1)
    """
    plans = (getattr(bearer, _NAME, None) for bearer in _bearers(cache))
    return list({id(plan): plan for plan in plans if isinstance(plan, CachePlan)}.values())


def forget_plan(cache: Any) -> None:
    """Take off what was noted on a cache: reset, it belongs to another prompt.

    Example:
        >>> import torch
        >>> cache = [torch.zeros(1)]
        >>> note_plan(cache, CachePlan(())), forget_plan(cache), noted_plans(cache)
        (True, None, [])
    """
    for bearer in _bearers(cache):
        if hasattr(bearer, _NAME):
            delattr(bearer, _NAME)


def tensors_in(value: Any, depth: int = 5) -> Iterator[Tensor]:
    """All tensors in a value: in containers, and in attributes of objects. Modules are not looked into.

    Args:
        value: value of any kind.
        depth: how many containers or objects may lie around a tensor.

    Example:
        >>> import torch
        >>> [each.item() for each in tensors_in({"a": [torch.tensor(1)], "b": (torch.tensor(2), None)})]
        [1, 2]
    """
    seen: set[int] = set()
    level = [value]
    for _ in range(depth + 1):
        yield from (each for each in level if isinstance(each, Tensor))
        new = {id(each): each for each in level if not isinstance(each, Tensor) and id(each) not in seen}
        seen.update(new)
        level = [inner for each in new.values() for inner in _inside(each)]


def _inside(value: Any) -> list[Any]:
    if isinstance(value, (*_PLAIN, nn.Module, type)) or callable(value):
        return []
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    return [getattr(value, name) for name in attributes_of(value)]


def attributes_of(value: Any) -> list[str]:
    """Names of the attributes that an object has of its own, in slots or not.

    Example:
        >>> attributes_of(type("Cache", (), {})()), attributes_of(3)
        ([], [])
    """
    slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    names = [name for each in slots for name in ((each,) if isinstance(each, str) else each)]
    names = [name for name in names if name not in ("__dict__", "__weakref__") and hasattr(value, name)]
    return [*names, *getattr(value, "__dict__", ())]


def _bearers(cache: Any) -> Iterator[Any]:
    """What a plan is noted on."""
    plain = isinstance(cache, (*_PLAIN, nn.Module, Mapping, list, tuple, set, frozenset))
    if not plain and not isinstance(cache, Tensor) and hasattr(cache, "__dict__") and _takes_attributes(cache):
        yield cache
    else:
        yield from tensors_in(cache)


def _takes_attributes(value: Any) -> bool:
    kind: Any = type(value)
    return bool(kind.__setattr__ is object.__setattr__)  # frozen dataclasses have one that raises
