"""Every task of the project: `nox --list` shows them, `nox -s NAME` runs one.

Environments are kept between runs, and what is installed in one stays until pyproject.toml, constraints.txt or this
file changes.
"""

import hashlib
import os
import tarfile
import tomllib
import zipfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent
SETTINGS = [ROOT / name for name in ("pyproject.toml", "constraints.txt", "noxfile.py")]

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"  # brings pip: other installers choose CUDA builds of torch
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests"]

# No session talks to a model hub, and tokenizers must not start threads beside torch's.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}

# What another release of a dependency may break: models, `generate`, EPIC, the trainer; and what shows it soonest.
DEPENDENT = ["tests/hosts", "tests/adapters", "tests/data", "tests/evaluation", "tests/examples"]
DEPENDENT += ["tests/test_distill.py", "tests/test_trainer.py"]
SOONEST = "hosts or test_generate or generates_what_a_recompute_gives or test_a_resumed_run or test_lora"

# A process for each core: the tests hold torch to one thread.
PARALLEL = ["--numprocesses", "auto", "--dist", "loadgroup"]


def install(session: nox.Session, *what: str) -> None:
    """Install under the constraints, unless the environment has it all from an earlier run."""
    state = hashlib.sha256(b"".join(path.read_bytes() for path in SETTINGS) + os.fsencode(ROOT)).hexdigest()
    stamp = Path(session.virtualenv.location) / "installed.txt"
    if stamp.is_file() and stamp.read_text() == state:
        session.log("What this session needs is installed.")
        return
    session.install("--constraint", str(ROOT / "constraints.txt"), *what)
    stamp.write_text(state)


@nox.session
def demo(session: nox.Session) -> None:
    """Train the embedded model with EPIC and write the report; arguments after `--` go to the example."""
    install(session, "--editable", ".[demo]")
    session.run("python", "examples/llava_epic.py", *session.posargs, env=QUIET)


@nox.session
def tests(session: nox.Session) -> None:
    """Tests and doctests; TOKENCURRIC_PROFILE=dev|ci|nightly sets how many examples a property gets."""
    install(session, "--editable", ".[dev]")
    session.run("pytest", *PARALLEL, *session.posargs, env=QUIET)


@nox.session
def nightly(session: nox.Session) -> None:
    """All tests, the slow ones too, with thousands of examples a property."""
    install(session, "--editable", ".[dev,fused]")
    everything = ["-m", "slow or not slow"]
    hours = ["--timeout", "7200"]
    environment = QUIET | {"TOKENCURRIC_PROFILE": "nightly"}
    session.run("pytest", *PARALLEL, *everything, *hours, *session.posargs, env=environment)


@nox.session
def newest(session: nox.Session) -> None:
    """The newest releases but of torch, without constraints; `-- --short` runs what notices a renaming first."""
    extras = ["--editable", ".[demo,lora,testing]", "beartype", "pytest-timeout", "pytest-xdist"]
    session.install("--upgrade", "--upgrade-strategy", "eager", *extras, pinned("torch"))
    dependent(session)


@nox.session
def oldest(session: nox.Session) -> None:
    """The lower bounds that pyproject.toml declares; what they require themselves is the newest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(each for name in ("hf", "lora", "demo", "testing") for each in extras[name])]
    tools = [each for each in extras["dev"] if each.startswith(("beartype", "pytest-timeout", "pytest-xdist"))]
    lowest = [each.partition(",")[0].replace(">=", "==") for each in (*wanted, *tools) if "tokencurric" not in each]
    session.install(*lowest)
    session.install("--no-deps", "--editable", ".")
    dependent(session)


def pinned(package: str) -> str:
    """The line of constraints.txt about `package`."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))


def dependent(session: nox.Session) -> None:
    """Run what depends on other people's releases, and the example."""
    short = "--short" in session.posargs
    given = [each for each in session.posargs if each != "--short"]
    session.run("python", "-m", "pip", "list", silent=False)
    session.run("pytest", *PARALLEL, *DEPENDENT, *(["-k", SOONEST] if short else []), *given, env=QUIET)
    session.run("python", "examples/llava_epic.py", "--smoke", env=QUIET)


