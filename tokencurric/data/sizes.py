"""How long rows become, pictures included, without opening more than one picture."""

from dataclasses import dataclass
from itertools import islice

from tokencurric.data.collator import ConversationCollator
from tokencurric.data.conversations import ConversationFile
from tokencurric.data.dataset import row_images
from tokencurric.data.sample import Sample
from tokencurric.errors import DataError, ShapeError

_AT_ONCE = 1000  # rows
_TRIED = 100  # rows with images


@dataclass(frozen=True)
class RowSizes:
    """Of each row of a data set, in its order: all its tokens, and its pictures.

    Args:
        tokens: text and visual tokens. pictures: how many; 0 is a text-only row.

    Raises:
        ShapeError: the two are not of the same rows.

    Example:
        >>> RowSizes((700, 40), (1, 0)).text_only
        (False, True)
    """

    tokens: tuple[int, ...]
    pictures: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.pictures):
            raise ShapeError(
                f"RowSizes needs tokens and pictures of the same rows; got {len(self.tokens)} and "
                f"{len(self.pictures)}. Each is one number a row. Count them in the order of the data set."
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def text_only(self) -> tuple[bool, ...]:
        """Which rows have no picture."""
        return tuple(count == 0 for count in self.pictures)


def measure_rows(file: ConversationFile, collate: ConversationCollator) -> RowSizes:
    """Tokens and pictures of each row, as `collate` will make them.

    Texts are rendered and tokenized, some thousand rows a second. One picture is opened (the next one, where it does
    not open), and all are taken to become as many tokens, which is so in LLaVA-1.5 and a fair guess in models whose
    pictures have tokens by their size.

    Args:
        file: what `read_conversations` returned. collate: the collator of the training; rows longer than its
            `max_length` count as long as that.

    Returns:
        Sizes in the order of `file.rows`, which is that of a `ConversationDataset`.

    Raises:
        DataError: none of the first pictures opens.

    Example:
        >>> measure_rows(read_conversations("talk.json", images="pictures"), collate)  # doctest: +SKIP
        RowSizes(tokens=(635, 702, 58), pictures=(1, 1, 0))
    """
    more = _expansion(file, collate)
    lengths: list[int] = []
    for start in range(0, len(file.rows), _AT_ONCE):
        lengths += collate.encoder.text_lengths([row.turns for row in file.rows[start : start + _AT_ONCE]])
    pictures = tuple(len(row.images) for row in file.rows)
    tokens = [length + more * count for length, count in zip(lengths, pictures, strict=True)]
    if collate.max_length is not None:
        tokens = [min(length, collate.max_length) for length in tokens]
    return RowSizes(tuple(tokens), pictures)


def _expansion(file: ConversationFile, collate: ConversationCollator) -> int:
    """By how many tokens an image is longer than its mark, of the first row whose images open."""
    first: DataError | None = None
    for row in islice((row for row in file.rows if row.images), _TRIED):
        try:
            return collate.encoder.expansion(Sample(row.index, row.id, row.turns, row_images(file, row)))
        except DataError as error:
            first = first or error
    if first is not None:
        raise first
    return 0
