"""A process with all imports done that forks one training after another: `python -m tests.training.nursery`.

Reads a JSON object a line, `{"folder": ..., "at": ...}`; answers with the child's number when the training begins,
and with its exit status when it ended.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from tests.training.events import Events
from tests.training.rows import digest, make_trainer

ROOT = Path(__file__).parents[2]


def work(job, began):
    """Train, or go on with what is in the folder; at the end leave a hash of the weights."""
    run = Path(job["folder"], "run")
    trainer = make_trainer(run, **job.get("arguments", {}))
    events = Events(run, job.get("at"), job.get("log")).install()
    os.write(began, b"\n")
    resume = trainer.last_checkpoint()
    trainer.train(resume_from_checkpoint=resume)
    events("trained")
    result = {"weights": digest(trainer.model), "from": resume and Path(resume).name, "step": trainer.state.global_step}
    Path(job["folder"], "result.json").write_text(json.dumps(result))


def serve():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(folder)  # imports what is imported late; a backward pass here would forbid one in a fork
    for line in sys.stdin:
        job = json.loads(line)
        ready, began = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ready)
            with Path(job["folder"], "log.txt").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            try:
                work(job, began)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        os.close(began)
        os.read(ready, 1)
        os.close(ready)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Nursery:
    """The other side: start a training, kill it or not, learn how it ended."""

    def __enter__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.nursery"],
            cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(timeout=30)

    def start(self, folder, **job):
        """Number of the process, once it is about to train."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.process.stdin.write(json.dumps({"folder": str(folder), **job}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        """Exit status, −9 after a kill."""
        return int(self.process.stdout.readline())

    def run(self, folder, **job):
        self.start(folder, **job)
        return self.wait()


def result(folder):
    return json.loads(Path(folder, "result.json").read_text())


if __name__ == "__main__":
    serve()
