"""The contract of a compressor."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Bool
from torch import Tensor

from tokencurric.budget import Budget
from tokencurric.view import Signal, VisualView


@dataclass(frozen=True, kw_only=True)
class Tags:
    """Which laws a compressor claims. The test kit holds it to them.

    Args:
        exact: each row keeps min(keep, its number of tokens).
        nested: under one seed the survivors of a smaller budget are among those of a larger one.
        deterministic: the seed does not change the answer.
        uses_position: the order of the tokens matters, so permuting them need not permute the answer.
        stage: where it stands: inside the language model, or before it.

    Example:
        >>> Tags(deterministic=False).nested
        True
    """

    exact: bool = True
    nested: bool = True
    deterministic: bool = True
    uses_position: bool = False
    stage: Literal["in_llm", "pre_llm"] = "in_llm"


@runtime_checkable
class Compressor(Protocol):
    """Decides which visual tokens survive. It sees tensors, never models.

    Laws, for every view, budget and seed:

    - budget: a row keeps exactly min(keep, its tokens), and only tokens, never padding;
    - identity: `keep` at or above a row's number of tokens keeps them all;
    - independence: a row alone, or beside others, or with other padding, gets the same answer;
    - purity: inputs, the process' random state and the compressor are left as they were; same seed, same answer;
    - nested (if tagged): survivors of a smaller budget are among those of a larger one;
    - equivariance (unless tagged `uses_position`): permuting the tokens permutes the answer.

    Scores are compared in float32, ties go to the lower position and NaN ranks last (`tokencurric.ranking`).
    """

    @property
    def needs(self) -> frozenset[Signal]:
        """The signals of `VisualView` that are read."""
        ...

    @property
    def tags(self) -> Tags:
        """The laws that are claimed."""
        ...

    def __call__(self, view: VisualView, keep: Budget, *, seed: int = 0) -> Bool[Tensor, "batch visual"]:
        """The mask of survivors."""
        ...
