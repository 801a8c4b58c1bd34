"""Samples to training batches: inputs, labels on the answers, row keys."""

from collections.abc import Callable, Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

from tokencurric.data.encoding import ChatEncoder, Encoded, Side
from tokencurric.data.sample import Sample
from tokencurric.data.template import Processor
from tokencurric.errors import DataError, RangeError

_TRIED = 100  # stand-ins after each other before it is clear that something else is wrong
IGNORED = -100
"""The label of a token that is not learned."""


class ConversationCollator:
    """Turns samples into a batch that a Hugging Face vision-language model trains on.

    The batch holds what the processor gives (`input_ids`, `attention_mask` and, if any row has a picture,
    `pixel_values`), `labels` [batch, seq] that repeat the tokens of answers and their end tokens and are -100
    elsewhere, and `row_key` [batch], each sample's number in the data.

    Args:
        processor: a Hugging Face processor with a fast tokenizer; LLaVA's is the one that is tested.
        template: chat template with generation tags; `VICUNA_V1` for LLaVA-1.5. None: the processor's own.
        end_token: what ends an answer; None: the tokenizer's end-of-sequence token.
        max_length: longest row in tokens, pictures included; None: any. Rows are never cut inside a turn.
        too_long: "raise", or "drop_turns": leave out the last turns, whole, until the row fits.
        padding_side: where shorter rows are filled up.
        square: "crop" leaves pictures to the processor, "pad" makes them square with the mean colour first,
            as LLaVA-1.5 was trained.
        allowed_special: control tokens that the text of rows may spell, such as `<|box_start|>`. Every other special
            token, `</s>` say, is text where the data spells it and never becomes the token.
        stand_in: called with a row that cannot be collated and the error, returns the row that takes its place, as
            `ConversationDataset.stand_in` does. None raises the error.

    Raises:
        RangeError: an option is out of its range. UnsupportedModelError: processor or template lack
            something.
        DataError: on call, a row that is too long, or has nothing to learn; the text names it.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlavaProcessor, PreTrainedTokenizerFast
        >>> from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        >>> from tokencurric.data import VICUNA_V1, Turn
        >>> words = Tokenizer(models.WordLevel({"<unk>": 0, "yes": 1, "no": 2}, unk_token="<unk>"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(
        ...     tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="<pad>",
        ...     additional_special_tokens=["<image>"],
        ... )
        >>> processor = LlavaProcessor(CLIPImageProcessorPil(), tokenizer, patch_size=14)
        >>> collate = ConversationCollator(processor, template=VICUNA_V1)
        >>> batch = collate([Sample(0, "a", (Turn("user", "no?"), Turn("assistant", "yes")), ())])
        >>> learned = batch["labels"][batch["labels"] != -100]
        >>> tokenizer.convert_ids_to_tokens(learned.tolist())
        ['yes', '</s>']
    """

    def __init__(
        self,
        processor: Processor,
        *,
        template: str | None = None,
        end_token: str | None = None,
        max_length: int | None = None,
        too_long: Literal["raise", "drop_turns"] = "raise",
        padding_side: Side = "right",
        square: Literal["crop", "pad"] = "crop",
        allowed_special: Collection[str] = (),
        stand_in: Callable[[Sample, DataError], Sample] | None = None,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise RangeError(
                f"ConversationCollator needs max_length >= 1 or None; got max_length={max_length}. "
                "It is a number of tokens. Pass None for no limit."
            )
        if too_long not in ("raise", "drop_turns"):
            raise RangeError(
                "ConversationCollator needs too_long to be 'raise' or 'drop_turns'; got "
                f"too_long={too_long!r}. Choose one of them."
            )
        if padding_side not in ("left", "right"):
            raise RangeError(
                "ConversationCollator needs padding_side to be 'left' or 'right'; got "
                f"padding_side={padding_side!r}. Choose one of them."
            )
        self.encoder = ChatEncoder(
            processor, template=template, end_token=end_token, square=square, allowed_special=allowed_special
        )
        self.stand_in = stand_in
        self.max_length = max_length
        self.too_long = too_long
        self.padding_side: Side = padding_side

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collate samples.

        Args:
            samples: at least one.

        Returns:
            The batch.

        Raises:
            DataError: a row is too long or has nothing to learn.
        """
        if not samples:
            raise DataError(
                "ConversationCollator needs samples; got samples=[]. A batch has at least one row. Pass one."
            )
        try:
            return self._collated(samples)
        except DataError:
            if self.stand_in is None:
                raise
            return self._collated([self._sound(sample, self.stand_in) for sample in samples])

    def _sound(self, sample: Sample, stand_in: Callable[[Sample, DataError], Sample]) -> Sample:
        """The row itself, or the first of its stand-ins that can be collated."""
        for _ in range(_TRIED):
            try:
                self._collated([sample])
            except DataError as error:
                sample = stand_in(sample, error)
            else:
                return sample
        raise DataError(
            f"{_TRIED} rows up to {sample} cannot be collated, though each stood in for the one before.\n"
            "Hint: look at max_length and the processor, which refuse too much."
        )

    def _collated(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        encoded = self.encoder(samples, padding_side=self.padding_side)
        fitting = self._shortened(samples, encoded)
        if fitting != list(samples):
            encoded = self.encoder(fitting, padding_side=self.padding_side)
        for sample, learns in zip(samples, encoded.answers.any(-1).tolist(), strict=True):
            if not learns:
                raise DataError(
                    f"ConversationCollator needs an answer in every row; got none in {sample}. No token "
                    "would be learned. Leave the row out."
                )
        ids = encoded.inputs["input_ids"]
        labels = ids.masked_fill(~encoded.answers, IGNORED)
        row_key = torch.tensor([sample.row_key for sample in samples])
        return {**encoded.inputs, "labels": labels, "row_key": row_key}

    def _shortened(self, samples: Sequence[Sample], encoded: Encoded) -> list[Sample]:
        if self.max_length is None:
            return list(samples)
        fitting = []
        for sample, length, expansions in zip(samples, encoded.lengths.tolist(), encoded.expansions, strict=True):
            kept = sample if length <= self.max_length else None
            if kept is None and self.too_long == "drop_turns":
                heads = (sample.head(n) for n in range(len(sample.turns) - 1, 0, -1))
                ending_in_answer = (head for head in heads if head.turns[-1].role == "assistant")
                kept = next(
                    (h for h in ending_in_answer if self.encoder.length(h, expansions) <= self.max_length),
                    None,
                )
            if kept is None:
                advice = (
                    'Pass a larger max_length, or too_long="drop_turns" to leave out last turns whole.'
                    if self.too_long == "raise"
                    else "Even its first answer does not fit. Pass a larger max_length, or leave the row out."
                )
                raise DataError(
                    f"ConversationCollator needs rows of at most max_length={self.max_length} tokens; got "
                    f"{length} in {sample}. Cutting would tear answers or pictures apart. {advice}"
                )
            fitting.append(kept)
        return fitting
