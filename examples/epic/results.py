"""What a run found, as plain data: every answer's outcome, and the tables that follow from them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencurric.checkpoints import write_whole
from tokencurric.errors import DataError
from tokencurric.evaluation import Answers, binomial_error, paired_difference, recovered_share

# stage -> compressor -> kept count -> outcomes in the order of the questions, "1" for a right answer.
# The compressor "blind" has the single count "0".
Outcomes = dict[str, dict[str, dict[str, str]]]
Table = dict[str, Any]


def encode(table: Mapping[tuple[str, int], Answers]) -> dict[str, dict[str, str]]:
    """The outcomes of one stage as text."""
    found: dict[str, dict[str, str]] = {}
    for (name, keep), answers in table.items():
        found.setdefault(name, {})[str(keep)] = "".join(str(int(right)) for right in answers.correct.tolist())
    return found


def decode(text: str) -> Tensor:
    """Outcomes as truth values."""
    return torch.tensor([letter == "1" for letter in text])


def tabulate(outcomes: Outcomes, kinds: list[str]) -> dict[str, Table]:
    """Accuracy, standard errors, accuracy by kind of question, paired differences and what was won back.

    Args:
        outcomes: of all stages. kinds: of each question.
    """
    tables: dict[str, Table] = {"accuracy": {}, "stderr": {}, "accuracy_by_kind": {}, "paired": {}, "recovered": {}}
    for stage, by_name in outcomes.items():
        right = {name: {kept: decode(text) for kept, text in texts.items()} for name, texts in by_name.items()}
        for title, of in (("accuracy", _share), ("stderr", binomial_error)):
            cells: Table = {name: {kept: of(each) for kept, each in row.items()} for name, row in right.items()}
            cells["blind"] = cells["blind"]["0"]
            tables[title][stage] = cells
        tables["accuracy_by_kind"][stage] = {
            name: {kept: _by_kind(each, kinds) for kept, each in row.items()} for name, row in right.items()
        }
    for before in ("base", "sft", "direct"):
        if "epic" in outcomes and before in outcomes:
            tables["paired"][f"epic-{before}"] = _differences(outcomes["epic"], outcomes[before])
    if {"base", "epic"} <= set(outcomes):
        tables["recovered"] = _recovered(tables["accuracy"])
    return tables


def _share(right: Tensor) -> float:
    return right.double().mean().item()


def _by_kind(right: Tensor, kinds: list[str]) -> dict[str, float]:
    return {kind: _share(right[torch.tensor([each == kind for each in kinds])]) for kind in sorted(set(kinds))}


def _differences(after: dict[str, dict[str, str]], before: dict[str, dict[str, str]]) -> Table:
    table: Table = {}
    for name, texts in after.items():
        for kept, text in texts.items():
            found = paired_difference(decode(text), decode(before[name][kept]))
            table.setdefault(name, {})[kept] = {"difference": found.mean, "stderr": found.error}
    return table


def _recovered(accuracy: Table) -> Table:
    """(epic − base)/(base at full − base) at each count below full."""
    table: Table = {}
    for name, cells in accuracy["base"].items():
        if name == "blind":
            continue
        full, *fewer = sorted(cells, key=int, reverse=True)
        table[name] = {kept: recovered_share(cells[full], cells[kept], accuracy["epic"][name][kept]) for kept in fewer}
    return table


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no file.

    Raises:
        DataError: the file is no JSON; the text names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}. Hint: restore it, or begin in another folder.") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write whole or not at all, so that an interrupted run can be resumed."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line. A last line without an end was being written when a run was killed.

    Raises:
        DataError: a finished line is no JSON; the text names it.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    *lines, _ = text.split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}, line {number}, cannot be read: {error}. Hint: correct or delete it.") from error
    return found


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Replace the file by these objects, whole or not at all."""
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def replace_stages(path: Path, lines: list[dict[str, Any]]) -> None:
    """Put lines of metrics into a file, in place of what it has of the same stages."""
    stages = {line["stage"] for line in lines}
    write_lines(path, [line for line in read_lines(path) if line["stage"] not in stages] + lines)
