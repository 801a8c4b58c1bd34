"""Look at all of the data before training on any of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader, Dataset

from tokencurric.data.conversations import Conversation, ConversationFile, Problem
from tokencurric.data.dataset import row_images
from tokencurric.data.encoding import ChatEncoder
from tokencurric.data.sample import Sample
from tokencurric.errors import DataError

Collate = Callable[[Sequence[Sample]], Any]


@dataclass(frozen=True)
class Preflight:
    """What is in a conversation file; print it.

    Args:
        rows: usable rows.
        text_only: rows without an image.
        turns: turns of all rows, system turns included.
        answers: turns to learn from.
        images: images as rows show them.
        files: how many different ones these are.
        opened: whether the images were opened.
        skipped: rows left out when the file was read.
        problems: rows whose images do not open, or that the collator refuses.
        systems: rows with a system turn.
        unread: of each key that was not read, in how many rows it stands.
        spelled: rows whose words spell control tokens, which stay text; None where no collator was given.
        collated: whether the collator was run.
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
    systems: int = 0
    unread: Mapping[str, int] = field(default_factory=dict)
    spelled: int | None = None
    collated: bool = False

    @property
    def summary(self) -> str:
        """The counts, without the rows left out."""
        trust = "all opened" if self.opened else "not opened"
        lines = [
            f"{self.rows} rows ({self.text_only} text-only), {self.turns} turns, {self.answers} answers",
            f"{self.images} images ({self.files} files, {trust})",
            f"{len(self.skipped)} rows skipped, {len(self.problems)} rows with problems",
        ]
        if self.systems:
            lines.append(f"{self.systems} rows with a system turn")
        if self.spelled:
            lines.append(f"{self.spelled} rows spell control tokens, which stay text")
        if self.unread:
            counts = sorted(self.unread.items(), key=lambda item: (-item[1], item[0]))
            lines.append("keys not read: " + ", ".join(f"{key} ({count} rows)" for key, count in counts))
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join([self.summary, *(f"  {problem}" for problem in self.skipped + self.problems)])


def preflight(
    file: ConversationFile, *, open_images: bool = False, collate: Collate | None = None, workers: int = 0
) -> Preflight:
    """Count what a file holds and find the rows that would stop a training run.

    Args:
        file: what `read_conversations` returned; its text and paths are checked already.
        open_images: decode every picture too. Slow on large data, and the only way to find files cut short.
        collate: collator of the training; each row is opened and collated alone, which also finds what the processor,
            the chat template or `max_length` refuse. None leaves that out.
        workers: processes that open and collate; 0 does it in this one.

    Returns:
        The counts, and a problem for each row that would fail; hand these to `file.without`.

    Example:
        >>> from pathlib import Path
        >>> from tokencurric.data import Turn
        >>> row = Conversation(0, "a", (), (Turn("user", "2+2?"), Turn("assistant", "4")))
        >>> print(preflight(ConversationFile(Path("talk.json"), None, (row,))))
        1 rows (1 text-only), 2 turns, 1 answers
        0 images (0 files, not opened)
        0 rows skipped, 0 rows with problems
    """
    opened = open_images or collate is not None
    tried = DataLoader(_Tried(file, collate), batch_size=None, num_workers=workers) if opened else ()
    encoder = getattr(collate, "encoder", None)
    spells = encoder.control.spells if isinstance(encoder, ChatEncoder) else None
    return Preflight(
        rows=len(file.rows),
        text_only=sum(not row.images for row in file.rows),
        turns=sum(len(row.turns) for row in file.rows),
        answers=sum(row.answers for row in file.rows),
        images=sum(len(row.images) for row in file.rows),
        files=len({name for row in file.rows for name in row.images}),
        opened=opened,
        skipped=file.skipped,
        problems=tuple(problem for problem in tried if problem is not None),
        systems=sum(row.turns[0].role == "system" for row in file.rows),
        unread=dict(file.unread),
        spelled=None if spells is None else sum(spells(row.turns) for row in file.rows),
        collated=collate is not None,
    )


class _Tried(Dataset[Problem | None]):
    """Of each row, what is wrong with it."""

    def __init__(self, file: ConversationFile, collate: Collate | None) -> None:
        self.file, self.collate = file, collate

    def __len__(self) -> int:
        return len(self.file.rows)

    def __getitem__(self, position: int) -> Problem | None:
        row = self.file.rows[position]
        try:
            images = row_images(self.file, row)
            if self.collate is not None:
                self.collate([Sample(row.index, row.id, row.turns, images, str(self.file.path))])
        except DataError as error:
            return Problem(row.index, row.id, str(error))
        except MemoryError:
            raise
        except Exception as error:  # a collator of the user's own may raise anything
            return _unknown(row, error)
        return None


def _unknown(row: Conversation, error: Exception) -> Problem:
    return Problem(row.index, row.id, f"the collator refuses it: {type(error).__name__}: {error}")
