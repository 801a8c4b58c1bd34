"""Laws of training batches and prompts."""

from functools import cache
from itertools import groupby

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import LlavaProcessor

from tests.data.tiny import PATCHES, batches, build_processor, picture, samples, talk
from tokencurric.data import MARK, VICUNA_V1, ConversationCollator, PromptCollator, Sample
from tokencurric.errors import DataError, RangeError, UnsupportedModelError

PROCESSORS = {
    "trimmed offsets": build_processor(),
    "full offsets": build_processor(trim_offsets=False),
    "no first token": build_processor(bos=False),
}
every_processor = pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
PLAIN = PROCESSORS["trimmed offsets"]


@cache
def collator(processor: LlavaProcessor = PLAIN, **options) -> ConversationCollator:
    return ConversationCollator(processor, template=VICUNA_V1, **options)


def learned(batch: dict[str, torch.Tensor], row: int, processor: LlavaProcessor) -> list[str]:
    """The text of each run of supervised tokens, decoded."""
    labels = batch["labels"][row].tolist()
    runs = [list(run) for counts, run in groupby(labels, key=lambda label: label != -100) if counts]
    return [processor.tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def unpadded(batch: dict[str, torch.Tensor], row: int) -> tuple[list[int], list[int]]:
    real = batch["attention_mask"][row].bool()
    return batch["input_ids"][row][real].tolist(), batch["labels"][row][real].tolist()


@every_processor
@given(batch=batches())
def test_labels_spell_the_answers_and_their_end_tokens(processor, batch):
    batch = [make() for make in batch]
    out = collator(processor)(batch)
    for row, sample in enumerate(batch):
        answers = [f" {turn.text}</s>" for turn in sample.turns if turn.role == "assistant"]
        assert learned(out, row, processor) == answers
    counted = out["labels"] != -100
    assert torch.equal(out["labels"][counted], out["input_ids"][counted])
    assert not (counted & ~out["attention_mask"].bool()).any()


def test_labels_are_not_what_tokenizing_pieces_gives():
    """A control: tokenized on its own, an answer gives other tokens than the ones learned."""
    ids, labels = unpadded(collator()([talk(f"{MARK} what is this?", "a red circle")]), 0)
    first = next(n for n, label in enumerate(labels) if label != -100)
    pieces = PLAIN.tokenizer("a red circle", add_special_tokens=False)["input_ids"]
    assert ids[first : first + len(pieces)] != pieces
    # Nor are they where they would be if the picture had stayed one token.
    assert learned(collator()([talk("what is this?", "a red circle")]), 0, PLAIN) == [" a red circle</s>"]
    assert labels[first - PATCHES + 1] == -100


@every_processor
@given(batch=batches())
def test_labels_agree_with_the_masks_of_transformers(processor, batch):
    """Transformers maps generation tags to tokens too; where no answer shows a picture, both must agree."""
    batch = [make() for make in batch]
    messages = []
    for sample in batch:
        pictures = iter(sample.images)
        messages.append(
            [
                {
                    "role": message["role"],
                    "content": [
                        part | {"image": next(pictures)} if part["type"] == "image" else part
                        for part in message["content"]
                    ],
                }
                for message in sample.messages
            ]
        )
    theirs = processor.apply_chat_template(
        messages,
        chat_template=VICUNA_V1,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    ours = collator(processor)(batch)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["labels"] != -100, theirs["assistant_masks"].bool())
    if any(sample.images for sample in batch):
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


@given(batch=batches(), side=st.sampled_from(["left", "right"]))
def test_a_row_is_the_same_alone_and_in_any_batch_and_on_either_side(batch, side):
    batch = [make() for make in batch]
    together = collator(padding_side=side)(batch)
    filled = ~together["attention_mask"].bool()
    assert torch.equal(filled.sort(dim=-1, descending=side == "left", stable=True).values, filled)
    for row, sample in enumerate(batch):
        assert unpadded(together, row) == unpadded(collator()([sample]), 0)
    assert together["row_key"].tolist() == [sample.row_key for sample in batch]
    assert together["row_key"].dtype == torch.long


@given(batch=batches())
def test_every_picture_has_its_tokens_and_its_pixels_in_order(batch):
    batch = [make() for make in batch]
    out = collator()(batch)
    places = (out["input_ids"] == PLAIN.image_token_id).sum(-1).tolist()
    assert places == [PATCHES * len(sample.images) for sample in batch]
    images = [image for sample in batch for image in sample.images]
    assert ("pixel_values" in out) == bool(images)
    if images:
        assert torch.equal(out["pixel_values"], PLAIN.image_processor(images, return_tensors="pt")["pixel_values"])
    assert set(out) - {"pixel_values"} == {"input_ids", "attention_mask", "labels", "row_key"}


def test_a_picture_in_an_answer_is_shown_and_not_learned():
    out = collator()([talk(f"{MARK} like?", f"This {MARK} one.")])
    assert learned(out, 0, PLAIN) == [" This ", " one.</s>"]
    assert (out["input_ids"] == PLAIN.image_token_id).sum() == 2 * PATCHES


def test_a_row_may_end_with_a_question():
    out = collator()([talk("a", "b", "c")])
    assert learned(out, 0, PLAIN) == [" b</s>"]
    assert "c" in PLAIN.tokenizer.decode(out["input_ids"][0])


def test_a_first_token_is_written_once():
    template = "{{ bos_token }}" + VICUNA_V1
    both = [ConversationCollator(PLAIN, template=t)([talk("a", "b")]) for t in (VICUNA_V1, template)]
    assert [(out["input_ids"] == PLAIN.tokenizer.bos_token_id).sum() for out in both] == [1, 1]
    assert torch.equal(both[0]["labels"], both[1]["labels"])


def test_wide_pictures_are_cropped_or_padded():
    wide = picture(255, (32, 16))
    wide.paste((0, 255, 0), (8, 0, 24, 16))  # the middle; red at both ends
    sample = Sample(0, "wide", talk(f"{MARK}?", "x").turns, (wide,))
    crop, pad = (collator(square=square)([sample])["pixel_values"] for square in ("crop", "pad"))
    assert crop.shape == pad.shape
    red = torch.tensor([255 / 255, 0, 0])
    mean, spread = (torch.tensor(getattr(PLAIN.image_processor, name)) for name in ("image_mean", "image_std"))
    end = ((red - mean) / spread)[:, None]
    assert not torch.isclose(crop[0, 0], end[0], atol=0.05).any()
    torch.testing.assert_close(pad[0, :, 7:9, 0], end.expand(-1, 2), atol=0.05, rtol=0)
    # Above and below the picture stands the mean colour, which normalizes to nearly nothing.
    assert pad[0, :, 0, :].abs().max() < 0.05
    assert crop[0, :, 0, :].abs().max() > 0.5


@given(sample=samples(), max_length=st.integers(30, 160))
def test_last_turns_are_dropped_whole_until_a_row_fits(sample, max_length):
    """Against trying every head of the row."""
    sample = sample()
    heads = [sample.head(n) for n in range(1, len(sample.turns) + 1) if sample.turns[n - 1].role == "assistant"]
    alone = [unpadded(collator()([head]), 0) for head in heads]
    fitting = [row for row in alone if len(row[0]) <= max_length]
    shorten = collator(max_length=max_length, too_long="drop_turns")
    other = talk("a", "b", row_key=5)
    assume(len(unpadded(collator()([other]), 0)[0]) <= max_length)
    if not fitting:
        with pytest.raises(DataError, match="Even its first answer does not fit"):
            shorten([other, sample])
        return
    out = shorten([other, sample])
    assert unpadded(out, 1) == fitting[-1]
    kept = heads[len(fitting) - 1]
    assert (out["input_ids"][1] == PLAIN.image_token_id).sum() == PATCHES * len(kept.images)
    assert out["row_key"].tolist() == [5, sample.row_key]


def test_a_row_too_long_is_named_and_never_cut():
    long = talk(f"{MARK}\nwhat?", "x", "and?", "y" * 50, row_key=3)
    length = len(unpadded(collator()([long]), 0)[0])
    with pytest.raises(DataError, match=rf"max_length={length - 1} tokens; got {length} in row 3 \(id 'id-3'\)"):
        collator(max_length=length - 1)([talk("a", "b"), long])
    assert torch.equal(collator(max_length=length)([long])["labels"], collator()([long])["labels"])


def test_rows_with_nothing_to_learn_are_named():
    with pytest.raises(DataError, match=r"an answer in every row; got none in row 4 \(id 'id-4'\)"):
        collator()([talk("a", "b"), talk("only a question", row_key=4)])


def test_an_image_token_in_the_words_is_text_or_refused():
    template, sample = VICUNA_V1.replace("<image>", "<pad>"), talk("a <pad> b", "c", row_key=2)
    other = build_processor()
    other.image_token = "<pad>"
    ids, _ = unpadded(ConversationCollator(other, template=template)([sample]), 0)
    assert other.tokenizer.pad_token_id not in ids
    # An image token that is no token of the tokenizer cannot be told from text.
    other.image_token, template = "IMG", VICUNA_V1.replace("<image>", "IMG")
    with pytest.raises(DataError, match=r"got 'IMG' in the words of row 2"):
        ConversationCollator(other, template=template)([talk("a IMG b", "c", row_key=2)])
    assert collator()([sample])


def test_a_processor_that_hides_its_expansions_is_refused():
    class Silent(LlavaProcessor):
        def __call__(self, *args, **kwargs):
            out = super().__call__(*args, **kwargs)
            out.pop("text_replacement_offsets")
            return out

    silent = Silent(PLAIN.image_processor, PLAIN.tokenizer, patch_size=8)
    with pytest.raises(UnsupportedModelError, match=r"got 0 report\(s\) for 1 picture\(s\) from Silent"):
        collator(silent)([talk(f"{MARK}?", "x")])
    assert collator(silent)([talk("?", "x")])


def test_a_template_that_drops_answers_of_a_row_is_refused():
    picky = VICUNA_V1.replace("{%- for message in turns -%}", "{%- for message in turns if message['content'] -%}")
    with pytest.raises(DataError, match=r"one marked span per answer; got 1 for 2 answer\(s\) of row 0"):
        ConversationCollator(PLAIN, template=picky)([talk("a", "b", "c", "")])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "options", [{"max_length": 0}, {"too_long": "cut"}, {"padding_side": "both"}, {"square": "stretch"}]
)
def test_options_out_of_range_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(RangeError, match=f"got {name}={value!r}"):
        collator(**options)


