"""Look at all of the data before training on any of it."""

from dataclasses import dataclass

from tokencurric.data.conversations import Conversation, ConversationFile, Problem
from tokencurric.data.dataset import row_images
from tokencurric.errors import DataError


@dataclass(frozen=True)
class Preflight:
    """What is in a conversation file; print it.

    `images` counts pictures as rows show them, `files` how many different ones they are; `problems` are the
    rows whose pictures do not open, `skipped` the rows left out when the file was read.
    """

    rows: int
    text_only: int
    turns: int
    answers: int
    images: int
    files: int
    opened: bool
    skipped: tuple[Problem, ...]
    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        trust = "all opened" if self.opened else "not opened"
        lines = [
            f"{self.rows} rows ({self.text_only} text-only), {self.turns} turns, {self.answers} answers",
            f"{self.images} images ({self.files} files, {trust})",
            f"{len(self.skipped)} rows skipped, {len(self.problems)} rows with problems",
        ]
        return "\n".join(lines + [f"  {problem}" for problem in self.skipped + self.problems])


def preflight(file: ConversationFile, *, open_images: bool = False) -> Preflight:
    """Count what a file holds and find the pictures that would stop a training run.

    Args:
        file: what `read_conversations` returned; its text and paths are checked already.
        open_images: decode every picture too. Slow on large data, and the only way to find files cut short.

    Returns:
        The counts, and a problem for each row whose pictures do not open; hand these to `file.without`.

    Example:
        >>> from pathlib import Path
        >>> from tokencurric.data import Turn
        >>> row = Conversation(0, "a", (), (Turn("user", "2+2?"), Turn("assistant", "4")))
        >>> print(preflight(ConversationFile(Path("talk.json"), None, (row,))))
        1 rows (1 text-only), 2 turns, 1 answers
        0 images (0 files, not opened)
        0 rows skipped, 0 rows with problems
    """
    return Preflight(
        rows=len(file.rows),
        text_only=sum(not row.images for row in file.rows),
        turns=sum(len(row.turns) for row in file.rows),
        answers=sum(row.answers for row in file.rows),
        images=sum(len(row.images) for row in file.rows),
        files=len({name for row in file.rows for name in row.images}),
        opened=open_images,
        skipped=file.skipped,
        problems=tuple(filter(None, (_problem(file, row) for row in file.rows))) if open_images else (),
    )


def _problem(file: ConversationFile, row: Conversation) -> Problem | None:
    try:
        row_images(file, row)
    except DataError as error:
        return Problem(row.index, row.id, str(error))
    return None
