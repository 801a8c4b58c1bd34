"""Checked conversations as a torch dataset that opens images as they are asked for."""

import bisect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch.utils.data import Dataset

from tokencurric.data.conversations import Conversation, ConversationFile, EmbeddedImage, ImageSource, Problem
from tokencurric.data.left_out import read_left_out, write_left_out
from tokencurric.data.paths import is_url, locate_image
from tokencurric.data.pictures import open_picture
from tokencurric.data.sample import Sample
from tokencurric.errors import DataError, RangeError

if TYPE_CHECKING:
    import PIL.Image

_TRIED = 100  # bad rows after each other before it is clear that something else is wrong
_LOG = logging.getLogger(__name__)


class ConversationDataset(Dataset[Sample]):
    """The rows of a conversation file, images opened on access.

    With `on_error="raise"`, access raises DataError, naming row and file, where an image cannot be opened.
    `preflight(file, collate=collator)` finds all bad rows beforehand, and `file.without(report.problems)` leaves them
    out.

    With `on_error="skip"`, the next row with images (for a text-only row, the next one without) that opens stands in
    for a bad one. Which one follows from the files alone, not from when, where or after which restart it is asked for;
    length and order of an epoch stay as they are. Pass `stand_in` to the collator too, so that rows that the processor
    refuses are treated alike. Each row left out is logged once, counted in `left_out`, and written to `record`.

    Args:
        file: what `read_conversations` returned.
        on_error: "raise" or "skip".
        record: file to which rows left out are added, one JSON object per line, by all processes that use the data.
            Rows of the same file that it names already are counted from the start, so a resumed run goes on counting. A
            row may stand in it more than once where several runs or ranks meet it. None: no file.

    Raises:
        RangeError: `on_error` is none of its values.
        DataError: on access, the row is bad and `on_error="raise"`, or no row can stand in for it.

    Example:
        >>> from pathlib import Path
        >>> from tokencurric.data import Turn
        >>> row = Conversation(5, "a", (), (Turn("user", "2+2?"), Turn("assistant", "4")))
        >>> ConversationDataset(ConversationFile(Path("talk.json"), None, (row,)))[0].row_key
        5
    """

    def __init__(
        self,
        file: ConversationFile,
        *,
        on_error: Literal["raise", "skip"] = "raise",
        record: str | Path | None = None,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise RangeError(f"on_error must be 'raise' or 'skip'; got {on_error!r}.\nHint: choose one of them.")
        self.file, self.on_error = file, on_error
        self.record = None if record is None else Path(record)
        self._indices = [row.index for row in file.rows]
        # Shared with the processes that load data, which are the ones that meet bad rows.
        self._bad = torch.zeros(len(file.rows) if on_error == "skip" else 0, dtype=torch.bool).share_memory_()
        if on_error == "skip" and self.record is not None:
            for index in read_left_out(self.record, file):
                position = self._position(index)
                if position is not None:
                    self._bad[position] = True

    def __len__(self) -> int:
        return len(self.file.rows)

    def __getitem__(self, position: int) -> Sample:
        try:
            return self._opened(position)
        except DataError as error:
            if self.on_error == "raise":
                raise
            return self._next(position, error)

    @property
    def left_out(self) -> tuple[int, ...]:
        """Numbers, in the file, of the rows that others stood in for so far, in this process and its data loaders."""
        return tuple(self._indices[position] for position in self._bad.nonzero().flatten().tolist())

    def stand_in(self, sample: Sample, error: DataError) -> Sample:
        """The row that takes the place of one that cannot be collated.

        Args:
            sample: the bad row, as this data set returned it.
            error: why it is bad.

        Returns:
            The next row of its kind that opens.

        Raises:
            DataError: `error`, if the data set does not skip rows or has no other one.
        """
        position = self._position(sample.row_key)
        if self.on_error == "raise" or position is None:
            raise error
        return self._next(position, error)

    def _opened(self, position: int) -> Sample:
        row = self.file.rows[position]
        return Sample(row.index, row.id, row.turns, row_images(self.file, row), str(self.file.path))

    def _next(self, position: int, error: DataError) -> Sample:
        self._note(position, error)
        rows, tried = self.file.rows, 0
        for step in range(1, len(rows)):
            other = (position + step) % len(rows)
            if bool(rows[other].images) != bool(rows[position].images):
                continue
            try:
                return self._opened(other)
            except DataError as also:
                self._note(other, also)
            tried += 1
            if tried == _TRIED:
                break
        raise DataError(
            f"row {self._indices[position]} of {self.file.path} is bad, and none of {tried} others can stand in.\n"
            f"Hint: look at the image folder; the row was refused so: {error}"
        ) from error

    def _position(self, index: int) -> int | None:
        at = bisect.bisect_left(self._indices, index)
        return at if at < len(self._indices) and self._indices[at] == index else None

    def _note(self, position: int, error: DataError) -> None:
        if self._bad[position]:
            return
        self._bad[position] = True
        row = self.file.rows[position]
        problem = Problem(row.index, row.id, str(error))
        _LOG.warning("%d row(s) of %s left out so far; %s", int(self._bad.sum()), self.file.path, problem)
        if self.record is not None:
            write_left_out(self.record, self.file, [problem])


def row_images(file: ConversationFile, row: Conversation) -> "tuple[PIL.Image.Image, ...]":
    """The pictures of a row, in the order of its marks.

    Paths are checked against the image folder once more: the folder may have changed since the file was read.

    Args:
        file: the file that the row is from.
        row: one of its rows.

    Returns:
        Decoded RGB pictures.

    Raises:
        DataError: a picture cannot be opened; the text names row and file.

    Example:
        >>> from pathlib import Path
        >>> row_images(ConversationFile(Path("talk.json"), None, ()), Conversation(0, "a", (), ()))
        ()
    """
    opened = []
    for source in row.images:
        try:
            opened.append(_open(file, row, source))
        except DataError as error:
            raise DataError(
                f"ConversationDataset needs pictures that open; got image={source!r} in row {row.index} "
                f"(id {row.id!r}) of {file.path}. {error} preflight(file, open_images=True) finds all such rows."
            ) from error
    return tuple(opened)


def _open(file: ConversationFile, row: Conversation, source: ImageSource) -> "PIL.Image.Image":
    if isinstance(source, EmbeddedImage):
        return open_picture(source.content, file.decoding)
    if is_url(source) and file.open_url is not None:
        try:
            content = file.open_url(source)
        except Exception as error:  # whatever a function of the user's raises, one row is to blame
            raise DataError(f"open_url({source!r}) must return bytes; it raised {error!r}.") from error
        return open_picture(content, file.decoding)
    path = locate_image(file.images, source, follow_links=file.follow_links, allow_absolute=file.allow_absolute)
    return open_picture(path, file.decoding)