@pytest.mark.usefixtures("unchecked")
def test_prompts_refuse_unknown_answers_and_rows_without_one():
    with pytest.raises(RangeError, match="got answer='third'"):
        PromptCollator(PLAIN, template=VICUNA_V1, answer="third")
    prompts = PromptCollator(PLAIN, template=VICUNA_V1)
    for sample in (talk("only a question", row_key=6), talk("unasked", start="assistant", row_key=6)):
        with pytest.raises(DataError, match=r"a question with an answer in every row; got none in row 6"):
            prompts([talk("a", "b"), sample])


def test_empty_batches_are_refused():
    for collate in (collator(), PromptCollator(PLAIN, template=VICUNA_V1)):
        with pytest.raises(DataError, match=r"needs samples; got samples=\[\]"):
            collate([])


@every_processor
@given(batch=batches(), answer=st.sampled_from(["first", "last"]))
def test_prompts_are_what_stands_before_the_answer_in_training(processor, batch, answer):
    batch = [make() for make in batch]
    prompts = PromptCollator(processor, template=VICUNA_V1, answer=answer)(batch)
    real = prompts.inputs["attention_mask"].bool()
    assert bool(real[:, -1].all())
    shown = 0
    for row, sample in enumerate(batch):
        ids, labels = unpadded(collator(processor)([sample]), 0)
        replies = [n for n, turn in enumerate(sample.turns) if turn.role == "assistant"]
        starts = [n for n in range(1, len(ids)) if labels[n] != -100 and labels[n - 1] == -100]
        which = -1 if answer == "last" else replies.index(next(n for n in replies if n > 0))
        assert prompts.inputs["input_ids"][row][real[row]].tolist() == ids[: starts[which]]
        assert prompts.references[row] == sample.turns[replies[which]].text
        shown += len(sample.head(replies[which]).images)
    assert len(prompts.inputs.get("pixel_values", [])) == shown
    assert prompts.row_key.tolist() == [sample.row_key for sample in batch]
    assert "labels" not in prompts.inputs


def test_first_and_last_answers_differ():
    sample = talk("hello", f"{MARK} a?", "b", "c?", "d", start="assistant")
    first, last = (PromptCollator(PLAIN, template=VICUNA_V1, answer=which)([sample]) for which in ("first", "last"))
    assert (first.references, last.references) == (("b",), ("d",))
    assert first.inputs["input_ids"].shape[1] < last.inputs["input_ids"].shape[1]
