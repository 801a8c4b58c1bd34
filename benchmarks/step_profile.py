"""Where the time of a training step goes, by kind of operation, beside how many operations there are.

    python benchmarks/step_profile.py [--curriculum tcd|lcd] [--progress P] [--rounds N] [--json FILE] [--quick]

`training_step.py` compares times with a closed form of operations. Both agree only where every operation takes equally
long; this looks at one stage of a curriculum and says how long each kind takes, in each way to make the step. Seconds
are those of torch's profiler on the calling thread; operations are counted while they run, so attention's backward,
which computes the weights again, counts two and a half forwards.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Not the script's folder, where selectors.py hides the standard library's module.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.llava import of_width
from benchmarks.timing import machine
from benchmarks.training_step import QUICK, costs, make_batch, make_model, steps_of
from tokencurric import EPIC, Random, lcd, tcd

KINDS = ("products", "attention", "the rest")


def kind_of(operation: str) -> str:
    """Which of the kinds an operation is of."""
    name = operation.removeprefix("aten::").removeprefix("aten.")
    if "scaled_dot_product" in name:
        return "attention"
    return "products" if name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "_convolution") else "the rest"


def attended(query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Operations of attention, for torch's counter."""
    batch, heads, n, width = query
    return 4 * batch * heads * n * key[2] * width


def attended_backward(grad: tuple[int, ...], query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Operations of its backward: of five products one makes the scores again."""
    return attended(query, key) * 5 // 2


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attended,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attended_backward,
}


def count(run: Callable[[], object]) -> dict[str, float]:
    """Operations of each kind."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        run()
    found = dict.fromkeys(KINDS, 0.0)
    for operation, number in counter.get_flop_counts()["Global"].items():
        found[kind_of(str(operation))] += number
    return found


def clock(ways: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each kind in each way, medians of the rounds, in which all ways take turns."""
    seconds: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                run()
            found = dict.fromkeys(KINDS, 0.0)
            for event in seen.key_averages():
                found[kind_of(event.key)] += event.self_cpu_time_total / 1e6
            for kind, value in found.items():
                seconds[name][kind].append(value)
    return {name: {kind: statistics.median(each) for kind, each in kinds.items()} for name, kinds in seconds.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--curriculum", choices=("tcd", "lcd"), default="lcd")
    parser.add_argument("--progress", type=float, default=0.5, help="of the training, 0 to 1")
    parser.add_argument("--width", type=int, default=512, help="of the decoder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small shape, for a look")
    arguments = parser.parse_args()
    shape = QUICK if arguments.quick else of_width(arguments.width)
    model, batch = make_model(shape), make_batch(shape)
    objective = EPIC(Random(), {"tcd": tcd, "lcd": lcd}[arguments.curriculum]())
    step, total = round(1000 * arguments.progress), 1000
    stage = objective.curriculum.at(step, total, seed=0, layers=shape.layers)
    ways = steps_of(model, batch, objective, step, total)
    expected = costs(shape, stage)
    print(f"{arguments.curriculum}, layer {stage.layer}, removed {stage.student:.0%} and {stage.teacher:.0%}; {shape}")
    print(f"{'':9}" + "".join(f"{kind:>30}" for kind in KINDS) + f"{'operations':>16}{'closed form':>13}")
    counted = {name: count(run) for name, run in ways.items()}
    clocked = clock(ways, rounds=arguments.rounds)
    figures = {}
    for name in ways:
        operations, seconds = counted[name], clocked[name]
        figures[name] = {"operations": operations, "closed_form": expected[name], "seconds": seconds}
        cells = (
            f"{seconds[kind]:7.3f} s"
            + (f", {operations[kind] / seconds[kind] / 1e9:4.0f} GFLOP/s" if operations[kind] else "")
            for kind in KINDS
        )
        totals = f"{sum(operations.values()) / 1e9:10.1f} GFLOP{expected[name] / 1e9:7.1f} GFLOP"
        print(f"{name:9}" + "".join(f"{cell:>30}" for cell in cells) + totals, flush=True)
    whole = {name: sum(found["seconds"].values()) for name, found in figures.items()}
    for other in ("sft", "two_pass"):
        part = ", ".join(
            f"{kind} {(figures['ours']['seconds'][kind] - figures[other]['seconds'][kind]) / whole[other]:+.3f}"
            for kind in KINDS
        )
        form = expected["ours"] / expected[other]
        print(
            f"ours over {other}: {whole['ours'] / whole[other]:.3f} of the time ({part}), {form:.3f} of the operations"
        )
    if arguments.json:
        settings = {"curriculum": arguments.curriculum, "progress": arguments.progress, "width": arguments.width}
        out = {**settings, "machine": machine(), "torch": torch.__version__, "ways": figures}
        arguments.json.write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
