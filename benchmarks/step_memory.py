"""What a training step holds for its backward pass, and its peak, beside a closed form.

    python benchmarks/step_memory.py [--json FILE] [--quick] [--stages N]

For each way to make a step, over stages taken evenly from a curriculum: `held`, the bytes that autograd keeps at the
end of the forward (weights, which are there anyway, left out), and `peak`, what torch's allocator gives out at most
beyond the weights, gradients of the weights included. Both are counted, not sampled, so the machine may be busy.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Not the script's folder, where selectors.py hides the standard library's module.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.allocator import cpu_peak
from benchmarks.llava import Shape
from benchmarks.training_step import QUICK, make_batch, make_model, steps_of, ways_of
from tokencurric import EPIC, Random, keep_count, lcd, tcd
from tokencurric.curriculum import Stage

WAYS = ("sft", "two_pass", "ours")
FLOAT = 4


def held(shape: Shape, stage: Stage) -> dict[str, float]:
    """Bytes kept for the backward pass, in closed form, float32.

    A layer keeps for each token: what comes in, normed, and scaled (3 widths), queries, keys, values and what attention
    makes of them (4), the same three before the MLP, four of the MLP's inner width, and a number a head. The last layer
    of `EPIC` keeps what goes into query, output and MLP, and what comes of it, of supervised tokens only. Then come the
    final norm's three widths, what goes into the head, and logarithms of probabilities for cross-entropy; and for the
    divergence those of the student, and the teacher's probabilities.
    """
    full = shape.visual + shape.text
    below = stage.layer if stage.compresses else shape.layers
    student = keep_count(shape.visual, stage.student) + shape.text if stage.compresses else full
    token = 10 * shape.width + 4 * shape.inner + shape.heads
    layers = below * full + (shape.layers - below) * student
    said = (3 if stage.distils else 1) * shape.vocabulary
    left_out = student * (shape.width + 4 * shape.inner) - shape.supervised * (3 * shape.width + 4 * shape.inner)
    return {
        "sft": FLOAT * full * (shape.layers * token + 4 * shape.width + shape.vocabulary),
        "two_pass": FLOAT * (layers * token + student * 4 * shape.width + shape.supervised * said),
        "ours": FLOAT
        * (layers * token - left_out + student * 3 * shape.width + shape.supervised * (shape.width + said)),
    }


def kept(loss: Callable[[], Tensor], model: torch.nn.Module) -> int:
    """Bytes of all that autograd keeps for the backward pass of `loss`, weights left out."""
    weights = {each.untyped_storage().data_ptr() for each in model.state_dict().values()}
    storages: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss()
    return sum(storages.values())


def measure(shape: Shape, *, stages: int) -> dict[str, dict[str, dict[str, float]]]:
    """Bytes of each way in each curriculum, means over its stages."""
    model, batch = make_model(shape), make_batch(shape)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name, curriculum in (("tcd", tcd()), ("lcd", lcd())):
        found = {way: {"held": 0.0, "held_limit": 0.0, "peak": 0.0} for way in WAYS}
        for number in range(stages):  # each from the middle of its part of the curriculum
            step, total = 2 * number + 1, 2 * stages
            objective = EPIC(Random(), curriculum)
            limit = held(shape, curriculum.at(step, total, seed=0, layers=shape.layers))
            losses = ways_of(model, batch, objective, step, total)
            steps = steps_of(model, batch, objective, step, total)
            for way in WAYS:
                model.zero_grad()
                found[way]["held"] += kept(losses[way], model) / stages
                objective.detach()
                found[way]["held_limit"] += limit[way] / stages
                found[way]["peak"] += cpu_peak(steps[way]) / stages
                model.zero_grad()
        figures[name] = found
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--quick", action="store_true", help="a small shape, for a look")
    parser.add_argument("--stages", type=int, default=4, help="of each curriculum")
    arguments = parser.parse_args()
    shape = QUICK if arguments.quick else Shape()
    figures = measure(shape, stages=arguments.stages)
    print(f"{shape}, float32, MiB, means over {arguments.stages} stages")
    print(f"{'':13}{'held':>9}{'closed form':>13}{'of fine-tuning':>16}{'peak':>9}{'of fine-tuning':>16}")
    for name, found in figures.items():
        for way, row in found.items():
            sizes = [row[each] / 2**20 for each in ("held", "held_limit", "peak")]
            shares = [row[each] / found["sft"][each] for each in ("held", "peak")]
            print(
                f"{name} {way:9}{sizes[0]:9.1f}{sizes[1]:13.1f}{shares[0]:16.3f}{sizes[2]:9.1f}{shares[1]:16.3f}",
                flush=True,
            )
    if arguments.json:
        out: dict[str, Any] = {"shape": vars(shape), "torch": torch.__version__, "bytes": figures}
        arguments.json.write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
