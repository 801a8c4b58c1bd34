"""Sphinx settings; the pages of the API are written here, from what the package exports."""

import importlib
import importlib.metadata
import inspect
import pkgutil
import shutil
import sys
from pathlib import Path
from types import ModuleType

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import tokencurric

project = "tokencurric"
author = "The tokencurric authors"
project_copyright = "the tokencurric authors"
version = release = importlib.metadata.version("tokencurric")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

maximum_signature_line_length = 100

html_theme = "furo"
html_title = "tokencurric"

default_role = "code"
autosummary_generate = False  # the pages are written below
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source", "Differs", "Laws"]

# Other projects' objects are not looked up: the build needs no network.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|transformers|accelerate|peft|PIL|numpy|jaxtyping|hypothesis|pytest)(\..*)?"),
    (r"py:.*", r"(collections|typing|types|pathlib|contextlib|dataclasses|enum|abc|os)(\..*)?"),
]
nitpick_ignore = [("py:class", name) for name in ("Tensor", "optional", "Path", "Module", "Image", "Figure")]


def rooms() -> dict[str, ModuleType]:
    """The first level of the package: name -> module, in the order in which data walks through them."""
    first = ["view", "budget", "selection", "compressors", "schedules", "curriculum", "losses", "adapters"]
    names = [found.name for found in pkgutil.iter_modules(tokencurric.__path__) if not found.name.startswith("_")]
    names.sort(key=lambda name: (first.index(name) if name in first else len(first), name))
    return {name: importlib.import_module(f"tokencurric.{name}") for name in names}


def public(module: ModuleType) -> list[str]:
    """Names that a module offers: `__all__`, or the classes and functions that it or its files define."""
    own = [
        name
        for name, thing in vars(module).items()
        if (inspect.isclass(thing) or inspect.isfunction(thing))
        and f"{thing.__module__}.".startswith(f"{module.__name__}.")
    ]
    return [name for name in getattr(module, "__all__", own) if not name.startswith("_")]


def homes() -> dict[str, list[tuple[str, object]]]:
    """Room -> the path by which users import each of its names, with the object; the shortest path wins."""
    shelves: dict[str, list[tuple[str, object]]] = {room: [] for room in rooms()}
    top = {name: getattr(tokencurric, name) for name in public(tokencurric)}
    for name, thing in top.items():
        room = thing.__module__.split(".")[1]
        shelves[room].append((f"tokencurric.{name}", thing))
    for room, module in rooms().items():
        for name in public(module):
            thing = getattr(module, name)
            if not any(thing is known for known in top.values()):
                shelves[room].append((f"{module.__name__}.{name}", thing))
    return {room: shelf for room, shelf in shelves.items() if shelf}


SHELVES = homes()
PATHS = {path.rpartition(".")[2]: path for shelf in SHELVES.values() for path, _ in shelf}


def underlined(title: str, line: str) -> str:
    """A title in reStructuredText."""
    return f"{title}\n{line * len(title)}\n\n"


def page(path: str, thing: object) -> str:
    """The page of one public name."""
    kind = "autoclass" if inspect.isclass(thing) else "autofunction" if callable(thing) else "autodata"
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        kind = "autoexception"
    options = "   :members:\n   :special-members: __call__\n" if kind == "autoclass" else ""
    return underlined(path.rpartition(".")[2], "=") + f".. {kind}:: {path}\n{options}"


def write_api(folder: Path) -> None:
    """Write one page a public name and an index by room."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    index = underlined("API", "=")
    for room, shelf in SHELVES.items():
        index += underlined(room.capitalize(), "-")
        index += ".. autosummary::\n   :nosignatures:\n\n" + "".join(f"   {path}\n" for path, _ in shelf) + "\n"
        index += ".. toctree::\n   :hidden:\n\n" + "".join(f"   {path}\n" for path, _ in shelf) + "\n"
        for path, thing in shelf:
            (folder / f"{path}.rst").write_text(page(path, thing), encoding="utf-8")
    (folder / "index.rst").write_text(index, encoding="utf-8")


def find_public(app: Sphinx, env: BuildEnvironment, node: nodes.Element, text: nodes.Element) -> nodes.Element | None:
    """Let `tokencurric.compressors.fastv.FastV`, as annotations spell it, point to the page of `FastV`."""
    module, _, name = str(node.get("reftarget", "")).rpartition(".")
    if node.get("refdomain") != "py":
        return None
    if name not in PATHS:
        internal = module.startswith("tokencurric.") and hasattr(sys.modules.get(module), name)
        return text if internal else None  # it exists, without a page of its own
    python = env.domains["py"]
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", PATHS[name], node, text)


def keep_colons(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Keep napoleon from reading the first line of a property up to a colon as the property's type."""
    if what in {"property", "attribute", "data"}:
        lines[:0] = ["..", ""]  # an empty comment: a first line without a colon


def setup(app: Sphinx) -> None:
    """Write the pages and connect what reads them."""
    write_api(Path(app.srcdir) / "api")
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # napoleon comes at 500
    app.connect("missing-reference", find_public)
