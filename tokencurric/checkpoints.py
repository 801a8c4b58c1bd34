"""Checkpoint folders that are whole or absent: written beside their place, listed, and moved there by one rename."""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Container, Iterator
from itertools import chain
from pathlib import Path

CONTENTS = "tokencurric-contents.json"
UNFINISHED = "unfinished"
_NUMBERED = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "pytorch_model_fsdp*", "global_step*")
_ZIPPED = frozenset({".pt", ".pth", ".bin"})
_READ = frozenset(
    {"trainer_state.json", "config.json", "generation_config.json", "adapter_config.json", "tokencurric.json"}
)


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


def defect(folder: str | Path, *, resume: bool = True) -> str | None:
    """What keeps a checkpoint from being whole, in words that name the file; None if nothing does.

    Sizes are held against the list that `seal` wrote. A folder without the list, of an earlier version or of
    transformers' own Trainer, is held against what a checkpoint needs, and each file against the end of its format.

    Args:
        folder: checkpoint to look at; weights are not read.
        resume: True also asks for all that a training needs to go on as if it had not stopped.

    Example:
        >>> defect("no/such/folder")
        'the folder does not exist'
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "the folder does not exist"
    listed = folder / CONTENTS
    sealed = listed.is_file()
    reasons = chain(
        _differing(listed) if sealed else (),
        _lacking(folder, resume=resume) if resume or not sealed else (),
        () if sealed else _broken(folder),
    )
    return next(reasons, None)


def _differing(listed: Path) -> Iterator[str]:
    """Files that are not as the list has them."""
    try:
        sizes: dict[str, int] = json.loads(listed.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError) as error:
        yield f"{listed.name} cannot be read ({error})"
        return
    for name, size in sizes.items():
        path = listed.parent / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"


def _lacking(folder: Path, *, resume: bool) -> Iterator[str]:
    """Files without which a checkpoint is none, or is not all of one."""

    def has(*patterns: str) -> bool:
        return any(path for pattern in patterns for path in folder.glob(pattern))

    if not has("trainer_state.json"):
        yield "trainer_state.json is missing"
    if not has(*_WEIGHTS):
        yield "weights are missing"
    if has("latest") or has("global_step*"):  # of DeepSpeed, which keeps optimizer and schedule with its shards
        latest = folder / "latest"
        shards = folder / latest.read_text(encoding="utf-8").strip() if latest.is_file() else folder / "latest"
        if not any(shards.glob("*model_states.pt")):
            yield f"{shards.name} has no DeepSpeed states"
    elif resume:
        if not has("optimizer.pt", "optimizer.bin", "optimizer_*"):
            yield "optimizer.pt is missing"
        if not has("scheduler.pt"):
            yield "scheduler.pt is missing"
    if resume and not has("rng_state*.pth"):
        yield "rng_state.pth is missing"
    for index in folder.glob("*.index.json"):
        try:
            shards_of: set[str] = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            yield f"{index.name} cannot be read ({error})"
            continue
        yield from (f"{name} is missing" for name in sorted(shards_of) if not (folder / name).is_file())
    for shard in folder.glob("*/*.distcp"):
        if not (shard.parent / ".metadata").is_file():
            yield f"{shard.parent.name}/.metadata is missing"
            break


def _broken(folder: Path) -> Iterator[str]:
    """Files that end before their format does."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file():
            continue
        if name in _READ:
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                yield f"{name} cannot be read ({error})"
        elif path.suffix == ".safetensors" and (wrong := _cut_off(path)):
            yield f"{name} {wrong}"
        elif path.suffix in _ZIPPED and not zipfile.is_zipfile(path):
            yield f"{name} is cut off: it has {path.stat().st_size:,} bytes and no end of an archive"


def _cut_off(path: Path) -> str | None:
    """What is wrong with the length of a safetensors file: a count of bytes, a header in JSON, and the tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        if size < 8 or size < 8 + header:
            return f"is cut off after {size:,} bytes, within its header"
        try:
            tensors = json.loads(file.read(header))
        except ValueError as error:
            return f"has a header that cannot be read ({error})"
    ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
    whole = 8 + header + max(ends, default=0)
    return None if size == whole else f"has {size:,} bytes instead of {whole:,}"


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
