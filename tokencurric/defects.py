"""What keeps a checkpoint folder from being whole: files that are missing, cut off or not as they were listed."""

import json
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

CONTENTS = "tokencurric-contents.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "pytorch_model_fsdp*", "global_step*")
_ZIPPED = frozenset({".pt", ".pth", ".bin"})
_READ = ("trainer_state.json", "config.json", "generation_config.json", "adapter_config.json", "tokencurric.json")


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
