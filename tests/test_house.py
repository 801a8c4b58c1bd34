"""What is promised about the package as a whole: its names, its imports, its words."""

import doctest
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tokencurric

ROOT = Path(__file__).parents[1]
PROMISED = [
    "keep_count",
    "VisualView",
    "Selection",
    "Compressor",
    "Random",
    "Uniform",
    "FastV",
    "DART",
    "Schedule",
    "Constant",
    "Linear",
    "Cosine",
    "Step",
    "Curriculum",
    "Stage",
    "tcd",
    "lcd",
    "icd",
    "ConsistencyLoss",
    "EPIC",
    "EpicTrainer",
    "compress",
    "TokencurricError",
    "TokenBudget",
    "ModelAdapter",
]


def imported_by(statement: str) -> set[str]:
    """Top-level packages in a fresh interpreter after `statement`."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_leaves_heavy_and_optional_packages_alone():
    heavy = {"transformers", "accelerate", "peft", "hypothesis", "beartype", "pytest", "torchvision", "matplotlib"}
    assert imported_by("import tokencurric") & heavy == set()
    # The same question sees them where they are wanted.
    assert {"transformers", "accelerate"} <= imported_by("from tokencurric import EpicTrainer")


@pytest.mark.parametrize("name", PROMISED)
def test_promised_name_is_public(name: str):
    assert name in tokencurric.__all__
    assert getattr(tokencurric, name) is not None


def test_an_unknown_name_is_refused_as_python_does():
    with pytest.raises(AttributeError, match="Pretzel"):
        _ = tokencurric.Pretzel


def test_public_names_are_unique_and_listed_by_dir():
    assert len(set(tokencurric.__all__)) == len(tokencurric.__all__)
    assert set(tokencurric.__all__) <= set(dir(tokencurric))


def test_version_is_that_of_the_distribution():
    assert tokencurric.__version__ == importlib.metadata.version("tokencurric")


@pytest.mark.parametrize("name", [name for name in tokencurric.__all__ if not name.startswith("__")])
def test_public_name_is_explained_by_an_example(name: str):
    thing = getattr(tokencurric, name)
    text = inspect.getdoc(thing)
    assert text, f"{name} has no docstring"
    if not getattr(thing, "_is_protocol", False):
        assert doctest.DocTestParser().get_examples(text), f"the docstring of {name} has no example that runs"


# Built from parts, so that this file passes its own test.
FOREIGN = re.compile(
    "|".join(
        [
            r"(?<![\w.~/-])/(?:tmp|work|root|home)/\w",  # a path of one machine
            "files[.]pythonhosted|pypi" + "[.]org/simple",  # a package registry's host
        ]
    )
)


def texts() -> list[Path]:
    rooms = ("tokencurric", "tests", "benchmarks", "examples", "docs", ".ci")
    kinds = {".py", ".md", ".rst", ".toml", ".txt", ".json", ".html", ""}
    built = {"_build", "api", "__pycache__"}
    paths = [path for room in rooms for path in (ROOT / room).rglob("*") if not built & set(path.parts)]
    paths += [path for path in ROOT.iterdir() if not path.name.startswith(".")]
    return [path for path in paths if path.is_file() and path.suffix in kinds]


def test_no_file_names_a_machine():
    found = [
        f"{path.relative_to(ROOT)}: {hit.group()}"
        for path in texts()
        for hit in FOREIGN.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []
    assert FOREIGN.search("see /" + "tmp/notes")
    assert ROOT / "pyproject.toml" in texts()
