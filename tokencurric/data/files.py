"""Rows as a file has them: JSON, JSON lines, both also compressed, and Parquet."""

import gzip
import json
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from tokencurric.errors import DataError, MissingDependencyError

LINES = (".jsonl", ".ndjson")
_AT_ONCE = 256  # rows of a table


class BrokenLine(Exception):
    """A line that is no row; it can be skipped."""


def raw_rows(path: Path) -> Iterator[Any]:
    r"""Rows as a file has them; a broken line comes as a `BrokenLine`.

    Args:
        path: `.jsonl` and `.ndjson` hold one row per line, `.parquet` is a table, anything else is a JSON list. All but
            tables may be compressed (`.gz`).

    Returns:
        An iterator of rows.

    Raises:
        DataError: the file cannot be read, or is cut short.
        MissingDependencyError: a table is to be read, and pyarrow is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "talk.jsonl"
        ...     _ = path.write_text('{"id": 1}\n{"id": 2}\n')
        ...     list(raw_rows(path))
        [{'id': 1}, {'id': 2}]
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".parquet"]:
        yield from _table(path)
        return
    packed = suffixes[-1:] == [".gz"]
    kind = suffixes[-2:-1] if packed else suffixes[-1:]
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            if kind and kind[0] in LINES:
                yield from _lines(file)
            else:
                yield from _list(file, path)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        advice = "Check the path, and that the file is whole."
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            advice = "If it holds one row per line, name it .jsonl."
        raise DataError(
            f"read_conversations needs a readable JSON file; got path={str(path)!r}. Reading it failed: "
            f"{error}. {advice}"
        ) from error


def _list(file: BufferedIOBase, path: Path) -> Iterator[Any]:
    found = json.loads(file.read().decode("utf-8-sig"))
    if not isinstance(found, list):
        raise DataError(
            f"read_conversations needs a JSON list of rows; got {type(found).__name__} in {str(path)!r}. "
            "Rows hold turns of human and gpt. Wrap the rows in a list, or name the file .jsonl."
        )
    yield from found


def _lines(file: BufferedIOBase) -> Iterator[Any]:
    for number, line in enumerate(file):
        try:
            text = line.decode("utf-8-sig" if number == 0 else "utf-8").strip()
            row = json.loads(text) if text else None
        except (ValueError, RecursionError) as error:
            yield BrokenLine(str(error))
            continue
        if text:
            yield row


def _table(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"reading {str(path)!r} needs pyarrow, which is not installed.\n"
            "Hint: install it with `pip install pyarrow`, or write the rows as .jsonl."
        ) from error
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=_AT_ONCE):
                yield from batch.to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"the Parquet file {str(path)!r} cannot be read: {error}.\nHint: check that the file is whole."
        ) from error
