"""What each of two processes does; started by torch.distributed.run, it leaves JSON in a folder."""

import json
import sys
from pathlib import Path

import torch

from tests.training.rows import Rows, digest, make_trainer
from tokencurric import EPIC, Random, tcd


def training(folder, job):
    """Train, evaluate, and tell what came out."""
    objective = EPIC(Random(), tcd(layer=1), weight=job.get("weight", 0.7))
    trainer = make_trainer(folder / "run", objective=objective, **job["arguments"])
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
        "weights": None if job.get("sharded") else digest(model),
        "evaluated": evaluated,
    }


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    try:
        found = training(folder, job)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
