"""Checkpoint folders that are whole or absent: written beside their place, listed, and moved there by one rename."""

import json
import os
import re
import shutil
from collections.abc import Container
from pathlib import Path

from tokencurric.defects import CONTENTS, defect

UNFINISHED = "unfinished"
_NUMBERED = re.compile(r"checkpoint-(\d+)")


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file so that a reader finds the former contents or the new ones, also after a kill.

    Args:
        path: file to replace or create; its folder must exist.
        text: all of the new contents, written as UTF-8.

    Raises:
        OSError: the text could not be written; the former file is untouched.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(f"{folder}/results.json", "{}")
        ...     os.listdir(folder), Path(folder, "results.json").read_text()
        (['results.json'], '{}')
    """
    path = Path(path)
    draft = path.with_name(path.name + ".partial")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def seal(folder: str | Path) -> None:
    """Bring all files of a finished folder to the disk, and list their sizes in `tokencurric-contents.json`.

    Args:
        folder: folder in which nobody writes any more.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "weights.bin").write_bytes(b"1234")
        ...     seal(folder)
        ...     json.loads(Path(folder, CONTENTS).read_text())
        {'files': {'weights.bin': 4}}
    """
    folder = Path(folder)
    sizes = {}
    for path in sorted(folder.rglob("*")):
        _sync(path)
        if path.is_file() and path != folder / CONTENTS:
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    write_whole(folder / CONTENTS, json.dumps({"files": sizes}, indent=1) + "\n")


def put_in_place(draft: str | Path, final: str | Path) -> None:
    """Rename a sealed folder to its final name; a folder that has the name makes way.

    A kill between the two renames leaves the draft, which is whole, for `recover`.

    Args:
        draft: sealed folder on the file system of `final`.
        final: name it gets.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run:
        ...     Path(run, "draft").mkdir()
        ...     put_in_place(f"{run}/draft", f"{run}/final")
        ...     os.listdir(run)
        ['final']
    """
    draft, final = Path(draft), Path(final)
    former = draft.with_name(f"replaced-{final.name}")
    if final.exists():
        _remove(former)
        final.rename(former)
    draft.rename(final)
    _sync(final.parent)
    _remove(former)


def recover(run: str | Path) -> None:
    """Clear what a killed process left in `unfinished`: sealed checkpoints go to their place, all else goes.

    Args:
        run: output folder of a training. Only one process may call this, while no other writes there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run:
        ...     Path(run, UNFINISHED, "checkpoint-2").mkdir(parents=True)  # killed before it was sealed
        ...     recover(run)
        ...     os.listdir(run)
        []
    """
    drafts = Path(run, UNFINISHED)
    for draft in sorted(drafts.glob("checkpoint-*")):
        if _NUMBERED.fullmatch(draft.name) and (draft / CONTENTS).is_file() and defect(draft, resume=False) is None:
            put_in_place(draft, Path(run, draft.name))
    _remove(drafts)


def discard(drafts: str | Path) -> None:
    """Delete what was written before saving failed, as far as it can be: the first error is the one to report.

    Args:
        drafts: folder that is no checkpoint yet.

    Example:
        >>> discard("no/such/folder")
    """
    shutil.rmtree(drafts, ignore_errors=True)


def numbered(run: str | Path) -> dict[int, Path]:
    """Checkpoint folders of a run by their step, ascending, whole or not.

    Args:
        run: output folder of a training; it need not exist.

    Example:
        >>> numbered("no/such/folder")
        {}
    """
    found = {}
    for path in Path(run).glob("checkpoint-*"):
        match = _NUMBERED.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def rotate(run: str | Path, limit: int | None, keep: Container[Path]) -> None:
    """Move checkpoints beyond a limit to `unfinished`: damaged ones first, then the oldest.

    They are gone with the next `recover`. No half-deleted folder can be mistaken for a checkpoint.

    Args:
        run: output folder of a training.
        limit: number of checkpoints that stay; None, or a number below 1, deletes none.
        keep: folders that stay whatever the limit is.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run:
        ...     for step in (2, 4, 6):
        ...         Path(run, f"checkpoint-{step}").mkdir()
        ...     rotate(run, 1, keep={Path(run, "checkpoint-2")})
        ...     list(numbered(run))
        [2]
    """
    if limit is None or limit < 1:
        return
    found = numbered(run)

    def worth(step: int) -> tuple[bool, int, int]:
        return defect(found[step], resume=False) is None, found[step].stat().st_mtime_ns, step

    spare = sorted((step for step in found if found[step] not in keep), key=worth)
    for step in spare[: max(0, len(found) - limit)]:
        discarded = Path(run, UNFINISHED, f"discarded-{found[step].name}")
        discarded.parent.mkdir(exist_ok=True)
        _remove(discarded)
        found[step].rename(discarded)


def _sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _remove(folder: Path) -> None:
    """Delete a folder if it exists; what cannot be deleted raises."""
    if folder.is_dir():
        shutil.rmtree(folder)
