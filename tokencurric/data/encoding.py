"""Samples to the tensors a model takes, with the tokens of the answers marked."""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tokencurric.data.conversations import MARK, Turn
from tokencurric.data.pictures import pad_to_square
from tokencurric.data.sample import Sample
from tokencurric.data.spans import Span, shift_spans, tokens_in
from tokencurric.data.special import ControlTokens, control_contents
from tokencurric.data.template import Processor, choose_template, render, written_around
from tokencurric.errors import DataError, RangeError, TokencurricError, UnsupportedModelError

if TYPE_CHECKING:
    import PIL.Image

Side = Literal["left", "right"]
T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """A padded batch.

    `inputs` is what the model takes, `answers` marks the tokens of answers and their end tokens, and
    `expansions` is what each picture's mark became in the text, by row.
    """

    inputs: dict[str, Tensor]
    answers: Bool[Tensor, "batch seq"]
    expansions: tuple[tuple[str, ...], ...]

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Tokens of each row, padding not counted."""
        return self.inputs["attention_mask"].sum(-1)


class ChatEncoder:
    """A processor and a chat template that fit together.

    Pieces are never tokenized on their own: every text is rendered whole, tokenized once, and the template's
        generation
    tags are followed through the expansion of picture marks to tokens by their character offsets.

    Args:
        processor: a Hugging Face processor with a fast tokenizer.
        template, end_token: see `choose_template`.
        square: "pad" fills pictures up to a square with the processor's mean colour, as LLaVA-1.5 was
            trained; "crop" leaves them to the processor, whose centre crop cuts off what sticks out.
        allowed_special: control tokens that the words of a row may spell. All others stay text there.

    Raises:
        UnsupportedModelError: processor or template lack something; the text says what.
        RangeError: `square` is none of its values, or `allowed_special` has the image token.
    """

    def __init__(
        self,
        processor: Processor,
        *,
        template: str | None = None,
        end_token: str | None = None,
        square: Literal["crop", "pad"] = "crop",
        allowed_special: Collection[str] = (),
    ) -> None:
        if square not in ("crop", "pad"):
            raise RangeError(f"ChatEncoder needs square to be 'crop' or 'pad'; got square={square!r}. Choose one.")
        tokenizer: Any = getattr(processor, "tokenizer", None)
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedModelError(
                "ChatEncoder needs a processor with a fast tokenizer; got "
                f"processor={type(processor).__name__} with tokenizer={type(tokenizer).__name__}. Labels are "
                "found by character offsets, which only those give. Load the processor with "
                "AutoProcessor.from_pretrained."
            )
        if tokenizer.pad_token is None:
            raise UnsupportedModelError(
                "ChatEncoder needs a padding token; got pad_token=None. Rows of a batch differ in length. "
                "Set processor.tokenizer.pad_token."
            )
        self.processor = processor
        self.template = choose_template(processor, template, end_token=end_token)
        self.square = square
        if isinstance(allowed_special, str) or processor.image_token in allowed_special:
            raise RangeError(
                f"allowed_special must be a list of tokens without the image token; got {allowed_special!r}.\n"
                f"Hint: each {processor.image_token!r} in the text needs an image; write it as {MARK!r} in the data."
            )
        names = [
            processor.image_token,
            getattr(processor, "video_token", None),
            getattr(processor, "audio_token", None),
        ]
        end = end_token if end_token is not None else tokenizer.eos_token
        around = written_around(self.template, tokenizer.special_tokens_map)
        contents = control_contents(tokenizer, [*names, end], around, allowed=allowed_special)
        self.control = ControlTokens(tokenizer, contents)

    def __call__(self, samples: Sequence[Sample], *, padding_side: Side, generation_prompt: bool = False) -> Encoded:
        """Encode samples as one padded batch.

        Args:
            samples: at least one.
            padding_side: where shorter rows are filled up.
            generation_prompt: end each row with the header of an answer still to come.

        Returns:
            The batch; nothing is ever cut off.

        Raises:
            DataError: the template or the processor refuses a row, or leaves something of it out; the text names the
                row. UnsupportedModelError: the processor does not report where it expanded images.
        """
        return _naming_rows(
            samples,
            lambda some: self._encoded(some, padding_side=padding_side, generation_prompt=generation_prompt),
        )

    def _encoded(self, samples: Sequence[Sample], *, padding_side: Side, generation_prompt: bool) -> Encoded:
        (texts, spans), processor = self._render(samples, generation_prompt=generation_prompt)
        pictures = [[self._fit(picture) for picture in sample.images] for sample in samples]
        out = processor(
            images=pictures if any(pictures) else None,
            text=texts,
            add_special_tokens=self._adds_special_tokens(texts[0]),
            padding=True,
            padding_side=padding_side,
            truncation=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
        )
        replaced = out.pop("text_replacement_offsets", None) or [[] for _ in samples]
        for sample, row in zip(samples, replaced, strict=True):
            if len(row) != len(sample.images):
                raise UnsupportedModelError(
                    f"ChatEncoder needs a processor that reports where it expanded pictures; got {len(row)} "
                    f"report(s) for {len(sample.images)} picture(s) from {type(self.processor).__name__}. "
                    "Labels would slip against the tokens. Use a processor built on ProcessorMixin.__call__, "
                    "such as LlavaProcessor."
                )
        offsets = torch.tensor(out.pop("offset_mapping"))
        answers = torch.stack([_answer_tokens(*row) for row in zip(offsets, spans, replaced, strict=True)])
        inputs: dict[str, Tensor] = dict(out.convert_to_tensors("pt"))
        return Encoded(
            inputs,
            answers,
            tuple(tuple(mark["replacement"] for mark in row) for row in replaced),
        )

    def length(self, sample: Sample, expansions: Sequence[str]) -> int:
        """Tokens of a sample, given what its pictures' marks become; no picture is processed for it."""
        ((text,), _), processor = self._render([sample], generation_prompt=False)
        pieces = text.split(self.processor.image_token)
        text = "".join(piece + fill for piece, fill in zip(pieces, [*expansions[: len(pieces) - 1], ""], strict=True))
        encoded = processor.tokenizer(text, add_special_tokens=self._adds_special_tokens(text), truncation=False)
        return len(encoded["input_ids"])

    def text_lengths(self, conversations: Sequence[Sequence[Turn]]) -> list[int]:
        """Tokens of each conversation with the marks of its pictures as they stand in the text."""
        hidden, processor = self._hide(conversations)
        texts, _ = render(hidden, self.template, special_tokens=self.processor.tokenizer.special_tokens_map)
        special = self._adds_special_tokens(texts[0]) if texts else False
        encoded = processor.tokenizer(texts, add_special_tokens=special, truncation=False) if texts else {}
        return [len(ids) for ids in encoded.get("input_ids", [])]

    def expansion(self, sample: Sample) -> int:
        """By how many tokens the first picture of `sample` is longer than its mark."""
        (marks,) = self([sample], padding_side="right").expansions

        def length(text: str) -> int:
            return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

        return length(marks[0]) - length(self.processor.image_token)

    def spells_control_tokens(self, turns: Sequence[Turn]) -> bool:
        """Whether the words of a conversation spell control tokens, which are kept as text."""
        return self.control.spells(turns)

    def _hide(self, conversations: Sequence[Sequence[Turn]]) -> tuple[Sequence[Sequence[Turn]], Any]:
        """Conversations in which no word spells a control token, and the processor that reads them as they were."""
        if not any(self.control.spells(turns) for turns in conversations):
            return conversations, self.processor
        block = self.control.block(turn.text for turns in conversations for turn in turns)
        processor: Any = copy.copy(self.processor)
        processor.tokenizer = self.control.twin(block)
        return [self.control.hide(turns, block) for turns in conversations], processor

    def _render(
        self, samples: Sequence[Sample], *, generation_prompt: bool
    ) -> tuple[tuple[list[str], list[list[Span]]], Any]:
        token = self.processor.image_token
        if token not in self.control.contents:
            for sample in samples:
                if any(token in piece for turn in sample.turns for piece in turn.text.split(MARK)):
                    raise DataError(
                        "ChatEncoder needs text without the processor's image token; got "
                        f"{token!r} in the words of {sample}. It would be taken for a "
                        "picture. Take it out of the row."
                    )
        try:
            hidden, processor = self._hide([sample.turns for sample in samples])
        except DataError as error:
            spelling = next(sample for sample in samples if self.control.spells(sample.turns))
            raise DataError(f"{spelling} cannot be encoded: {error}") from error
        texts, spans = render(
            hidden,
            self.template,
            special_tokens=self.processor.tokenizer.special_tokens_map,
            generation_prompt=generation_prompt,
        )
        for sample, turns, text, row in zip(samples, hidden, texts, spans, strict=True):
            expected = sum(turn.role == "assistant" for turn in sample.turns)
            if len(row) != expected:
                raise DataError(
                    f"ChatEncoder needs one marked span per answer; got {len(row)} for {expected} answer(s) "
                    f"of {sample}. The chat template leaves answers of this row out. Use VICUNA_V1, or "
                    "correct the template."
                )
            for turn in turns:
                if turn.role == "system" and any(piece.strip() not in text for piece in turn.text.split(MARK)):
                    raise DataError(
                        f"the chat template must render system turns; it leaves out that of {sample}.\n"
                        "Hint: pass template= with a place for it, or take the system turn out of the row."
                    )
        return (texts, spans), processor

    def _adds_special_tokens(self, text: str) -> bool:
        # As transformers' own chat rendering does: a template that writes the first token itself wants no
        # second one.
        first = self.processor.tokenizer.bos_token
        return not first or not text.startswith(first)

    def _fit(self, picture: "PIL.Image.Image") -> "PIL.Image.Image":
        if self.square == "crop":
            return picture
        return pad_to_square(picture, self.processor.image_processor.image_mean)


