"""Is the suite any good? Small changes to the core, one at a time, each of which some test should notice.

Cosmic Ray makes the mutants. They are tried in forks of this process, which has the heavy imports behind it, in a
copy of the sources, so that the working tree stays as it is.

    python tests/testing/mutants.py                # the whole core
    python tests/testing/mutants.py budget view    # files whose path has one of these words
    python tests/testing/mutants.py --every 5      # each fifth mutant
"""

import argparse
import ast
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("tokencurric", "tests", "pyproject.toml", "docs/write_a_compressor.md")
LAWS = "tests/testing/test_laws.py"
TIMEOUT, WANTED = 120, 0.9
QUIETLY = ("-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed", "0")  # one seed: the same survivors each time

# What notices a change of a file, the quickest first. `compiles` is left out: it sees nothing that eager runs don't.
SIGNATURES = "tests/test_signatures.py"
SUITES = {
    "budget.py": [SIGNATURES, "tests/test_budget.py"],
    "token_budget.py": [SIGNATURES, "tests/test_token_budget.py"],
    "view.py": [SIGNATURES, "tests/test_view.py", "tests/test_compressors.py"],
    "selection.py": [SIGNATURES, "tests/test_selection.py"],
    "ranking.py": [SIGNATURES, "tests/test_ranking.py"],
    "draws.py": [SIGNATURES, "tests/test_draws.py"],
    "curriculum.py": [SIGNATURES, "tests/test_curriculum.py"],
    "schedules/": [SIGNATURES, "tests/test_schedules.py", f"{LAWS}::test_schedule"],
    "losses/": [SIGNATURES, "tests/test_losses.py", f"{LAWS}::test_divergence"],
    "compressors/": [SIGNATURES, "tests/test_compressors.py", f"{LAWS}::test_compressor"],
}


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    line: int
    change: str
    code: str


@dataclass(frozen=True)
class Share:
    """Mutants of one file, for one process to try."""

    name: str
    mutants: tuple[Mutant, ...]


def mutants(path: Path, name: str) -> Iterator[Mutant]:
    """The mutants of a file: one replacement a place and kind of operator, none in annotations and messages."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = path.read_text()
    tree, skipped = get_ast(source), quiet_places(source)
    seen: set[tuple[str, tuple[int, int]]] = set()
    for operator_name in sorted(operator_names()):
        operator_class = get_operator(operator_name)
        if operator_class.arguments():
            continue
        operator = operator_class()
        places = [place for node in ast_nodes(tree) for place in operator.mutation_positions(node)]
        kind = "_".join(operator_name.split("_")[:2])  # of all that may replace an operator, the first that parses
        for occurrence, (start, _) in enumerate(places):
            key = (operator_name if "Number" in operator_name else kind, start)
            if (key in seen and "Number" not in operator_name) or start in skipped or start[0] in skipped:
                continue
            code = mutate_code(source, operator, occurrence)
            if code is None or not parses(code):
                continue
            seen.add(key)
            yield Mutant(name, start[0], difference(source, code), code)


def parses(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def quiet_places(source: str) -> set[object]:
    """Lines and positions whose change is no change of behaviour: annotations, and the arguments of `raise`."""
    quiet: set[object] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs]
            annotations = [node.returns, *(argument.annotation for argument in arguments)]
        elif isinstance(node, ast.AnnAssign):
            annotations = [node.annotation]
        elif isinstance(node, ast.Raise):
            annotations = [node.exc]
        else:
            continue
        for annotation in annotations:
            if annotation is not None:
                quiet |= set(positions(annotation))
    return quiet


def positions(node: ast.AST) -> Iterator[tuple[int, int]]:
    for line in range(node.lineno, node.end_lineno + 1):
        first = node.col_offset if line == node.lineno else 0
        last = node.end_col_offset if line == node.end_lineno else 200
        yield from ((line, column) for column in range(first, last + 1))


def difference(before: str, after: str) -> str:
    pairs = zip(before.splitlines(), after.splitlines(), strict=False)
    return next((f"{a.strip()}  ->  {b.strip()}" for a, b in pairs if a != b), "a line was added or removed")


def suite(name: str) -> list[str]:
    """Arguments of pytest for a file of the core."""
    (room,) = [room for room in SUITES if name.removeprefix("tokencurric/").startswith(room)]
    words = f"not compiles and ({Path(name).stem} or not test_laws)" if room == "compressors/" else "not compiles"
    return [*SUITES[room], "-k", words]


def survives(tree: Path, arguments: list[str]) -> bool:
    """Whether all tests pass in a fork that works in `tree`."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
        import pytest

        os._exit(int(pytest.main([*QUIETLY, *arguments])))
    return wait(child) == 0


def wait(child: int) -> int:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)  # the fork's own group
    os.waitpid(child, 0)
    return -1


def warm() -> None:
    """What every fork would import again. Not tokencurric, which it shall read from its own tree."""
    import hypothesis.strategies  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch.utils.checkpoint

    torch.set_num_threads(1)


def core() -> list[str]:
    files = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "tokencurric").rglob("*.py"))]
    rooms = tuple(f"tokencurric/{room}" for room in SUITES)
    return [name for name in files if name.startswith(rooms) and not name.endswith("__init__.py")]


def copied(folder: str) -> Path:
    """A tree with the sources and the tests."""
    tree = Path(folder)
    for source in SOURCES:
        here, there = ROOT / source, tree / source
        there.parent.mkdir(parents=True, exist_ok=True)
        if here.is_dir():
            shutil.copytree(here, there, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(here, there)
    return tree


def alive(share: Share) -> list[Mutant]:
    """Those of a share of a file's mutants that no test notices."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(folder)
        survivors = []
        for mutant in share.mutants:
            (tree / share.name).write_text(mutant.code)
            if survives(tree, suite(share.name)):
                survivors.append(mutant)
        return survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only files whose path has one of these")
    parser.add_argument("--every", type=int, default=1, help="try each n-th mutant")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    chosen = parser.parse_args()
    names = [name for name in core() if not chosen.words or any(word in name for word in chosen.words)]
    warm()
    sys.dont_write_bytecode = True  # a mutant of the same second and size would be read from the cache
    tried = survived = 0
    with multiprocessing.get_context("fork").Pool(chosen.jobs) as pool:
        unchanged = [Share(name, (Mutant(name, 0, "", (ROOT / name).read_text()),)) for name in names]
        for share, survivors in zip(unchanged, pool.map(alive, unchanged, chunksize=1), strict=True):
            if not survivors:
                raise SystemExit(f"The tests of {share.name} fail without any change: {suite(share.name)}")
        for name in names:
            found = tuple(mutants(ROOT / name, name))[:: chosen.every]
            shares = [Share(name, found[job :: chosen.jobs]) for job in range(chosen.jobs)]
            unnoticed = [mutant for each in pool.map(alive, shares, chunksize=1) for mutant in each]
            tried, survived = tried + len(found), survived + len(unnoticed)
            print(f"{name}: {len(found) - len(unnoticed)} of {len(found)} noticed", flush=True)
            for mutant in sorted(unnoticed, key=lambda mutant: mutant.line):
                print(f"    {mutant.path}:{mutant.line}: {mutant.change}", flush=True)
    score = 1 - survived / tried if tried else 1.0
    print(f"{tried - survived} of {tried} mutants noticed: {score:.1%}")
    return 0 if score >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
