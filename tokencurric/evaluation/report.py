"""The report of a run: one HTML file that needs nothing beside it. `python -m tokencurric.evaluation.report RUN`."""

import argparse
import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tokencurric.checkpoints import write_whole
from tokencurric.errors import DataError
from tokencurric.evaluation.plots import STAGES, compressors_of, display, save_figures

_STYLE = """
body { font: 15px/1.55 system-ui, sans-serif; color: #222; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
img { max-width: 100%; display: block; margin: .6rem auto }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .22rem .75rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888; font-weight: 600 }
.error, .note { color: #666; font-size: .88em } .sure { font-weight: 600 }
pre, code { background: #f5f5f5; border-radius: 3px; padding: .1rem .25rem } pre { padding: .6rem; overflow-x: auto }
.wide { overflow-x: auto }
"""


def read_run(folder: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results and metrics of a run folder.

    Args:
        folder: with `results.json`, and `metrics.jsonl` if anything was trained.

    Raises:
        DataError: a file is missing or broken.

    Example:
        >>> results, metrics = read_run("runs/llava_epic")  # doctest: +SKIP
    """
    folder = Path(folder)
    try:
        results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        lines = folder / "metrics.jsonl"
        written = lines.read_text(encoding="utf-8").splitlines() if lines.is_file() else []
        return results, [json.loads(line) for line in written if line]
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(
            f"A report needs a run's results.json and metrics.jsonl; got folder={str(folder)!r}. Reading failed: "
            f"{error}. Name the output folder of a run."
        ) from error


def write_report(folder: str | Path) -> Path:
    """Draw the figures of a run and write `report.html` with all of them in it; one that fails is a line there.

    Args:
        folder: with `results.json` and `metrics.jsonl`, and `kept.png` if pictures with kept patches were drawn.

    Returns:
        The path of the report.

    Raises:
        DataError: a file is missing or broken. MissingDependencyError: matplotlib is not installed.

    Example:
        >>> write_report("runs/llava_epic")  # doctest: +SKIP
        PosixPath('runs/llava_epic/report.html')
    """
    folder = Path(folder)
    results, metrics = read_run(folder)
    failed: dict[str, str] = {}
    save_figures(results, metrics, folder, failed=failed)
    notes = [f"The figure {name} could not be drawn: {reason}" for name, reason in failed.items()]
    path = folder / "report.html"
    write_whole(path, _page({**results, "notes": [*results.get("notes", []), *notes]}, folder))
    return path


def accuracy_rows(results: Mapping[str, Any], compressor: str) -> list[list[str]]:
    """Accuracy in percent by stage (rows) and kept count (columns), the stage and blind first; a header comes first.

    Example:
        >>> results = {"accuracy": {"base": {"fastv": {"16": 0.5}, "blind": 0.25}},
        ...            "stderr": {"base": {"fastv": {"16": 0.01}, "blind": 0.01}}}
        >>> accuracy_rows(results, "fastv")
        [['stage', '16', 'blind'], ['base', '50.0 ± 1.0', '25.0 ± 1.0']]
    """
    accuracy, errors = results["accuracy"], results["stderr"]
    counts = sorted({kept for table in accuracy.values() for kept in table[compressor]}, key=int, reverse=True)

    def cell(share: float | None, error: float | None) -> str:
        return "" if share is None or error is None else f"{100 * share:.1f} ± {100 * error:.1f}"

    rows = [["stage", *counts, "blind"]]
    for stage, table in accuracy.items():
        cells = [cell(table[compressor].get(kept), errors[stage][compressor].get(kept)) for kept in counts]
        rows.append([stage, *cells, cell(table.get("blind"), errors[stage].get("blind"))])
    return rows


def _page(results: Mapping[str, Any], folder: Path) -> str:
    parts = ["<h1>Visual-token compression: what training bought</h1>", _summary(results), _notes(results)]
    if results.get("accuracy"):
        parts += ["<h2>Accuracy against kept tokens</h2>", _image(folder, "accuracy")]
        parts += [_accuracy_table(results), _differences(results)]
    parts += _section(folder, "Loss", "losses", "Thin: as logged. Thick: mean over a window of 8% of the run.")
    parts += _section(folder, "Curriculum", "schedule", "One dot a logged step. The teacher loses fewer tokens.")
    parts += _section(folder, "What is kept", "kept", "Dark patches are gone from the compressing layer on.")
    if results.get("efficiency"):
        parts += ["<h2>Efficiency</h2>", _image(folder, "efficiency"), _efficiency_table(results["efficiency"])]
    parts += ["<h2>Settings</h2>", f"<pre>{escape(json.dumps(results.get('settings', {}), indent=2))}</pre>"]
    body = "\n".join(part for part in parts if part)
    head = f'<meta charset="utf-8"><title>tokencurric report</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _summary(results: Mapping[str, Any]) -> str:
    facts = {
        "Trained with": display(str(results.get("trained_with", ""))),
        "curriculum": results.get("curriculum"),
        "optimizer steps": results.get("steps"),
        "compressing layer at evaluation": results.get("layer"),
        "questions": results.get("questions"),
        "seed": results.get("seed"),
        "wall time": f"{results['wall_time']['total']:.0f} s" if results.get("wall_time", {}).get("total") else None,
    }
    told = ", ".join(f"{escape(name)} <b>{escape(str(value))}</b>" for name, value in facts.items() if value)
    return f"<p>{told}.</p>"


def _notes(results: Mapping[str, Any]) -> str:
    said = [f"<p class=note>{escape(note)}</p>" for note in results.get("notes", [])]
    return "\n".join(said)


def _accuracy_table(results: Mapping[str, Any]) -> str:
    tables = []
    for name in compressors_of(results):
        header, *rows = accuracy_rows(results, name)
        rows = [[STAGES.get(row[0], row[0]), *row[1:]] for row in rows]
        tables.append(f"<h3>{escape(display(name))}</h3>" + _table([f"{header[0]}, % right", *header[1:]], rows))
    return f"<details><summary>All numbers, ± one standard error</summary>{''.join(tables)}</details>"


def _differences(results: Mapping[str, Any]) -> str:
    paired = results.get("paired", {})
    name = results.get("trained_with")
    if not any(name in table for table in paired.values()):
        return ""
    counts = sorted({kept for table in paired.values() for kept in table.get(name, {})}, key=int, reverse=True)
    rows = []
    for pair, table in paired.items():
        row = [pair.replace("-", " − ")]
        for kept in counts:
            found = table.get(name, {}).get(kept)
            text = "" if found is None else f"{100 * found['difference']:+.1f} ± {100 * found['stderr']:.1f}"
            sure = found is not None and abs(found["difference"]) > 2 * found["stderr"]
            row.append(f"<span class=sure>{text}</span>" if sure else text)
        rows.append(row)
    recovered = results.get("recovered", {}).get(name, {})
    shares = [f"{100 * recovered[kept]:.0f}%" if recovered.get(kept) is not None else "" for kept in counts]
    rows.append(["share of the base's loss won back", *shares])
    caption = (
        f"<p>Differences in percentage points on the same questions with {escape(display(str(name)))}, ± one paired "
        "standard error; bold where larger than two.</p>"
    )
    return caption + _table(["difference", *counts], rows, markup=True)


def _efficiency_table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["kept", "a layer", "layer average", "decoder MFLOPs", "whole MFLOPs", "KV kB", "KV kB, paper-style"]
    header += ["prefill ms", "decode ms a token"]
    measured = all(row.get("peak_memory") for row in rows)
    header += ["peak MB"] if measured else []
    cells = [
        [
            f"{row['kept']}",
            _runs(row["tokens"]),
            f"{row['layer_average']:.1f}",
            f"{row['flops_decoder'] / 1e6:.1f}",
            f"{row['flops_total'] / 1e6:.1f}",
            f"{row['kv_bytes'] / 1e3:.1f}",
            f"{row['paper_kv_bytes'] / 1e3:.1f}",
            f"{1e3 * row['timing']['prefill']:.1f}",
            f"{1e3 * row['timing']['decode']:.1f}",
            *([f"{row['peak_memory'] / 1e6:.1f}"] if measured else []),
        ]
        for row in rows
    ]
    note = (
        f"<p class=note>All {rows[0]['batch']} prompts of a batch together. FLOPs, KV bytes and times are true ones: "
        "layers below the compressing one run on all tokens and cache them, and text counts. Paper-style KV counts "
        "visual tokens alone, as if they were dropped in every layer. FLOPs: closed form, without the choice of "
        "tokens; the times include it.</p>"
    )
    return f"<div class=wide>{_table(header, cells)}</div>{note}"


def _runs(counts: Sequence[int]) -> str:
    """Equal neighbours together: 144 ×2, 16 ×4."""
    runs: list[list[int]] = []
    for count in counts:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    return ", ".join(f"{count} ×{times}" for count, times in runs)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, markup: bool = False) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell if markup else escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>"


def _section(folder: Path, title: str, name: str, note: str) -> list[str]:
    image = _image(folder, name)
    return [f"<h2>{title}</h2>", image, f"<p class=note>{note}</p>"] if image else []


def _image(folder: Path, name: str) -> str:
    path = folder / f"{name}.png"
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{name}" src="data:image/png;base64,{data}">'


def main() -> None:
    """Rebuild the report of a run folder."""
    parser = argparse.ArgumentParser(description="Rebuild report.html and its figures from a run's files.")
    parser.add_argument("folder", type=Path, help="with results.json and metrics.jsonl")
    print(write_report(parser.parse_args().folder))  # noqa: T201  (what a command says)


if __name__ == "__main__":
    main()
