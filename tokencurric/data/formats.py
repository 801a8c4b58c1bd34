"""Raw rows, as LLaVA, ShareGPT, LLaMA-Factory, ms-swift and Hugging Face write them, in one form."""

import base64
import binascii
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokencurric.data.conversations import MARK, EmbeddedImage, ImageSource, Role

SPEAKERS: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
TURN_LISTS = ("conversations", "messages", "conversation")
_READ = frozenset({"id", "image", "images", "system", *TURN_LISTS})

MEANINGFUL = frozenset(
    # other media, tools, boxes
    {"video", "videos", "audio", "audios", "tools", "functions", "objects", "bbox", "masks"}
    # preferences, rewards, classes, weights of the loss
    | {"chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images", "label", "kto_tag"}
    | {"weight", "loss", "loss_weight"}
    # turns in other places
    | {"instruction", "input", "output", "history", "query", "response", "prompt", "completion", "texts"}
)
"""Keys of a row that change what is to be learned in formats that use them, and that are not read."""

MEANINGFUL_IN_TURNS = frozenset(
    {"weight", "loss", "loss_weight", "train", "mask", "tool_calls", "tool_call_id", "function_call", "thinking"}
    | {"reasoning", "reasoning_content", "image", "images", "video", "videos", "audio", "audios"}
)
"""The same for keys of a turn."""

# A weight of 1 and a loss that is switched on are what happens in any case.
_WEIGHTS = ("weight", "loss", "loss_weight", "train")
_SOURCES = ("image", "image_url", "url", "path", "bytes", "base64")


