"""Checked conversations as a torch dataset that opens pictures as they are asked for."""

from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from tokencurric.data.conversations import Conversation, ConversationFile
from tokencurric.data.paths import locate_image
from tokencurric.data.pictures import open_picture
from tokencurric.data.sample import Sample
from tokencurric.errors import DataError

if TYPE_CHECKING:
    import PIL.Image


class ConversationDataset(Dataset[Sample]):
    """The rows of a conversation file, pictures opened on access.

    Access raises DataError, naming row and file, where a picture cannot be opened. `preflight(file,
    open_images=True)` finds all of those beforehand, and `file.without(report.problems)` leaves them out.

    Args:
        file: what `read_conversations` returned.

    Example:
        >>> from pathlib import Path
        >>> from tokencurric.data import Turn
        >>> row = Conversation(5, "a", (), (Turn("user", "2+2?"), Turn("assistant", "4")))
        >>> ConversationDataset(ConversationFile(Path("talk.json"), None, (row,)))[0].row_key
        5
    """

    def __init__(self, file: ConversationFile) -> None:
        self.file = file

    def __len__(self) -> int:
        return len(self.file.rows)

    def __getitem__(self, position: int) -> Sample:
        row = self.file.rows[position]
        return Sample(row.index, row.id, row.turns, row_images(self.file, row))


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
    if not row.images:
        return ()
    if file.images is None:
        raise DataError(
            f"ConversationDataset needs an image folder; got images=None for row {row.index} (id {row.id!r}) "
            f"with {len(row.images)} picture(s). File names alone cannot be opened. Pass images= to "
            "read_conversations."
        )
    opened = []
    for name in row.images:
        try:
            opened.append(open_picture(locate_image(file.images, name, follow_links=file.follow_links)))
        except DataError as error:
            raise DataError(
                f"ConversationDataset needs pictures that open; got image={name!r} in row {row.index} "
                f"(id {row.id!r}). {error} preflight(file, open_images=True) finds all such rows at once."
            ) from error
    return tuple(opened)
