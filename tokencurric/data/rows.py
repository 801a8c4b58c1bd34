"""One raw row to a checked `Conversation`."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokencurric.data.conversations import Conversation, EmbeddedImage, ImageSource, Turn, UrlOpener
from tokencurric.data.formats import RawRow, RefusedRow, read_raw, shorten
from tokencurric.data.paths import is_url, locate_image
from tokencurric.errors import DataError


def row_id(index: int, raw: Any) -> str:
    """The row's own id as text; a row without one goes by its number."""
    found = raw.get("id") if isinstance(raw, dict) else None
    return str(index if found is None else found)


def refuse(index: int, raw: Any, needs: str, got: str, why: str, *, file: Path | None = None) -> DataError:
    """The error of a bad row, in the one form in which all of them speak."""
    place = "" if file is None else f" of {file}"
    return DataError(
        f"read_conversations needs {needs}; got {got} in row {index} (id {row_id(index, raw)!r}){place}. {why} "
        'Correct the row, or pass on_error="skip" to leave such rows out and count them.'
    )


@dataclass(frozen=True)
class RowRules:
    """What may stand in a row; the fields are the arguments of `read_conversations` with these names.

    Args:
        images: folder of the images; None where no row may name a file in it.
        follow_links: see `locate_image`.
        allow_absolute: see `locate_image`.
        open_url: opens images that are named by a URL; None refuses them.
        drop_leading_answer: leave a first answer out that nobody asked for, as LLaVA's own training does.
        ignore: meaningful keys that are left out on purpose.
        file: what errors call the file.
    """

    images: Path | None = None
    follow_links: bool = False
    allow_absolute: bool = False
    open_url: UrlOpener | None = None
    drop_leading_answer: bool = False
    ignore: Collection[str] = ()
    file: Path | None = None


NO_RULES = RowRules()


def parse_row(index: int, raw: Any, rules: RowRules = NO_RULES) -> tuple[Conversation, RawRow]:
    """Check one row and give it its types.

    Args:
        index: the row's number in the file.
        raw: what the file has.
        rules: what may stand in it.

    Returns:
        The conversation, its text unchanged, and the row that it was made from.

    Raises:
        DataError: the row is not one that could be trained on; the text says which row, what came,
            what to do.

    Example:
        >>> talk = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
        >>> row, _ = parse_row(0, {"id": 7, "conversations": talk})
        >>> row.id, row.turns[1]
        ('7', Turn(role='assistant', text='4'))
    """
    try:
        return _parsed(index, raw, rules)
    except RefusedRow as found:
        raise refuse(index, raw, found.needs, found.got, found.why, file=rules.file) from found.__cause__


def _parsed(index: int, raw: Any, rules: RowRules) -> tuple[Conversation, RawRow]:
    if not isinstance(raw, dict):
        raise RefusedRow("a JSON object a row", f"{type(raw).__name__}", "Nothing can be looked up in it.")
    if isinstance(raw.get("id"), bool) or not isinstance(raw.get("id"), str | int | None):
        raise RefusedRow("an id that is text or a whole number", f"id={raw['id']!r}", "Rows are named by it.")
    read = read_raw(raw, ignore=rules.ignore)
    for number, (_, text) in enumerate(read.turns):
        _check_text(number, text)
    turns = [Turn(role, text) for role, text in read.turns]
    opening = next((number for number, turn in enumerate(turns) if turn.role != "system"), 0)
    images = read.images
    if rules.drop_leading_answer and turns[opening].role == "assistant":
        gone = turns.pop(opening)
        before = sum(turn.marks for turn in turns[:opening])
        images = images[:before] + images[before + gone.marks :]
    _check_order(turns)
    for source in images:
        _check_image(source, rules)
    return Conversation(index, row_id(index, raw), images, tuple(turns)), read


def _check_text(number: int, text: str) -> None:
    if not text.strip():
        raise RefusedRow("turns that say something", f"turn {number} = {shorten(text)}", "A blank one is lost text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RefusedRow(
            "text that UTF-8 can hold", f"turn {number} = {shorten(text)}", "Half a surrogate pair has no tokens."
        ) from error


def _check_order(turns: list[Turn]) -> None:
    late = [number for number, turn in enumerate(turns) if turn.role == "system" and number > 0]
    if late:
        raise RefusedRow("a system turn in the first place", f"one as turn {late[0]}", "Templates read it only there.")
    for number, (turn, following) in enumerate(pairwise(turns)):
        if turn.role == following.role:
            raise RefusedRow(
                "turns that alternate",
                f"two {turn.role} turns in a row (turn {number} and {number + 1} of those used)",
                "Chat templates have no form for it.",
            )
    if all(turn.role != "assistant" for turn in turns):
        raise RefusedRow("at least one gpt turn", f"{len(turns)} turn(s) without one", "No token would be learned.")


def _check_image(source: ImageSource, rules: RowRules) -> None:
    if isinstance(source, EmbeddedImage) or (is_url(source) and rules.open_url is not None):
        return
    if rules.images is None and not is_url(source) and not (rules.allow_absolute and Path(source).is_absolute()):
        raise RefusedRow("an image folder for rows with pictures", f"images=None and image={source!r}", "Pass images=.")
    try:
        locate_image(rules.images, source, follow_links=rules.follow_links, allow_absolute=rules.allow_absolute)
    except DataError as error:
        raise RefusedRow("readable image paths", f"image={source!r}", str(error)) from error
