"""One raw row of LLaVA conversation JSON to a checked `Conversation`."""

from itertools import pairwise
from pathlib import Path
from typing import Any

from tokencurric.data.conversations import MARK, Conversation, Role, Turn
from tokencurric.data.paths import locate_image
from tokencurric.errors import DataError

SPEAKERS: dict[str, Role] = {"human": "user", "gpt": "assistant"}


def row_id(index: int, raw: Any) -> str:
    """The row's own id as text; a row without one goes by its number."""
    found = raw.get("id") if isinstance(raw, dict) else None
    return str(index if found is None else found)


def refuse(index: int, raw: Any, needs: str, got: str, why: str) -> DataError:
    """The error of a bad row, in the one form in which all of them speak."""
    return DataError(
        f"read_conversations needs {needs}; got {got} in row {index} (id {row_id(index, raw)!r}). {why} "
        'Correct the row, or pass on_error="skip" to leave such rows out and count them.'
    )


def parse_row(
    index: int,
    raw: Any,
    *,
    images: Path | None,
    follow_links: bool = False,
    drop_leading_answer: bool = False,
) -> Conversation:
    """Check one row and give it its types.

    Args:
        index: the row's number in the file.
        raw: what the JSON said.
        images: folder of the pictures; None where no row may have one.
        follow_links: see `locate_image`.
        drop_leading_answer: leave a first turn out that nobody asked for, as LLaVA's own training does.

    Returns:
        The conversation, its text unchanged.

    Raises:
        DataError: the row is not one that could be trained on; the text says which row, what came,
            what to do.

    Example:
        >>> talk = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
        >>> row = parse_row(0, {"id": 7, "conversations": talk}, images=None)
        >>> row.id, row.turns[1]
        ('7', Turn(role='assistant', text='4'))
    """
    if not isinstance(raw, dict):
        raise refuse(index, raw, "a JSON object a row", f"{type(raw).__name__}", "Nothing can be looked up in it.")
    if isinstance(raw.get("id"), bool) or not isinstance(raw.get("id"), str | int | None):
        raise refuse(index, raw, "an id that is text or a whole number", f"id={raw['id']!r}", "Rows are named by it.")
    names = _image_names(index, raw)
    turns = _turns(index, raw)
    if drop_leading_answer and turns[0].role == "assistant":
        turns = turns[1:]
    _check_order(index, raw, turns)
    marks = sum(turn.marks for turn in turns)
    if marks != len(names):
        raise refuse(
            index,
            raw,
            f"one image name per {MARK} mark",
            f"{marks} mark(s) and {len(names)} image(s)",
            "Which picture belongs where would be a guess.",
        )
    if names and images is None:
        raise refuse(
            index,
            raw,
            "an image folder for rows with pictures",
            f"images=None and image={names[0]!r}",
            "Pass images=.",
        )
    if images is not None:
        for name in names:
            try:
                locate_image(images, name, follow_links=follow_links)
            except DataError as error:
                raise refuse(index, raw, "readable image paths", f"image={name!r}", str(error)) from error
    return Conversation(index, row_id(index, raw), names, turns)


def _image_names(index: int, raw: dict[str, Any]) -> tuple[str, ...]:
    found = raw.get("image")
    names = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(name, str) for name in names):
        raise refuse(index, raw, "image to be a file name or a list of them", f"image={found!r}", "It names files.")
    return tuple(names)


def _turns(index: int, raw: dict[str, Any]) -> tuple[Turn, ...]:
    found = raw.get("conversations")
    if not isinstance(found, list) or not found:
        raise refuse(
            index,
            raw,
            "a non-empty list under 'conversations'",
            f"{type(found).__name__}",
            "There is nothing to train on.",
        )
    turns = []
    for number, entry in enumerate(found):
        where = f"turn {number} ="
        if not isinstance(entry, dict) or not isinstance(entry.get("value"), str):
            raise refuse(
                index,
                raw,
                "turns with 'from' and a text 'value'",
                f"{where} {_short(entry)}",
                "A turn is who says what.",
            )
        speaker, text = entry.get("from"), entry["value"]
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise refuse(
                index,
                raw,
                f"speakers out of {sorted(SPEAKERS)}",
                f"{where} from {speaker!r}",
                "Only 'gpt' is learned from.",
            )
        if not text.strip():
            raise refuse(index, raw, "turns that say something", f"{where} {_short(text)}", "A blank one is lost text.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise refuse(
                index,
                raw,
                "text that UTF-8 can hold",
                f"{where} {_short(text)}",
                "Half a surrogate pair has no tokens.",
            ) from error
        turns.append(Turn(SPEAKERS[speaker], text))
    return tuple(turns)


def _check_order(index: int, raw: dict[str, Any], turns: tuple[Turn, ...]) -> None:
    for number, (turn, following) in enumerate(pairwise(turns)):
        if turn.role == following.role:
            raise refuse(
                index,
                raw,
                "turns that alternate",
                f"two {turn.role} turns in a row (turn {number} and {number + 1} of those used)",
                "Chat templates have no form for it.",
            )
    if all(turn.role == "user" for turn in turns):
        raise refuse(
            index,
            raw,
            "at least one gpt turn",
            f"{len(turns)} turn(s) without one",
            "No token would be learned.",
        )


def _short(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
