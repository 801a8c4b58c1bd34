"""Peak memory of the losses, forward and backward, beside the published code's way with full logits.

    python benchmarks/loss_memory.py [--json FILE] [--positions N]

Hidden states of student and teacher are given; what is measured begins at the output head and ends at the gradients of
hidden states and head. The meter adds up what torch's allocator gives and takes back (the profiler's memory events), so
it is exact and leaves out what the process holds besides. `loss_memory_vs_full` is to be read at 12% of positions
supervised, as in LLaVA's conversations about pictures, and at 100%.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

# Not the script's folder, where selectors.py hides the standard library's module.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.allocator import cpu_peak
from tokencurric import ConsistencyLoss
from tokencurric.losses import Taught, supervised_losses

WIDTH, VOCABULARY, WEIGHT = 512, 32_000, 0.7


def in_full(hidden: Tensor, taught: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """Logits of every position for both sides, in float32, then the losses where there is a label."""
    logits = head(hidden).float()
    with torch.no_grad():
        theirs = head(taught).float()
    counted = labels != -100
    sft = functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    student, teacher = logits[counted].log_softmax(-1), theirs[counted].log_softmax(-1)
    return (1 - WEIGHT) * sft + WEIGHT * functional.kl_div(student, teacher, log_target=True, reduction="sum")


def in_chunks(hidden: Tensor, taught: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """Ours."""
    counted = labels != -100
    side = Taught(taught[counted], head)
    sums = supervised_losses(hidden[counted], labels[counted], head, taught=side, loss=ConsistencyLoss())
    return (1 - WEIGHT) * sums.sft + WEIGHT * sums.consistency


def measure(positions: int, share: float) -> dict[str, float]:
    """Peaks of both ways at a share of positions supervised, which give the same loss and gradients."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    hidden, taught = torch.randn(2, positions, WIDTH)
    labels = torch.randint(VOCABULARY, (positions,))
    labels[torch.rand(positions) >= share] = -100
    found: dict[str, float] = {}
    gradients = []
    for name, way in (("full", in_full), ("ours", in_chunks)):

        def run(way: Callable[..., Tensor] = way) -> None:
            leaf = hidden.clone().requires_grad_()
            head.zero_grad()
            way(leaf, taught, head, labels).backward()
            gradients.append((leaf.grad, head.weight.grad))

        found[name] = cpu_peak(run)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    return {**found, "ratio": found["ours"] / found["full"]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument(
        "--positions", type=int, default=16 * 676, help="of all rows: 16, as LLaVA-1.5 gives a device, unless said"
    )
    arguments = parser.parse_args()
    print(f"{arguments.positions} positions of width {WIDTH}, vocabulary {VOCABULARY}, float32")
    figures = {f"{share:.0%}": measure(arguments.positions, share) for share in (0.12, 1.0)}
    for share, row in figures.items():
        sizes = f"ours {row['ours'] / 2**20:7.0f} MiB, full {row['full'] / 2**20:7.0f} MiB"
        print(f"loss_memory_vs_full at {share:>4} supervised: {row['ratio']:.3f}   ({sizes})")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"torch": torch.__version__, "loss_memory_vs_full": figures}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
