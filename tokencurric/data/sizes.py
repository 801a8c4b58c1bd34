"""How long rows become, pictures included, without opening more than one picture."""

from dataclasses import dataclass

from tokencurric.data.collator import ConversationCollator
from tokencurric.data.conversations import ConversationFile
from tokencurric.data.dataset import row_images
from tokencurric.data.sample import Sample
from tokencurric.errors import ShapeError

_AT_ONCE = 1000  # rows


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

    Texts are rendered and tokenized, some thousand rows a second. One picture is opened, and all are taken to become as
    many tokens, which is so in LLaVA-1.5 and a fair guess in models whose pictures have tokens by their size.

    Args:
        file: what `read_conversations` returned. collate: the collator of the training; rows longer than its
            `max_length` count as long as that.

    Returns:
        Sizes in the order of `file.rows`, which is that of a `ConversationDataset`.

    Raises:
        DataError: the one picture does not open.

    Example:
        >>> measure_rows(read_conversations("talk.json", images="pictures"), collate)  # doctest: +SKIP
        RowSizes(tokens=(635, 702, 58), pictures=(1, 1, 0))
    """
    shown, more = next((row for row in file.rows if row.images), None), 0
    if shown is not None:
        sample = Sample(shown.index, shown.id, shown.turns, row_images(file, shown))
        more = collate.encoder.expansion(sample)
    lengths: list[int] = []
    for start in range(0, len(file.rows), _AT_ONCE):
        lengths += collate.encoder.text_lengths([row.turns for row in file.rows[start : start + _AT_ONCE]])
    pictures = tuple(len(row.images) for row in file.rows)
    tokens = [length + more * count for length, count in zip(lengths, pictures, strict=True)]
    if collate.max_length is not None:
        tokens = [min(length, collate.max_length) for length in tokens]
    return RowSizes(tuple(tokens), pictures)