def _answer_tokens(
    offsets: Int[Tensor, "seq 2"], spans: Sequence[Span], replaced: Sequence[dict[str, Any]]
) -> Bool[Tensor, " seq"]:
    expanded = [mark["new_span"] for mark in replaced]
    moved = shift_spans(spans, [mark["span"] for mark in replaced], expanded)
    # A picture that an answer shows is not something to predict.
    return tokens_in(offsets, moved) & ~tokens_in(offsets, expanded)


def _naming_rows(samples: Sequence[Sample], call: Callable[[Sequence[Sample]], T]) -> T:
    """`call(samples)`; where the processor or the template fails, the error names the row that it fails for."""
    try:
        return call(samples)
    except (TokencurricError, MemoryError):
        raise
    except Exception as error:
        for sample in samples:
            try:
                call([sample])
            except (TokencurricError, MemoryError):
                raise
            except Exception as alone:
                said = next(iter(str(alone).strip().splitlines()), "no message")
                raise DataError(
                    f"the processor or its chat template refuses {sample}: {type(alone).__name__}: {said}.\n"
                    "Hint: correct the row or leave it out; preflight(file, collate=collator) finds all such rows."
                ) from alone
        error.add_note("Rows of the batch: " + ", ".join(map(str, samples)))
        raise
