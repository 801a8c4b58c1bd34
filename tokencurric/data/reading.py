"""From a JSON or JSONL file to checked conversations."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tokencurric.data.conversations import Conversation, ConversationFile, Problem
from tokencurric.data.rows import SPEAKERS, parse_row, refuse, row_id
from tokencurric.errors import DataError, RangeError


def read_conversations(
    path: str | Path,
    *,
    images: str | Path | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    leading_answer: Literal["keep", "drop"] = "keep",
    follow_links: bool = False,
) -> ConversationFile:
    """Read LLaVA conversation JSON (the format of `llava_v1_5_mix665k.json`) and check every row.

    A row is `{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value": text}, ...]}`. `image` is
    a file name or a list of names, as many as there are `<image>` marks in the turns; rows without pictures
    are plain text. Rows may start with a gpt turn. Other keys are not looked at. Files that end in `.jsonl`
    hold one row a line.

    Args:
        path: the file.
        images: folder that image names are relative to; needed as soon as a row has a picture.
        on_error: "raise" at the first bad row, or "skip" bad rows: they are named and counted in `skipped`.
        leading_answer: "keep" trains on a gpt turn that opens a row, "drop" leaves it out as LLaVA's own
            training does and counts it in `leading_answers_dropped`.
        follow_links: allow symbolic links inside the image folder to lead out of it.

    Returns:
        The usable rows in the order of the file, and the skipped ones.

    Raises:
        DataError: the file cannot be read, a row is bad (unless skipped), or no usable row is left.
        RangeError: an option is none of its values.

    Example:
        >>> import tempfile
        >>> talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "talk.json"
        ...     _ = path.write_text(json.dumps([{"id": "a", "conversations": talk}, {"id": "b"}]))
        ...     file = read_conversations(path, on_error="skip")
        >>> [row.id for row in file.rows], [problem.id for problem in file.skipped]
        (['a'], ['b'])

    Source: the data format of LLaVA-1.5 (Liu et al. 2023, arXiv:2310.03744).
    """
    for name, value, known in (
        ("on_error", on_error, ("raise", "skip")),
        ("leading_answer", leading_answer, ("keep", "drop")),
    ):
        if value not in known:
            raise RangeError(
                f"read_conversations needs {name} out of {known}; got {name}={value!r}. Choose one of them."
            )
    path, folder = Path(path), None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise DataError(
            f"read_conversations needs images to be a folder; got images={str(folder)!r}. There is no such "
            "folder. Pass the folder that the image names in the data are relative to."
        )
    rows: list[Conversation] = []
    skipped: list[Problem] = []
    dropped = 0
    for index, raw in enumerate(_raw_rows(path)):
        try:
            if isinstance(raw, json.JSONDecodeError):
                raise refuse(index, None, "one JSON object a line", f"broken JSON ({raw})", "The line cannot be read.")
            rows.append(
                parse_row(
                    index,
                    raw,
                    images=folder,
                    follow_links=follow_links,
                    drop_leading_answer=leading_answer == "drop",
                )
            )
        except DataError as error:
            if on_error == "raise":
                raise
            skipped.append(Problem(index, row_id(index, raw), str(error)))
        else:
            dropped += len(raw["conversations"]) - len(rows[-1].turns)
    if not rows:
        first = f" The first was refused so: {skipped[0].reason}" if skipped else ""
        raise DataError(
            f"read_conversations needs at least one usable row; got {len(skipped)} bad row(s) and no good "
            f"one in {str(path)!r}.{first} Check that the file and the image folder belong together."
        )
    return ConversationFile(path, folder, tuple(rows), tuple(skipped), dropped, follow_links)


def _raw_rows(path: Path) -> Iterator[Any]:
    """Rows as JSON gives them; a broken line of a JSONL file comes as its error, to be skipped."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix.lower() != ".jsonl":
                found = json.load(file)
                if not isinstance(found, list):
                    raise DataError(
                        f"read_conversations needs a JSON list of rows; got {type(found).__name__} in "
                        f"{str(path)!r}. Rows hold turns of {' and '.join(SPEAKERS)}. Wrap the rows in a "
                        "list, or name the file .jsonl."
                    )
                yield from found
                return
            for line in file:
                if line.strip():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        yield error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            f"read_conversations needs a readable JSON file; got path={str(path)!r}. Reading it failed: "
            f"{error}. Check the path, and that the file is whole."
        ) from error
