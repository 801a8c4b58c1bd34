"""How many tokens each decoder layer sees."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokencurric.errors import RangeError
from tokencurric.token_budget import TokenBudget


@dataclass(frozen=True)
class PromptShape:
    """A prompt's tokens: `visual`, all pictures together, and `text`, everything else.

    Raises:
        RangeError: a number is negative.

    Example:
        >>> PromptShape(visual=576, text=40).length
        616
    """

    visual: int
    text: int

    def __post_init__(self) -> None:
        if self.visual < 0 or self.text < 0:
            raise RangeError(f"PromptShape needs counts >= 0; got {self}. They are numbers of tokens.")

    @property
    def length(self) -> int:
        """All tokens."""
        return self.visual + self.text


def tokens_per_layer(
    depth: int, visual: int, *, keep: int | Sequence[int], layer: int | Sequence[int]
) -> tuple[int, ...]:
    """Visual tokens that each decoder layer runs on.

    Args:
        depth: number of layers. visual: tokens before the first cut.
        keep: tokens that stay, each count of the original ones. layer: first layer that runs on them; one for each
            count, ascending.

    Returns:
        A count a layer; their mean is the "layer average" that some papers mean by "64 tokens".

    Raises:
        RangeError: cuts are not ascending layers of the decoder with counts that never grow.

    Example:
        >>> counts = tokens_per_layer(6, 144, keep=16, layer=2)
        >>> counts, round(sum(counts) / 6, 1)
        ((144, 144, 16, 16, 16, 16), 58.7)
        >>> tokens_per_layer(4, 100, keep=[50, 10], layer=[1, 3])
        (100, 50, 50, 10)
    """
    return TokenBudget(keep=keep, layer=layer).per_layer(visual, depth)
