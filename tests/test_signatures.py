"""What callers of the core rely on: names, arguments, defaults, and that values cannot be changed.

After a change that is meant: `python -m tests.test_signatures`.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

GOLDEN = Path(__file__).parent / "golden" / "signatures.txt"
CORE = ("budget", "token_budget", "view", "selection", "ranking", "draws", "curriculum")
ROOMS = ("compressors", "schedules", "losses")


def modules() -> Iterator[ModuleType]:
    for name in CORE:
        yield importlib.import_module(f"tokencurric.{name}")
    for room in ROOMS:
        package = importlib.import_module(f"tokencurric.{room}")
        for found in pkgutil.iter_modules(package.__path__):
            yield importlib.import_module(f"tokencurric.{room}.{found.name}")


def arguments(call: Any) -> str:
    """Names, kinds and defaults of the arguments; annotations say what the types say."""
    empty = inspect.Parameter.empty
    kept = []
    for each in inspect.signature(call).parameters.values():
        default = getattr(each.default, "__name__", each.default)  # a function without its address
        kept.append(each.replace(annotation=empty, default=empty if each.default is empty else default))
    return str(inspect.Signature(kept))


def lines() -> Iterator[str]:
    for module in modules():
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            place = f"{module.__name__}.{name}"
            if inspect.isfunction(thing):
                yield f"{place}{arguments(thing)}"
            elif inspect.isclass(thing):
                params = getattr(thing, "__dataclass_params__", None)
                values = "" if params is None else f"  frozen={params.frozen} eq={params.eq}"
                yield f"{place}{'' if getattr(thing, '_is_protocol', False) else arguments(thing)}{values}"
                for method, call in vars(thing).items():
                    if inspect.isfunction(call) and (not method.startswith("_") or method == "__call__"):
                        yield f"{place}.{method}{arguments(call)}"
                    elif isinstance(call, classmethod):
                        yield f"{place}.{method}{arguments(getattr(thing, method))}"
                    elif isinstance(call, property):
                        yield f"{place}.{method}"


def test_nothing_that_callers_rely_on_has_changed():
    told, found = GOLDEN.read_text(encoding="utf-8").splitlines(), sorted(lines())
    assert found == told, "if this is meant, write it down: python -m tests.test_signatures"
    assert "tokencurric.curriculum.tcd(variant='paper', *, layer=2)" in told


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(sorted(lines())) + "\n", encoding="utf-8")
