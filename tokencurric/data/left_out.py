"""The record of rows that were left out, which outlives a run."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokencurric.data.conversations import ConversationFile, Problem


def write_left_out(path: Path, file: ConversationFile, problems: Iterable[Problem]) -> None:
    """Add rows that were left out to a file, one JSON object per line.

    Args:
        path: the file, which need not exist.
        file: where the rows are from.
        problems: the rows, and why they were left out.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "skipped.jsonl"
        ...     write_left_out(path, ConversationFile(Path("talk.json"), None, ()), [Problem(3, "c", "no image")])
        ...     print(path.read_text().strip())
        {"row": 3, "id": "c", "file": "talk.json", "reason": "no image"}
    """
    lines = [
        json.dumps({"row": problem.index, "id": problem.id, "file": str(file.path), "reason": problem.reason}) + "\n"
        for problem in problems
    ]
    with path.open("ab") as record:
        text = "".join(lines).encode()
        if _torn(path):
            text = b"\n" + text
        record.write(text)  # in one piece, since several processes may append


def read_left_out(path: Path, file: ConversationFile) -> set[int]:
    """Numbers of the rows of a file that a record names.

    Args:
        path: the record, which need not exist. A line that a killed run left half-written is passed over.
        file: where the rows are from.

    Returns:
        Numbers of rows, as in `Problem.index`.

    Example:
        >>> read_left_out(Path("no-such.jsonl"), ConversationFile(Path("talk.json"), None, ()))
        set()
    """
    if not path.is_file():
        return set()
    found = set()
    for line in path.read_bytes().splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if isinstance(told, dict) and told.get("file") == str(file.path):
            found.add(told["row"])
    return found


def _torn(path: Path) -> bool:
    """Whether the last line of a file has no end."""
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as record:
        record.seek(-1, 2)
        return record.read(1) != b"\n"
