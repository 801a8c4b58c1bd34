"""From a file of rows to checked conversations."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from tokencurric.data.conversations import Conversation, ConversationFile, Problem, UrlOpener
from tokencurric.data.decoding import AS_SHOWN, ImageDecoding
from tokencurric.data.files import BrokenLine, raw_rows
from tokencurric.data.rows import RowRules, parse_row, refuse, row_id
from tokencurric.errors import DataError, RangeError


def read_conversations(
    path: str | Path,
    *,
    images: str | Path | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    leading_answer: Literal["keep", "drop"] = "keep",
    follow_links: bool = False,
    allow_absolute: bool = False,
    open_url: UrlOpener | None = None,
    ignore: Collection[str] = (),
    decoding: ImageDecoding = AS_SHOWN,
) -> ConversationFile:
    """Read a file of conversations with images, and check every row.

    The form of LLaVA (`llava_v1_5_mix665k.json`) is
    `{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value": text}, ...]}`. `image` is a file name or a
    list of names, as many as there are `<image>` marks in the turns; rows without images are plain text. Rows may start
    with an answer. Read as well, in any mixture, are the forms of ShareGPT, LLaMA-Factory, ms-swift and Hugging Face
    `datasets`:

    - `messages` or `conversation` for `conversations`, `role` and `content` for `from` and `value`, `images` for
      `image`;
    - the speakers `user`, `assistant` and `system`, and a `system` key. A system turn is the first one;
    - `content` as a list of parts, `{"type": "text", "text"}` and `{"type": "image"}`, where an image may be in the
      part (`image`, `path`, `url`, `image_url`, `base64`), have the `index` of one in `images`, or be the next of them;
    - images as bytes, `{"bytes", "path"}`, or `data:` URLs. They are held in memory; large data should be in files.

    Other keys are not read. Those that change what is to be learned (`video`, `tools`, `objects`, `rejected`, `weight`,
    ...; see `tokencurric.data.formats.MEANINGFUL`) make a row a bad one unless `ignore` names them; the rest are
    counted in `unread`, and `preflight` lists them. Keys that are null or empty are as good as absent.

    Args:
        path: `.json` (a list of rows), `.jsonl` or `.ndjson` (one row per line), the same with `.gz`, or `.parquet`,
            which needs pyarrow.
        images: folder that image names are relative to; needed as soon as a row names a file in it.
        on_error: "raise" at the first bad row, or "skip" bad rows: they are named and counted in `skipped`.
        leading_answer: "keep" trains on a gpt turn that opens a row, "drop" leaves it out as LLaVA's own
            training does and counts it in `leading_answers_dropped`.
        follow_links: allow symbolic links inside the image folder to lead out of it.
        allow_absolute: allow absolute image names, wherever they lead. Rows of strangers can then show any file that
            you can read.
        open_url: called with the URL of an image when its row is trained on, returns its bytes. None refuses URLs.
        ignore: meaningful keys that are left out on purpose.
        decoding: how image files become RGB; see `ImageDecoding`.

    Returns:
        The usable rows in the order of the file, and the skipped ones.

    Raises:
        DataError: the file cannot be read, a row is bad (unless skipped), or no usable row is left.
        MissingDependencyError: a Parquet file is to be read, and pyarrow is not installed.
        RangeError: an option is none of its values.

    Example:
        >>> import json, tempfile
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
    if isinstance(ignore, str):
        raise RangeError(f"ignore must be a list of keys; got {ignore!r}.\nHint: pass ignore=[{ignore!r}].")
    path, folder = Path(path), None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise DataError(
            f"read_conversations needs images to be a folder; got images={str(folder)!r}. There is no such "
            "folder. Pass the folder that the image names in the data are relative to."
        )
    rules = RowRules(
        images=folder,
        follow_links=follow_links,
        allow_absolute=allow_absolute,
        open_url=open_url,
        drop_leading_answer=leading_answer == "drop",
        ignore=frozenset(ignore),
        file=path,
    )
    rows: list[Conversation] = []
    skipped: list[Problem] = []
    unread: Counter[str] = Counter()
    dropped = 0
    for index, raw in enumerate(raw_rows(path)):
        try:
            if isinstance(raw, BrokenLine):
                why = "The line cannot be read."
                raise refuse(index, None, "one JSON object a line", f"broken JSON ({raw})", why, file=path)
            row, read = parse_row(index, raw, rules)
        except DataError as error:
            if on_error == "raise":
                raise
            skipped.append(Problem(index, row_id(index, raw), str(error)))
            continue
        rows.append(row)
        unread.update(read.unread)
        dropped += len(read.turns) - len(row.turns)
    if not rows:
        first = f" The first was refused so: {skipped[0].reason}" if skipped else ""
        raise DataError(
            f"read_conversations needs at least one usable row; got {len(skipped)} bad row(s) and no good "
            f"one in {str(path)!r}.{first} Check that the file and the image folder belong together."
        )
    return ConversationFile(
        path,
        folder,
        tuple(rows),
        tuple(skipped),
        dropped,
        follow_links=follow_links,
        allow_absolute=allow_absolute,
        open_url=open_url,
        decoding=decoding,
        unread=dict(unread),
    )
