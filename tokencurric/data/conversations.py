"""What a file of conversations holds: turns, rows, the rows that were left out and why."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

MARK = "<image>"
"""Where a picture stands in the text of a LLaVA conversation."""

Role = Literal["user", "assistant"]


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
    def message(self) -> dict[str, Any]:
        """The turn as chat templates of transformers take it: parts in the order in which they stand."""
        pieces = re.split(f"({re.escape(MARK)})", self.text)
        parts = [{"type": "image"} if piece == MARK else {"type": "text", "text": piece} for piece in pieces if piece]
        return {"role": self.role, "content": parts}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One checked row: as many `<image>` marks in its turns as names in `images`.

    `index` is the row's number in the file, counted before anything was left out; it is what becomes
    `row_key`.
    """

    index: int
    id: str
    images: tuple[str, ...]
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
    """The usable rows of a file, the rows that were skipped, and the folder that the pictures lie in."""

    path: Path
    images: Path | None
    rows: tuple[Conversation, ...]
    skipped: tuple[Problem, ...] = ()
    leading_answers_dropped: int = 0
    follow_links: bool = False

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
