"""Samples to generation prompts with the answers that were expected, for measuring accuracy."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from tokencurric.data.encoding import ChatEncoder
from tokencurric.data.sample import Sample
from tokencurric.data.template import Processor
from tokencurric.errors import DataError, RangeError


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts: `model.generate(**prompts.inputs)`, then compare with `references`."""

    inputs: dict[str, Tensor]
    references: tuple[str, ...]
    row_key: Int[Tensor, " batch"]


class PromptCollator:
    """Turns samples into prompts that end where an answer begins.

    Prompts are token for token what stands before that answer in a training batch of `ConversationCollator`.

    Args:
        processor: as for `ConversationCollator`.
        template: as for `ConversationCollator`.
        end_token: as for `ConversationCollator`.
        square: as for `ConversationCollator`.
        allowed_special: as for `ConversationCollator`.
        answer: "last" asks for a row's last answer, everything before it given; "first" for its first answer
            to a question.

    Raises:
        RangeError: an option is none of its values. UnsupportedModelError: processor or template lack
            something.
        DataError: on call, a row in which nobody asks and is answered; the text names it.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlavaProcessor, PreTrainedTokenizerFast
        >>> from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        >>> from tokencurric.data import VICUNA_V1, Turn
        >>> words = Tokenizer(models.WordLevel({"<unk>": 0, "ASSISTANT": 1, ":": 2}, unk_token="<unk>"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(
        ...     tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="<pad>",
        ...     additional_special_tokens=["<image>"],
        ... )
        >>> processor = LlavaProcessor(CLIPImageProcessorPil(), tokenizer, patch_size=14)
        >>> collate = PromptCollator(processor, template=VICUNA_V1)
        >>> prompts = collate([Sample(0, "a", (Turn("user", "no?"), Turn("assistant", "yes")), ())])
        >>> tokenizer.convert_ids_to_tokens(prompts.inputs["input_ids"][0, -2:].tolist()), prompts.references
        (['ASSISTANT', ':'], ('yes',))
    """

    def __init__(
        self,
        processor: Processor,
        *,
        template: str | None = None,
        end_token: str | None = None,
        answer: Literal["last", "first"] = "last",
        square: Literal["crop", "pad"] = "crop",
        allowed_special: Collection[str] = (),
    ) -> None:
        if answer not in ("last", "first"):
            raise RangeError(
                f"PromptCollator needs answer to be 'last' or 'first'; got answer={answer!r}. Choose one of them."
            )
        self.encoder = ChatEncoder(
            processor, template=template, end_token=end_token, square=square, allowed_special=allowed_special
        )
        self.answer = answer

    def __call__(self, samples: Sequence[Sample]) -> Prompts:
        """Collate samples.

        Args:
            samples: at least one.

        Returns:
            Prompts, and the answers as the data has them.

        Raises:
            DataError: there is no sample, or one has no question with an answer.
        """
        if not samples:
            raise DataError("PromptCollator needs samples; got samples=[]. A batch has at least one row. Pass one.")
        asked = [self._asked(sample) for sample in samples]
        heads = [sample.head(turn) for sample, turn in zip(samples, asked, strict=True)]
        encoded = self.encoder(heads, padding_side="left", generation_prompt=True)
        references = tuple(sample.turns[turn].text for sample, turn in zip(samples, asked, strict=True))
        return Prompts(encoded.inputs, references, torch.tensor([sample.row_key for sample in samples]))

    def _asked(self, sample: Sample) -> int:
        """The number of the turn to be predicted."""
        pairs = enumerate(pairwise(sample.turns), start=1)
        replies = [n for n, (before, turn) in pairs if before.role == "user" and turn.role == "assistant"]
        if not replies:
            raise DataError(
                f"PromptCollator needs a question with an answer in every row; got none in {sample}. There "
                "is nothing to compare with. Leave the row out."
            )
        return replies[-1] if self.answer == "last" else replies[0]
