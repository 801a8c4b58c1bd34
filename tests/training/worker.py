"""What each of two processes does; started by torch.distributed.run, it leaves JSON in a folder."""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from tests.adapters.tiny import tiny_llava
from tests.training.rows import Rows, digest, make_trainer
from tokencurric import EPIC, Random, tcd


def make_model(dropout):
    return tiny_llava(depth=3, attention_dropout=dropout)


def training(folder, job):
    """Train, evaluate, and tell what came out."""
    objective = EPIC(Random(), tcd(layer=1), weight=job.get("weight", 0.7))
    model = make_model(job.get("dropout", 0.1))
    own = {"optimizers": (torch.optim.SGD(model.parameters(), 0.1), None)} if job.get("optimizer") else {}
    trainer = make_trainer(folder / "run", model=model, objective=objective, own=own, **job["arguments"])
    resume = trainer.last_checkpoint() if job.get("resume") else None
    trainer.train(resume_from_checkpoint=resume)
    model = trainer.accelerator.unwrap_model(trainer.model)
    evaluated = {str(rows): trainer.evaluate(Rows(rows))["eval_loss"] for rows in job.get("evaluate", [])}
    if job.get("save"):
        trainer.save_model(str(folder / "saved"))
    return {
        "world": trainer.accelerator.num_processes,
        "distributed": str(trainer.accelerator.distributed_type),
        "wrapped": type(trainer.model_wrapped).__name__,
        "resumed": resume and Path(resume).name,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "norms": [float(log["grad_norm"]) for log in trainer.state.log_history if "loss" in log],
        "weights": digest(model),
        "evaluated": evaluated,
    }


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    rank = int(os.environ["RANK"])
    try:
        found = training(folder, job)
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    if "error" in found:
        time.sleep(2)  # for the other to find the same; the launcher ends it when this one ends
        os._exit(1)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
