"""How costs grow with each size by itself: tables of slopes, and figures.

    python benchmarks/growth.py [selectors] [losses] [memory] [step] [--json FILE] [--png FOLDER] [--quick] [--rounds N]

`selectors` times every compressor over visual tokens, rows, prompt text and width; `losses` and `memory` are time and
peak memory of both losses from hidden states, over positions and vocabulary, beside full logits; `step` is a whole
training step over visual tokens, text, rows, layers and vocabulary, beside fine-tuning and two passes. All of them
unless some are named.

One size grows while the others stay; at each point all ways are timed in turn, and the fastest round counts: what else
the machine does only adds. A slope is that of a straight line through the upper half of the points, both axes
logarithmic: 1 is linear growth, 2 would be quadratic. Below them the lines are flat: a call costs something however
little there is to do. A ninth of the tokens is kept.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Not the script's folder, where selectors.py hides the standard library's module.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn

from benchmarks import shapes
from benchmarks.allocator import cpu_peak
from benchmarks.llava import Shape
from benchmarks.loss_memory import in_chunks, in_full
from benchmarks.selectors import KEEP, compressors
from benchmarks.timing import machine, side_by_side
from benchmarks.training_step import make_batch, make_model, steps_of
from tokencurric import EPIC, Random, tcd

Ways = Mapping[str, Callable[[], object]]
HEAD = 64  # width of an attention head

# Chosen to be told apart without seeing red or green; each with a marker of its own.
STYLES = [("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#e69f00", "v"), ("#56b4e9", "P")]


@dataclass(frozen=True)
class Suite:
    """What is measured.

    Args:
        axes: the sizes that grow, one at a time. fixed: what each is while another grows.
        ways: to compute the same or the like, at given sizes. unit: of the figure, with what measures are multiplied.
        cost: of the ways; None times them.
    """

    axes: Mapping[str, tuple[int, ...]]
    fixed: Mapping[str, int]
    ways: Callable[[Mapping[str, int]], Ways]
    unit: tuple[str, float] = ("milliseconds", 1e3)
    cost: Callable[[Callable[[], object]], float] | None = None

    def points(self, axis: str, *, quick: bool = False) -> list[dict[str, int]]:
        """All sizes at each point of an axis."""
        return [{**self.fixed, axis: size} for size in self.axes[axis][: 3 if quick else None]]


def selecting(sizes: Mapping[str, int]) -> Ways:
    """Every compressor on a random view."""
    shape = shapes.Shape(sizes["rows"], sizes["visual tokens"], sizes["prompt tokens"], sizes["width"] // HEAD, HEAD)
    view, keep = shapes.view_of(shape), round(shape.visual * KEEP)
    return {name: partial(each, view, keep) for name, each in compressors().items()}


def losing(sizes: Mapping[str, int]) -> Ways:
    """Both losses and their gradients, at positions of which each is supervised."""
    torch.manual_seed(0)
    positions, width, vocabulary = sizes["positions"], sizes["width"], sizes["vocabulary"]
    head, labels = nn.Linear(width, vocabulary, bias=False), torch.randint(vocabulary, (positions,))
    hidden, taught = torch.randn(2, positions, width)

    def run(way: Callable[..., torch.Tensor]) -> None:
        head.zero_grad()
        way(hidden.clone().requires_grad_(), taught, head, labels).backward()

    return {"in chunks": partial(run, in_chunks), "full logits": partial(run, in_full)}


def stepping(sizes: Mapping[str, int]) -> Ways:
    """A training step from the middle of TCD."""
    width = 256
    shape = Shape(
        layers=sizes["layers"], width=width, heads=4, inner=688, vocabulary=sizes["vocabulary"], tower_layers=1,
        tower_width=128, tower_heads=2, side=math.isqrt(sizes["visual tokens"]), text=sizes["text tokens"],
        supervised=sizes["text tokens"] * 4 // 5, batch=sizes["rows"],
    )  # fmt: skip
    steps = steps_of(make_model(shape), make_batch(shape), EPIC(Random(), tcd()), 1, 2)
    return {"EPIC": steps["ours"], "fine-tuning": steps["sft"], "two passes": steps["two_pass"]}


LOSSES = {"positions": (256, 512, 1024, 2048, 4096), "vocabulary": (2000, 4000, 8000, 16000, 32000, 64000)}
SUITES = {
    "selectors": Suite(
        {
            "visual tokens": (144, 288, 576, 1152, 2304, 4608, 9216),
            "rows": (1, 2, 4, 8, 16, 32, 64),
            "prompt tokens": (10, 20, 40, 80, 160, 320, 640, 1280, 2560),
            "width": (128, 256, 512, 1024, 2048, 4096, 8192),
        },
        {"visual tokens": 576, "rows": 4, "prompt tokens": 40, "width": 512},
        selecting,
    ),
    "losses": Suite(LOSSES, {"positions": 1024, "vocabulary": 16000, "width": 256}, losing),
    "memory": Suite(
        LOSSES, {"positions": 1024, "vocabulary": 16000, "width": 256}, losing, ("MiB", 2.0**-20), cpu_peak
    ),
    "step": Suite(
        {
            "visual tokens": (64, 144, 256, 576, 1024),
            "text tokens": (40, 80, 160, 320, 640),
            "rows": (1, 2, 4, 8, 16),
            "layers": (4, 8, 16, 32),
            "vocabulary": (1000, 4000, 16000, 64000),
        },
        {"visual tokens": 144, "text tokens": 40, "rows": 2, "layers": 4, "vocabulary": 2000},
        stepping,
    ),
}


def slope(points: list[tuple[int, float]]) -> float:
    """Of the least-squares line through the logarithms of the upper half of the points."""
    upper = points[(len(points) - 1) // 2 :]
    xs, ys = ([math.log(value) for value in column] for column in zip(*upper, strict=True))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def measure(suite: Suite, axis: str, *, rounds: int, quick: bool = False) -> dict[str, dict[str, Any]]:
    """Cost and slope of each way along one axis."""
    points: dict[str, list[tuple[int, float]]] = {}
    for sizes in suite.points(axis, quick=quick):
        ways = suite.ways(sizes)
        if suite.cost is not None:
            costs = {name: suite.cost(way) for name, way in ways.items()}
        else:
            costs = {name: timing.smallest for name, timing in side_by_side(ways, rounds=rounds, warm_up=2).items()}
        for name, cost in costs.items():
            points.setdefault(name, []).append((sizes[axis], cost))
    return {name: {"slope": slope(found), "cost": dict(found)} for name, found in points.items()}


def draw(suite: Suite, figures: Mapping[str, Mapping[str, dict[str, Any]]], path: Path) -> None:
    """A panel an axis, a line a way, and what linear growth looks like."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    unit, scale = suite.unit
    figure, panels = pyplot.subplots(
        1, len(figures), figsize=(4.2 * len(figures), 4), sharey=True, layout="constrained", squeeze=False
    )
    for panel, (axis, found) in zip(panels[0], figures.items(), strict=True):
        for place, (name, row) in enumerate(found.items()):
            color, marker = STYLES[place % len(STYLES)]
            sizes, costs = list(row["cost"]), [scale * each for each in row["cost"].values()]
            label = f"{name}, slope {row['slope']:.2f}"
            panel.plot(sizes, costs, color=color, marker=marker, markersize=5, label=label)
        top = 2 * scale * max(max(row["cost"].values()) for row in found.values())
        panel.plot(
            sizes, [top * size / sizes[-1] for size in sizes], color="#999999", linestyle="--", label="linear growth"
        )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.set_xlabel(axis)
        rest = ", ".join(f"{size} {name}" for name, size in suite.fixed.items() if name != axis)
        panel.set_title(rest, fontsize=8)
        panel.legend(fontsize=8)
    panels[0][0].set_ylabel(unit)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(SUITES)}; all unless said")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--png", type=Path, help="also draw them into this folder; needs matplotlib (extra `demo`)")
    parser.add_argument("--quick", action="store_true", help="the three smallest of each size, for a look")
    parser.add_argument("--rounds", type=int, default=7, help="times that each way is timed at each point")
    arguments = parser.parse_args()
    if unknown := set(arguments.what) - SUITES.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    out: dict[str, Any] = {"machine": machine(), "torch": torch.__version__}
    for name in arguments.what or SUITES:
        suite = SUITES[name]
        figures = {axis: measure(suite, axis, rounds=arguments.rounds, quick=arguments.quick) for axis in suite.axes}
        print(f"\n{name}: slopes; else {dict(suite.fixed)}, float32, {torch.get_num_threads()} threads")
        print(f"{'':12}" + "".join(f"{axis:>16}" for axis in figures))
        for way in next(iter(figures.values())):
            print(f"{way:12}" + "".join(f"{found[way]['slope']:16.2f}" for found in figures.values()), flush=True)
        out[name] = {"unit": "bytes" if suite.cost else "seconds", "fixed": dict(suite.fixed), "growth": figures}
        if arguments.png:
            arguments.png.mkdir(parents=True, exist_ok=True)
            draw(suite, figures, arguments.png / f"growth_{name}.png")
    if arguments.json:
        arguments.json.write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
