"""Figures of a run, from its plain results and metrics."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokencurric.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One color a stage in every figure; chosen to be told apart without seeing red or green.
COLORS = {"base": "#7f7f7f", "sft": "#0072b2", "direct": "#d55e00", "epic": "#009e73"}
MARKERS = {"base": "o", "sft": "s", "direct": "^", "epic": "D"}
STAGES = {
    "base": "base model",
    "sft": "fine-tuned without compression",
    "direct": "trained at the highest ratio at once",
    "epic": "EPIC",
}
_DISPLAY = {"random": "Random", "uniform": "Uniform", "fastv": "FastV", "dart": "DART"}


def display(name: str) -> str:
    """A compressor's name as papers write it.

    Example:
        >>> display("fastv"), display("mine")
        ('FastV', 'mine')
    """
    return _DISPLAY.get(name, name)


def compressors_of(results: Mapping[str, Any]) -> list[str]:
    """Names of the compressors that were evaluated, in the order of the results.

    Example:
        >>> compressors_of({"accuracy": {"base": {"fastv": {"16": 0.5}, "blind": 0.2}}})
        ['fastv']
    """
    tables = results["accuracy"].values()
    return list(dict.fromkeys(name for table in tables for name in table if name != "blind"))


def plot_accuracy(results: Mapping[str, Any]) -> "Figure":
    """Accuracy against kept tokens, a panel a compressor, a line a stage, bars of one standard error."""
    names = compressors_of(results)
    figure, panels = _figure(len(names), 3.3, 3.6, share=True)
    for panel, name in zip(panels, names, strict=True):
        stages = results["accuracy"]
        for place, (stage, table) in enumerate(stages.items()):
            kept = sorted(table[name], key=int)
            beside = 2 ** (0.05 * (place - (len(stages) - 1) / 2))  # so that no error bar hides another
            errors = [100 * results["stderr"][stage][name][count] for count in kept]
            panel.errorbar(
                [int(count) * beside for count in kept],
                [100 * table[name][count] for count in kept],
                yerr=errors,
                color=COLORS.get(stage),
                marker=MARKERS.get(stage, "o"),
                markersize=5,
                capsize=2,
                linewidth=1.6,
                linestyle="--" if stage == "base" else "-",
                zorder=4 if stage == "base" else 3,
                label=STAGES.get(stage, stage),
            )
        blind = results["accuracy"]["base"].get("blind") if "base" in results["accuracy"] else None
        if blind is not None:
            panel.axhline(100 * blind, color="#bbbbbb", linestyle=":", label="base model, blind")
        counts = sorted({int(count) for table in results["accuracy"].values() for count in table[name]})
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.minorticks_off()
        trained = " (trained with)" if name == results.get("trained_with") else ""
        panel.set_title(display(name) + trained, fontsize=11)
        panel.set_xlabel("visual tokens kept")
    panels[0].set_ylabel("right answers, %")
    _legend_below(figure, panels[0])
    return figure


def plot_losses(metrics: Sequence[Mapping[str, Any]]) -> "Figure":
    """Cross-entropy of each stage over its steps, and the consistency loss where there is a teacher."""
    figure, panels = _figure(2, 4.8, 3.4)
    for stage, lines in _by_stage(metrics).items():
        for panel, key in zip(panels, ("sft_loss", "consistency_loss"), strict=True):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if not points or (key == "consistency_loss" and not any(value for _, value in points)):
                continue
            steps, values = zip(*points, strict=True)
            panel.plot(steps, values, color=COLORS.get(stage), linewidth=0.7, alpha=0.35)
            smooth = _smoothed(values)
            panel.plot(steps, smooth, color=COLORS.get(stage), linewidth=1.8, label=STAGES.get(stage, stage))
    for panel, title in zip(panels, ("cross-entropy of the student", "consistency loss"), strict=True):
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("optimizer step")
        panel.set_ylabel("nats a supervised token")
        panel.set_ylim(bottom=0)
        panel.locator_params(axis="x", integer=True)
    _legend_below(figure, panels[0])
    return figure


def plot_schedule(metrics: Sequence[Mapping[str, Any]], stage: str = "epic") -> "Figure":
    """What the curriculum did: kept tokens of student and teacher, margin, layer."""
    lines = [line for line in _by_stage(metrics).get(stage, []) if "student_ratio" in line]
    figure, panels = _figure(3, 3.4, 3.2)
    steps = [line["step"] for line in lines]
    teacher = [100 * line["teacher_ratio"] for line in lines]
    student = [100 * line["student_ratio"] for line in lines]
    panels[0].plot(steps, teacher, ".", color="#e69f00", markersize=5, label="teacher")
    panels[0].plot(steps, student, ".", color=COLORS["epic"], markersize=5, label="student")
    panels[0].set_ylim(0, 100)
    _titled(panels[0], "visual tokens removed", "%")
    panels[1].plot(steps, [100 * line["margin"] for line in lines], color=COLORS["epic"])
    panels[1].set_ylim(bottom=0)
    _titled(panels[1], "margin Δ", "percentage points")
    panels[2].plot(steps, [line["layer"] for line in lines], color=COLORS["epic"], drawstyle="steps-post")
    panels[2].set_ylim(0, 1.15 * max((line["layer"] for line in lines), default=1))
    panels[2].locator_params(axis="y", integer=True)
    _titled(panels[2], "first compressed layer", "layer")
    _legend_below(figure, panels[0])
    return figure


def plot_efficiency(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """True savings as shares of the uncompressed run: FLOPs, cache, prefill."""
    figure, (panel,) = _figure(1, 6.4, 3.4)
    whole = max(rows, key=lambda row: row["kept"])
    shares = {
        "decoder FLOPs": [row["flops_decoder"] / whole["flops_decoder"] for row in rows],
        "cache bytes": [row["kv_bytes"] / whole["kv_bytes"] for row in rows],
        "prefill time": [row["timing"]["prefill"] / whole["timing"]["prefill"] for row in rows],
    }
    width = 0.26
    for place, (label, values) in enumerate(shares.items()):
        bars = panel.bar(
            [number + (place - 1) * width for number in range(len(rows))],
            [100 * value for value in values],
            width * 0.92,
            label=label,
            color=("#0072b2", "#56b4e9", "#cc79a7")[place],
        )
        panel.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    panel.set_xticks(range(len(rows)), [str(row["kept"]) for row in rows])
    panel.set_xlabel("visual tokens kept")
    panel.set_ylabel("% of the uncompressed run")
    panel.margins(y=0.12)
    _legend_below(figure, panel)
    return figure


def save_figures(
    results: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    failed: dict[str, str] | None = None,
) -> list[Path]:
    """Draw what there is data for, and write it as PNG.

    Args:
        results: contents of `results.json`.
        metrics: lines of `metrics.jsonl`.
        folder: folder to write to.
        failed: if given, a figure that cannot be drawn is entered here with the reason, and the others are drawn.

    Returns:
        The files written.

    Raises:
        MissingDependencyError: matplotlib is not installed.

    Example:
        >>> save_figures(results, metrics, Path("runs/llava_epic"))  # doctest: +SKIP
        [PosixPath('runs/llava_epic/accuracy.png'), ...]
    """
    figures: dict[str, Callable[[], Figure]] = {}
    if results.get("accuracy"):
        figures["accuracy"] = lambda: plot_accuracy(results)
    if metrics:
        figures["losses"] = lambda: plot_losses(metrics)
        if any(line.get("stage") == "epic" for line in metrics):
            figures["schedule"] = lambda: plot_schedule(metrics)
    if results.get("efficiency"):
        figures["efficiency"] = lambda: plot_efficiency(results["efficiency"])
    written = []
    for name, draw in figures.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)  # one of an earlier run would be taken for this one's
        try:
            draw().savefig(path, dpi=130, bbox_inches="tight")
        except MissingDependencyError:
            raise
        except Exception as error:
            if failed is None:
                raise
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        written.append(path)
    return written


def _figure(columns: int, width: float, height: float, *, share: bool = False) -> "tuple[Figure, list[Axes]]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"Plots need matplotlib; importing it failed with: {error}. It draws the figures of a report. "
            "Install tokencurric[demo]."
        ) from error
    # Without pyplot: no window, no backend, nothing kept in memory.
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    panels = list(figure.subplots(1, columns, squeeze=False, sharey=share)[0])
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _titled(panel: "Axes", title: str, unit: str) -> None:
    panel.set_title(title, fontsize=11)
    panel.set_xlabel("optimizer step")
    panel.set_ylabel(unit)
    panel.locator_params(axis="x", integer=True)


def _legend_below(figure: "Figure", panel: "Axes") -> None:
    handles, labels = panel.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)


def _by_stage(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for line in metrics:
        stages.setdefault(line["stage"], []).append(line)
    return {name: stages[name] for name in sorted(stages, key=lambda name: (*STAGES, name).index(name))}


def _smoothed(values: Sequence[float], *, share: float = 0.08) -> list[float]:
    """Means over a window of a share of the run, shorter at its ends."""
    half = max(1, round(len(values) * share / 2))
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
