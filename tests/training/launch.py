"""Two CPU processes that talk over gloo. `accelerate launch --cpu --num_processes 2` starts a single one."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUIET = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT),
}


def on_two(*command, seconds=240, check=True):
    """Run a script or `-m module` with its arguments in two processes; what they print.

    Processes that hang are ended, with the launcher, and fail the test.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    process = subprocess.Popen(
        [*launcher, *map(str, command)], cwd=ROOT, env=os.environ | QUIET, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"no end after {seconds} s: {process.communicate()[0][-4000:]}") from None
    assert process.returncode == 0 or not check, text[-4000:]
    return text


def train_on_two(folder, **job):
    """Results of `tests.training.worker` on both ranks, `{"error": ...}` of one that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in (0, 1):
        (folder / f"rank-{rank}.json").unlink(missing_ok=True)
    (folder / "job.json").write_text(json.dumps({"arguments": {}, **job}))
    text = on_two("-m", "tests.training.worker", folder, check=False)
    files = [folder / f"rank-{rank}.json" for rank in (0, 1)]
    return [json.loads(file.read_text()) if file.exists() else {"error": text[-4000:]} for file in files]
