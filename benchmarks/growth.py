"""How the time of each compressor grows with visual tokens, rows and width: a table of slopes, and a figure.

    python benchmarks/growth.py [--json FILE] [--png FILE] [--quick] [--rounds N]

One size is doubled while the other two stay; at each point all compressors are timed in turn, and the fastest round
counts: what else the machine does only adds. A slope is that of a straight line through the upper half of the points,
both axes logarithmic: 1 is linear growth, 2 would be quadratic. Below them the lines are flat: a call costs something
however little there is to do. A ninth of the tokens is kept.
"""

import argparse
import json
import math
import platform
import sys
from functools import partial
from pathlib import Path
from typing import Any

# Not the script's folder, where selectors.py hides the standard library's module.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.selectors import KEEP, compressors
from benchmarks.shapes import Shape, view_of
from benchmarks.timing import side_by_side

AXES = {"visual": "visual tokens a row", "batch": "rows", "dim": "width of hidden states"}
OTHERS = {"visual": "{} tokens", "batch": "{} rows", "dim": "width {}"}
START = {"visual": 144, "batch": 1, "dim": 128}
FIXED = {"visual": 576, "batch": 4, "dim": 512}
HEAD = 64

# Chosen to be told apart without seeing red or green; each with a marker of its own.
STYLES = [("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#e69f00", "v"), ("#56b4e9", "P")]


def shapes(axis: str, doublings: int) -> list[tuple[int, Shape]]:
    """The sizes along one axis."""
    found = []
    for number in range(doublings + 1):
        sizes = FIXED | {axis: START[axis] * 2**number}
        found.append((sizes[axis], Shape(sizes["batch"], sizes["visual"], 40, sizes["dim"] // HEAD, HEAD)))
    return found


def slope(points: list[tuple[int, float]]) -> float:
    """Of the least-squares line through the logarithms of the upper half of the points."""
    upper = points[(len(points) - 1) // 2 :]
    xs, ys = ([math.log(value) for value in column] for column in zip(*upper, strict=True))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def measure(axis: str, *, doublings: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds and slope of each compressor along one axis."""
    points: dict[str, list[tuple[int, float]]] = {name: [] for name in compressors()}
    for size, shape in shapes(axis, doublings):
        view, keep = view_of(shape), round(shape.visual * KEEP)
        ways = {name: partial(each, view, keep) for name, each in compressors().items()}
        for name, timing in side_by_side(ways, rounds=rounds, warm_up=2).items():
            points[name].append((size, timing.smallest))
    return {name: {"slope": slope(found), "seconds": dict(found)} for name, found in points.items()}


def draw(figures: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """The figure: a panel an axis, a line a compressor, and what linear growth looks like."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(figures), figsize=(4.2 * len(figures), 4), sharey=True, layout="constrained"
    )
    for panel, (axis, found) in zip(panels, figures.items(), strict=True):
        for place, (name, row) in enumerate(found.items()):
            color, marker = STYLES[place % len(STYLES)]
            sizes, seconds = list(row["seconds"]), [1e3 * each for each in row["seconds"].values()]
            panel.plot(
                sizes, seconds, color=color, marker=marker, markersize=5, label=f"{name}, slope {row['slope']:.2f}"
            )
        slowest = max(found.values(), key=lambda row: max(row["seconds"].values()))["seconds"]
        sizes, top = list(slowest), 2e3 * max(slowest.values())
        panel.plot(
            sizes, [top * size / sizes[-1] for size in sizes], color="#999999", linestyle="--", label="linear growth"
        )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.set_xlabel(AXES[axis])
        rest = ", ".join(OTHERS[other].format(FIXED[other]) for other in AXES if other != axis)
        panel.set_title(rest, fontsize=9)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("milliseconds a call")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--png", type=Path, help="also draw them here; needs matplotlib (the extra `demo`)")
    parser.add_argument("--quick", action="store_true", help="small shapes, for a look")
    parser.add_argument("--rounds", type=int, default=15, help="times that each compressor is timed at each point")
    arguments = parser.parse_args()
    with torch.no_grad():
        figures = {axis: measure(axis, doublings=3 if arguments.quick else 6, rounds=arguments.rounds) for axis in AXES}
    print(f"slopes; fixed {FIXED}, float32, {torch.get_num_threads()} threads")
    print(f"{'':10}" + "".join(f"{AXES[axis]:>24}" for axis in figures))
    for name in compressors():
        print(f"{name:10}" + "".join(f"{found[name]['slope']:24.2f}" for found in figures.values()))
    if arguments.json:
        machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        out = {"fixed": FIXED, "machine": machine, "torch": torch.__version__, "growth": figures}
        arguments.json.write_text(json.dumps(out, indent=2) + "\n")
    if arguments.png:
        draw(figures, arguments.png)


if __name__ == "__main__":
    main()