@nox.session
def quantised(session: nox.Session) -> None:
    """Models with int8 weights, which torchao makes; transformers imports it wherever it is, with pages of warnings."""
    install(session, "--editable", ".[dev]", "torchao>=0.18")
    session.run("pytest", "tests/adapters/test_quantised.py", *session.posargs, env=QUIET)


@nox.session
def fused(session: nox.Session) -> None:
    """The fused kernel, which Triton interprets where there is no GPU; not among the tests, for it takes a gigabyte."""
    install(session, "--editable", ".[dev,fused]")
    session.run("pytest", "tests/test_fused.py", *session.posargs, env=QUIET)


@nox.session
def kills(session: nox.Session) -> None:
    """Kill trainings while they save and at random moments; do they resume bit for bit? `-- --help` for arguments."""
    install(session, "--editable", ".[demo,testing]")
    session.run("python", "-m", "tests.training.kills", *session.posargs, env=QUIET | {"PYTHONPATH": str(ROOT)})


@nox.session
def deepspeed(session: nox.Session) -> None:
    """Training under DeepSpeed on two CPU processes, the 8-GPU command of the README among it."""
    install(session, "--editable", ".[demo,testing]", "deepspeed>=0.19", "pytest-timeout", "pytest-xdist")
    plain = ["-o", "addopts=--import-mode=importlib"]  # without the shape checks of the other tests
    session.run("pytest", "tests/training/test_deepspeed.py", *plain, *session.posargs, env=QUIET)


@nox.session
def mutants(session: nox.Session) -> None:
    """Change the core in small ways, one at a time: does a test notice? For arguments see tests/testing/mutants.py."""
    install(session, "--editable", ".[dev]", "cosmic-ray>=8.4")
    session.run("python", "tests/testing/mutants.py", *session.posargs, env=QUIET | {"TOKENCURRIC_PROFILE": "mutants"})


@nox.session
def lint(session: nox.Session) -> None:
    """Style and likely mistakes; `nox -s lint -- --fix` mends what can be mended."""
    install(session, "ruff")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", *([] if "--fix" in session.posargs else ["--check"]))


@nox.session
def types(session: nox.Session) -> None:
    """Static types, strict."""
    install(session, "--editable", ".[demo,lora,testing]", "mypy", "nox")
    session.run("mypy", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Timings. The shape checks of the tests are off here: they would be timed too."""
    install(session, "--editable", ".[hf,testing]", "pytest-benchmark", "pytest-timeout")
    session.run("pytest", "benchmarks", "-o", "addopts=--import-mode=importlib", *session.posargs, env=QUIET)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as HTML in docs/_build/html; every warning is an error."""
    install(session, "--editable", ".[demo,docs]")
    strict = ["-W", "-n", "--keep-going", "-E"]
    session.run("sphinx-build", *strict, "-b", "html", "docs", "docs/_build/html", *session.posargs, env=QUIET)


@nox.session
def dist(session: nox.Session) -> None:
    """Build the source archive and the wheel, and look into both."""
    install(session, "build", "hatchling")
    folder = Path(session.create_tmp())
    for earlier in folder.iterdir():
        earlier.unlink()
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(folder))
    (wheel,) = folder.glob("*.whl")
    (archive,) = folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as packed:
        in_wheel = set(packed.namelist())
    with tarfile.open(archive) as packed_source:
        in_archive = {name.partition("/")[2] for name in packed_source.getnames()}
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tokencurric").rglob("*.py")}
    library |= {"tokencurric/py.typed"}
    missing = (library - in_wheel) | ((library | {"LICENSE", "README.md", "pyproject.toml"}) - in_archive)
    strangers = {name for name in in_wheel if not name.startswith(("tokencurric/", "tokencurric-"))}
    if missing or strangers:
        session.error(f"missing: {sorted(missing)}; in the wheel by mistake: {sorted(strangers)}")
