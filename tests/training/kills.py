"""Kill trainings, at named moments of saving and at random ones, resume them, and compare weights bit for bit.

`python -m tests.training.kills --random 12 --seed 0` prints a table; its exit status is the number of failures.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.training.nursery import ROOT, Nursery, result

OFTEN = {"save_steps": 1}  # for random moments, so that more of them fall into saving

# One of each kind; the second save, so that there is an earlier checkpoint to lose.
NAMED = (
    "opened:unfinished/checkpoint-4/config.json",
    "half:unfinished/checkpoint-4/model.safetensors",
    "written:unfinished/checkpoint-4/model.safetensors",
    "half:unfinished/checkpoint-4/optimizer.pt",
    "written:unfinished/checkpoint-4/rng_state.pth",
    "opened:unfinished/checkpoint-4/trainer_state.json",
    "opened:unfinished/checkpoint-4/tokencurric-contents.json.partial",
    "renaming:unfinished/checkpoint-4",
    "renamed:unfinished/checkpoint-4",
    "renamed:checkpoint-2",
    "deleting:unfinished",
    "trained",
)


@dataclass(frozen=True)
class Row:
    """A training that was killed: where, what its successor went on from, and whether the weights are the same."""

    moment: str
    status: int
    found: tuple[str, ...]
    resumed: str | None
    same: bool


def moments(nursery, folder):
    """Hash of the weights of a training that nobody kills, its seconds, and all its moments in order."""
    log = Path(folder, "moments.txt")
    nursery.start(folder, log=str(log))
    begun = time.monotonic()
    if nursery.wait() != 0:
        raise RuntimeError(Path(folder, "log.txt").read_text()[-3000:])
    return result(folder)["weights"], time.monotonic() - begun, log.read_text().splitlines()


def resume(nursery, folder, expected, moment, status, **job):
    run = Path(folder, "run")
    found = tuple(sorted(path.name for path in run.iterdir())) if run.is_dir() else ()
    if nursery.run(folder, **job) != 0:
        print(Path(folder, "log.txt").read_text()[-3000:], file=sys.stderr)
        return Row(moment, status, found, None, False)
    end = result(folder)
    return Row(moment, status, found, end["from"], end["weights"] == expected and end["step"] == 6)


def killed_at(nursery, folder, expected, all_moments, moment):
    """Kill at the first moment of this name."""
    status = nursery.run(folder, at=all_moments.index(moment))
    return resume(nursery, folder, expected, moment, status)


def killed_after(nursery, folder, expected, seconds, **job):
    """Kill each successor after its number of seconds, then let one come to the end."""
    status = 0
    for each in seconds:
        process = nursery.start(folder, **job)
        time.sleep(each)
        os.kill(process, signal.SIGKILL)  # at worst it waits to be collected: it ended before
        status = nursery.wait()
    return resume(nursery, folder, expected, " + ".join(f"{each:.2f} s" for each in seconds), status, **job)


def example(folder, *more):
    """The example as a process that can be killed: Muon, images and text, evaluation after training."""
    command = [sys.executable, str(ROOT / "examples" / "llava_epic.py"), "--smoke", "--stages", "epic"]
    command += ["--questions", "4", "--save-every", "1", "--steps", "6", "--output", str(folder), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    Path(folder).mkdir(parents=True, exist_ok=True)
    with Path(folder, "log.txt").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def example_ended(folder):
    """Hash of the saved weights, and all answers; None where there is no end."""
    weights, results = Path(folder, "checkpoint", "model.safetensors"), Path(folder, "results.json")
    if not (weights.is_file() and results.is_file()):
        return None
    return hashlib.sha256(weights.read_bytes()).hexdigest(), json.loads(results.read_text())["accuracy"]


def examples(folder, draws, count):
    """Kill the example `count` times, each within its training or what comes after."""
    begun = time.monotonic()
    process = example(Path(folder, "example"))
    while not Path(folder, "example", "metrics.jsonl").is_file() and process.poll() is None:
        time.sleep(0.05)
    trains = time.monotonic() - begun
    process.wait()
    seconds, expected = time.monotonic() - begun, example_ended(Path(folder, "example"))
    for number in range(count):
        into, drawn = Path(folder, f"example-{number}"), draws.uniform(0.0, seconds - trains)
        process = example(into)
        while not Path(into, "metrics.jsonl").is_file() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(drawn)
        process.kill()
        status = process.wait()
        found = tuple(sorted(path.name for path in into.glob("stages/epic/*")))
        example(into, "--resume").wait()
        same = expected is not None and example_ended(into) == expected
        yield Row(f"the example, {drawn:.1f} s after its first step", status, found, ", ".join(found) or None, same)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=int, default=12, help="kills at random moments, beside one of each named")
    parser.add_argument("--examples", type=int, default=0, help="kills of the example at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", action="store_true", help="kill at every moment there is, not one of each kind")
    options = parser.parse_args()
    draws, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as folder, Nursery() as nursery:
        expected, _, found = moments(nursery, Path(folder, "whole"))
        for number, moment in enumerate(dict.fromkeys(found) if options.every else NAMED):
            rows.append(killed_at(nursery, Path(folder, f"named-{number}"), expected, found, moment))
            show(len(rows), rows[-1])
        nursery.start(Path(folder, "often"), arguments=OFTEN)
        begun = time.monotonic()
        nursery.wait()
        seconds = time.monotonic() - begun
        same = result(Path(folder, "often"))["weights"]
        for number in range(options.random):
            drawn = [draws.uniform(0, seconds) for _ in range(1 + number % 2)]  # every second one is killed twice
            into = Path(folder, f"random-{number}")
            rows.append(killed_after(nursery, into, same, drawn, arguments=OFTEN))
            show(len(rows), rows[-1])
        for row in examples(folder, draws, options.examples) if options.examples else ():
            rows.append(row)
            show(len(rows), row)
    wrong = sum(not row.same for row in rows)
    print(f"{len(rows) - wrong} of {len(rows)} killed trainings ended with the weights of one that nobody killed")
    return wrong


def show(number, row):
    end = "same weights" if row.same else "OTHER WEIGHTS OR NO END"
    status = "killed" if row.status == -signal.SIGKILL else f"status {row.status}"
    print(f"{number:3}  {row.moment:66} {status:8}  resumed from {row.resumed or 'the start':13}  {end}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
