"""Runs compiled_cases.py with the library as its users run it.

The compiler cannot trace what pytest's hook wraps around functions and classes to check shapes, even when it is
switched off, so these tests need a process that never had the hook.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("compiled_cases.py")
NAMES = re.findall(r"^def (test_\w+)", CASES.read_text(encoding="utf-8"), re.MULTILINE)


def run(*choice):
    """Run the chosen cases; none at all is a failure too."""
    options = ["-o", "addopts=--import-mode=importlib --strict-markers", "-p", "no:cacheprovider", "--show-capture=no"]
    command = [sys.executable, "-m", "pytest", str(CASES), *options, *choice]
    done = subprocess.run(command, cwd=CASES.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.timeout(1200)  # ten cases in one process, which a busy machine needs minutes for
def test_compiled():
    run("-m", "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_in_all_ways(name):
    run("-k", name)