class RefusedRow(Exception):
    """What a row needs, what came, and why that cannot work; `parse_row` says which row it is."""

    def __init__(self, needs: str, got: str, why: str) -> None:
        super().__init__(needs)
        self.needs, self.got, self.why = needs, got, why


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row in one form: who says what, the images in the order of their marks, and what was not read."""

    turns: tuple[tuple[Role, str], ...]
    images: tuple[ImageSource, ...]
    unread: tuple[str, ...]


def read_raw(raw: Mapping[str, Any], *, ignore: Collection[str] = ()) -> RawRow:
    """Bring a row into one form.

    Args:
        raw: the row as its file has it.
        ignore: meaningful keys that are left out on purpose.

    Returns:
        Turns, image sources and unread keys. Keys of turns are named `conversations[].key`.

    Raises:
        RefusedRow: the row has another form, or a key that changes its meaning and is not read.

    Example:
        >>> image = {"type": "image", "path": "a.png"}
        >>> ask = {"role": "user", "content": [image, {"type": "text", "text": "What?"}]}
        >>> row = read_raw({"messages": [ask, {"role": "assistant", "content": "A cat."}], "source": "me"})
        >>> row.turns, row.images, row.unread
        ((('user', '<image>What?'), ('assistant', 'A cat.')), ('a.png',), ('source',))
    """
    unread = []
    for key, value in raw.items():
        if key in _READ or _says_nothing(value) or (key in _WEIGHTS and value == 1):
            continue
        if key in MEANINGFUL and key not in ignore:
            raise RefusedRow(
                "rows without keys that change their meaning and are not read",
                f"{key!r} = {shorten(value)}",
                f'Pass ignore=["{key}"] if training without it is meant.',
            )
        unread.append(str(key))
    name, entries = _entries(raw)
    marks: list[Any] = []  # of each mark, its own source, its number in the row's images, or None for the next of them
    turns: list[tuple[Role, str]] = []
    for number, entry in enumerate(entries):
        speaker, content = _turn(number, entry)
        unread += [f"{name}[].{key}" for key in _unread_in_turn(number, entry, ignore)]
        turns.append((_role(number, speaker), _text(number, content, marks)))
    system = raw.get("system")
    if not _says_nothing(system):
        if not isinstance(system, str):
            raise RefusedRow("system to be text", f"system={shorten(system)}", "It opens the conversation.")
        if turns[0][0] != "system":
            marks[:0] = [None] * system.count(MARK)
            turns.insert(0, ("system", system))
        elif turns[0][1] != system:
            raise RefusedRow("one system turn", "a system key and another system turn", "Only one can open a row.")
    return RawRow(tuple(turns), _placed(_images(raw), marks), tuple(dict.fromkeys(unread)))


def shorten(value: Any) -> str:
    """A value as text for an error."""
    shown = ascii(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _says_nothing(value: Any) -> bool:
    """Columns that a row does not use come as null from tables, and as an empty value from hand-written files."""
    return value is None or (isinstance(value, str | bytes | list | dict) and (not value or value in ("[]", "{}")))


def _entries(raw: Mapping[str, Any]) -> tuple[str, list[Any]]:
    named = [name for name in TURN_LISTS if not _says_nothing(raw.get(name))]
    if len(named) > 1:
        raise RefusedRow("turns under one key", f"{named[0]!r} and {named[1]!r}", "Which to train on would be a guess.")
    found = raw.get(named[0]) if named else next((raw[name] for name in TURN_LISTS if name in raw), None)
    if not isinstance(found, list) or not found:
        raise RefusedRow(
            "a non-empty list under 'conversations' (or 'messages')",
            f"{type(found).__name__}"
            if any(name in raw for name in TURN_LISTS)
            else f"keys {shorten(sorted(map(str, raw)))}",
            "There is nothing to train on.",
        )
    entries: list[Any] = []
    for entry in found:
        # One form of ShareGPT has a question and its answer in one entry.
        pair = (
            isinstance(entry, dict) and not {"from", "role"} & entry.keys() and {"human", "assistant"} <= entry.keys()
        )
        if pair:
            rest = {key: value for key, value in entry.items() if key not in ("human", "assistant")}
            entries.append({"from": "human", "value": entry["human"], **rest})
            entries.append({"from": "gpt", "value": entry["assistant"]})
        else:
            entries.append(entry)
    return named[0], entries


def _turn(number: int, entry: Any) -> tuple[Any, Any]:
    if isinstance(entry, dict):
        for who, what in (("from", "value"), ("role", "content")):
            if entry.get(who) is not None and isinstance(entry.get(what), str | list):
                return entry[who], entry[what]
    raise RefusedRow(
        "turns with 'from' and a text 'value' (or 'role' and 'content')",
        f"turn {number} = {shorten(entry)}",
        "A turn is who says what.",
    )


def _unread_in_turn(number: int, entry: dict[str, Any], ignore: Collection[str]) -> Iterator[str]:
    for key, value in entry.items():
        if key in ("from", "value", "role", "content") or _says_nothing(value):
            continue
        if key in _WEIGHTS and value == 1:
            continue
        if key in MEANINGFUL_IN_TURNS and key not in ignore:
            raise RefusedRow(
                "turns without keys that change their meaning and are not read",
                f"{key!r} = {shorten(value)} in turn {number}",
                f'Pass ignore=["{key}"] if training without it is meant.',
            )
        yield str(key)


def _role(number: int, speaker: Any) -> Role:
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise RefusedRow(
            f"speakers out of {sorted(SPEAKERS)}",
            f"turn {number} = from {speaker!r}",
            "Only 'gpt' and 'assistant' are learned from.",
        )
    return SPEAKERS[speaker]


def _text(number: int, content: str | list[Any], marks: list[Any]) -> str:
    """The text of a turn with a mark for each image; what each mark shows goes to `marks`."""
    if isinstance(content, str):
        marks += [None] * content.count(MARK)
        return content
    said = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and kind is None:
            kind = "text" if isinstance(part.get("text"), str) else "image"
        if kind == "text" and isinstance(part.get("text"), str):
            if MARK in part["text"]:
                raise RefusedRow(
                    f"parts of text without {MARK}",
                    f"turn {number} = {shorten(part)}",
                    "Images have parts of their own there, so this would be taken for another one.",
                )
            said.append(part["text"])
        elif kind in ("image", "image_url") and not isinstance(part.get("text"), str):
            own = next((part[key] for key in _SOURCES if not _says_nothing(part.get(key))), part.get("index"))
            marks.append(own)
            said.append(MARK)
        else:
            raise RefusedRow(
                "parts of a turn that are text or images",
                f"turn {number} = {shorten(part)}",
                "Other parts have no place in the text.",
            )
    return "".join(said)


def _images(raw: Mapping[str, Any]) -> list[Any]:
    named = [key for key in ("image", "images") if not _says_nothing(raw.get(key))]
    if len(named) > 1:
        raise RefusedRow("images under one key", "'image' and 'images'", "Which to show would be a guess.")
    found = raw[named[0]] if named else []
    return found if isinstance(found, list) else [found]


def _placed(images: list[Any], marks: list[Any]) -> tuple[ImageSource, ...]:
    """The image of each mark: its own, the one that its number names, or the next of the row's."""
    images = [_source(each) for each in images]
    numbered = {mark for mark in marks if type(mark) is int}
    following = sum(mark is None for mark in marks)
    own = len(marks) - following - sum(type(mark) is int for mark in marks)
    if numbered and (following or numbered != set(range(len(images)))):
        raise RefusedRow(
            "parts whose index names an image, and all of them",
            f"indices {sorted(numbered)}, {following} mark(s) without one and {len(images)} image(s)",
            "Which picture belongs where would be a guess.",
        )
    if not numbered and following != len(images):
        raise RefusedRow(
            f"one image name per {MARK} mark",
            f"{len(marks)} mark(s) and {len(images) + own} image(s)",
            "Which picture belongs where would be a guess.",
        )
    coming = iter(images)
    return tuple(
        next(coming) if mark is None else images[mark] if type(mark) is int else _source(mark) for mark in marks
    )


def _source(found: Any) -> ImageSource:
    """A name, or the image itself."""
    if isinstance(found, str):
        if not found.startswith("data:"):
            return found
        head, _, body = found.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("it is not in base64")
            return EmbeddedImage(base64.b64decode(body, validate=True))
        except (ValueError, binascii.Error) as error:
            raise RefusedRow("data: URLs that can be decoded", shorten(found), f"{error}.") from error
    if isinstance(found, bytes):
        return EmbeddedImage(found)
    if isinstance(found, dict):
        if isinstance(found.get("bytes"), bytes):
            return EmbeddedImage(found["bytes"], str(found.get("path") or ""))
        names = [found[key] for key in ("path", "url", "image", "image_url") if isinstance(found.get(key), str)]
        if len(names) == 1:
            return _source(names[0])
    raise RefusedRow(
        "image to be a file name or a list of them",
        f"image={shorten(found)}",
        "It names files; rows of tables may also hold their bytes.",
    )
