"""What a file of conversations holds: turns, rows, the rows that were left out and why."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tokencurric.data.decoding import AS_SHOWN, ImageDecoding

MARK = "<image>"
"""Where a picture stands in the text of a LLaVA conversation."""

UrlOpener = Callable[[str], bytes]
"""Returns what an address points to."""

Role = Literal["user", "assistant", "system"]


@dataclass(frozen=True, slots=True)
class EmbeddedImage:
    """An image whose file is inside the row.

    Args:
        content: bytes of the file.
        name: what the row calls it; need not exist.

    Example:
        >>> EmbeddedImage(b"GIF89a", "a.gif")
        EmbeddedImage(name='a.gif')
    """

    content: bytes = field(repr=False)
    name: str = ""


ImageSource = str | EmbeddedImage
"""A file name, a URL, or the image itself."""


@dataclass(frozen=True, slots=True)
class Turn:
    r"""What one side says, word for word, with `<image>` where a picture stands.

    Example:
        >>> Turn("user", "What is this?\n<image>").message
        {'role': 'user', 'content': [{'type': 'text', 'text': 'What is this?\n'}, {'type': 'image'}]}
    """

    role: Role
    text: str

    @property
    def marks(self) -> int:
        """How many pictures the turn shows."""
        return self.text.count(MARK)

    @property
    def words(self) -> str:
        """The text without its marks."""
        return self.text.replace(MARK, "")

    @property
    def message(self) -> dict[str, Any]:
        """The turn as chat templates of transformers take it: parts in the order in which they stand."""
        pieces = re.split(f"({re.escape(MARK)})", self.text)
        parts = [{"type": "image"} if piece == MARK else {"type": "text", "text": piece} for piece in pieces if piece]
        return {"role": self.role, "content": parts}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One checked row: as many `<image>` marks in its turns as names in `images`. A system turn comes first.

    `index` is the row's number in the file, counted before anything was left out; it is what becomes
    `row_key`.
    """

    index: int
    id: str
    images: tuple[ImageSource, ...]
    turns: tuple[Turn, ...]

    @property
    def answers(self) -> int:
        """How many turns there are to learn from."""
        return sum(turn.role == "assistant" for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that cannot be used, and why."""

    index: int
    id: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.index} (id {self.id!r}): {self.reason}"


@dataclass(frozen=True)
class ConversationFile:
    """The usable rows of a file, the rows that were skipped, and how the images are reached.

    Args:
        path: the file.
        images: folder of the images.
        rows: usable rows, in the order of the file.
        skipped: rows that were left out.
        leading_answers_dropped: answers left out because nobody asked for them.
        follow_links: see `read_conversations`, as for the next three.
        allow_absolute: whether absolute image names are opened.
        open_url: opens images that are named by a URL.
        decoding: how images become RGB.
        unread: of each key that was not read, in how many usable rows it stands.
    """

    path: Path
    images: Path | None
    rows: tuple[Conversation, ...]
    skipped: tuple[Problem, ...] = ()
    leading_answers_dropped: int = 0
    follow_links: bool = False
    allow_absolute: bool = False
    open_url: UrlOpener | None = None
    decoding: ImageDecoding = AS_SHOWN
    unread: Mapping[str, int] = field(default_factory=dict)

    def without(self, problems: Iterable[Problem]) -> "ConversationFile":
        """The same file with the rows that `problems` name moved to `skipped`.

        Example:
            >>> rows = tuple(Conversation(i, str(i), (), (Turn("assistant", "yes"),)) for i in range(3))
            >>> file = ConversationFile(Path("talk.json"), None, rows)
            >>> less = file.without([Problem(1, "1", "unreadable picture")])
            >>> [row.index for row in less.rows], str(less.skipped[0])
            ([0, 2], "row 1 (id '1'): unreadable picture")
        """
        named = {problem.index: problem for problem in problems}
        rows = tuple(row for row in self.rows if row.index not in named)
        gone = tuple(named[row.index] for row in self.rows if row.index in named)
        return replace(self, rows=rows, skipped=self.skipped + gone)
