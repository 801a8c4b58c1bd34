"""One conversation with its pictures opened: what a dataset hands to a collator."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tokencurric.data.conversations import Turn
from tokencurric.errors import DataError

if TYPE_CHECKING:
    import PIL.Image


@dataclass(frozen=True)
class Sample:
    """A conversation ready for a processor.

    Args:
        row_key: the sample's number in the data; what randomness is keyed by, so it must not depend on the
            batch.
        id: what errors call it.
        turns: who says what; each `<image>` mark stands for the next of `images`.
        images: RGB pictures, as many as there are marks.
        file: what errors call the file that the row is from.

    Raises:
        DataError: there is no turn, or marks and pictures differ in number.

    Example:
        >>> sample = Sample(3, "c", (Turn("user", "2+2?"), Turn("assistant", "4")), ())
        >>> [message["role"] for message in sample.messages]
        ['user', 'assistant']
    """

    row_key: int
    id: str
    turns: tuple[Turn, ...]
    images: "tuple[PIL.Image.Image, ...]"
    file: str = ""

    def __post_init__(self) -> None:
        if not self.turns:
            raise DataError(f"Sample needs at least one turn; got turns=() in {self}. Nobody speaks. Leave it out.")
        marks = sum(turn.marks for turn in self.turns)
        if marks != len(self.images):
            raise DataError(
                f"Sample needs one picture per <image> mark; got {marks} mark(s) and {len(self.images)} "
                f"picture(s) in {self}. Which picture belongs where would be a guess. Correct the turns or "
                "the pictures."
            )

    def __str__(self) -> str:
        return f"row {self.row_key} (id {self.id!r})" + (f" of {self.file}" if self.file else "")

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The turns as chat templates of transformers take them."""
        return [turn.message for turn in self.turns]

    def head(self, turns: int) -> "Sample":
        """The first turns, with the pictures that stand in them."""
        kept = self.turns[:turns]
        return replace(self, turns=kept, images=self.images[: sum(turn.marks for turn in kept)])
