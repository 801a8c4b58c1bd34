"""Text that spells control tokens stays text, with every kind of tokenizer; real control tokens stay what they are."""

import json
import pickle
from copy import deepcopy
from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.kinds import FAMILIES, SPECIAL, TOKENIZERS, llava, qwen, sentencepiece, unigram
from tests.data.tiny import build_processor, picture, talk
from tokencurric.data import MARK, VICUNA_V1, ConversationCollator, PromptCollator, Sample, Turn, measure_rows
from tokencurric.data.conversations import Conversation, ConversationFile
from tokencurric.data.special import ControlTokens
from tokencurric.data.template import render
from tokencurric.errors import DataError, RangeError

EVERY = {name: llava(make()) for name, make in TOKENIZERS.items()}
every_processor = pytest.mark.parametrize("processor", EVERY.values(), ids=EVERY)
THREE = ("byte-level", "sentencepiece", "unigram, normalized")
SPELLED = ["</s>", "<s>", "<pad>", "a", " ", "<", "/s>", "<unk>", "red", "\n"]
spelling = st.lists(st.sampled_from(SPELLED), min_size=1, max_size=6).map("".join).filter(str.strip)
COLLATORS = {id(each): ConversationCollator(each, template=VICUNA_V1) for each in EVERY.values()}


def unpadded(batch, row=0):
    real = batch["attention_mask"][row].bool()
    return batch["input_ids"][row][real].tolist(), batch["labels"][row][real].tolist()


def control_ids(tokenizer) -> set[int]:
    unknown = tokenizer.unk_token_id
    return {token for token in tokenizer.convert_tokens_to_ids(SPECIAL) if token not in (unknown, None)}


def harmless(text: str) -> str:
    """The same shape without a control token: what the tokens around it are compared with."""
    return text.replace("<", "(").replace(">", ")")


@every_processor
@given(question=spelling, answer=spelling, shown=st.booleans())
def test_only_the_template_writes_control_tokens(processor, question, answer, shown):
    tokenizer, mark = processor.tokenizer, f"{MARK}\n" * shown
    plain, spelled = (
        unpadded(COLLATORS[id(processor)]([talk(mark + q, a)]))
        for q, a in ((harmless(question), harmless(answer)), (question, answer))
    )
    wanted = control_ids(tokenizer)
    found = [[token for token in ids if token in wanted] for ids, _ in (plain, spelled)]
    assert found[0] == found[1]
    _, labels = spelled
    supervised = [label for label in labels if label != -100]
    assert supervised.count(tokenizer.eos_token_id) == 1 and supervised[-1] == tokenizer.eos_token_id
    runs = [counts for counts, _ in groupby(labels, key=lambda label: label != -100)]
    assert runs.count(True) == 1, "the answer is one piece"


@every_processor
def test_without_care_they_would_be_control_tokens(processor):
    """A control of the law above: the tokenizer alone reads them as control tokens."""
    (text,), _ = render([talk("a", "red</s> a").turns], VICUNA_V1, special_tokens={"eos_token": "</s>"})
    ids = processor.tokenizer(text)["input_ids"]
    assert ids.count(processor.tokenizer.eos_token_id) == 2
    ours, _ = unpadded(COLLATORS[id(processor)]([talk("a", "red</s> a")]))
    assert ours.count(processor.tokenizer.eos_token_id) == 1
    assert [token for token in ours if token != processor.tokenizer.unk_token_id] != ids


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])
@given(question=spelling, answer=spelling)
def test_the_text_is_all_there(name, question, answer):
    processor = EVERY[name]
    ids, labels = unpadded(COLLATORS[id(processor)]([talk(question, answer)]))
    decode = processor.tokenizer.decode
    (text,), _ = render([talk(question, answer).turns], VICUNA_V1, special_tokens={"eos_token": "</s>"})
    assert decode(ids, clean_up_tokenization_spaces=False).removeprefix("<s>").lstrip() == text.lstrip()
    learned = decode([label for label in labels if label != -100], clean_up_tokenization_spaces=False)
    assert learned == f" {answer}</s>"


@pytest.mark.parametrize("processor", [EVERY[name] for name in THREE], ids=THREE)
@given(texts=st.lists(st.tuples(spelling, spelling), min_size=2, max_size=3))
def test_a_row_is_the_same_beside_rows_that_spell(processor, texts):
    """Batches without such a row take the tokenizer itself, others its twin: both must agree."""
    collate = COLLATORS[id(processor)]
    batch = [talk(f"{MARK}{texts[0][0]}", texts[0][1]), *(talk(*pair, row_key=n) for n, pair in enumerate(texts[1:]))]
    batch.append(talk("what is this?", "a red circle", row_key=9))
    together = collate(batch)
    for row, sample in enumerate(batch):
        assert unpadded(together, row) == unpadded(collate([sample]))


@every_processor
@given(question=spelling, answer=spelling)
def test_prompts_are_what_stands_before_the_answer(processor, question, answer):
    sample = talk(f"{question}{MARK}", answer)
    prompts = PromptCollator(processor, template=VICUNA_V1)([sample])
    ids, labels = unpadded(COLLATORS[id(processor)]([sample]))
    start = next(n for n, label in enumerate(labels) if label != -100)
    assert prompts.inputs["input_ids"][0].tolist() == ids[:start]
    assert prompts.references == (answer,)


@given(question=spelling, answer=spelling, max_length=st.integers(40, 140))
def test_turns_are_dropped_by_the_lengths_that_batches_have(question, answer, max_length):
    processor = EVERY["sentencepiece"]
    sample = talk("a", "red", f"{MARK} {question}", answer)
    whole = len(unpadded(COLLATORS[id(processor)]([sample]))[0])
    shorten = ConversationCollator(processor, template=VICUNA_V1, max_length=max_length, too_long="drop_turns")
    try:
        kept = len(unpadded(shorten([sample]))[0])
    except DataError:
        assert whole > max_length
        return
    assert (kept == whole) == (whole <= max_length)


def test_rows_are_measured_with_their_text_as_text(tmp_path):
    processor = EVERY["byte-level"]
    sample = talk("</s></s></s>?", "a <pad>")
    file = ConversationFile(tmp_path / "t.json", None, (Conversation(0, "a", (), sample.turns),))
    collate = COLLATORS[id(processor)]
    assert measure_rows(file, collate).tokens == (len(unpadded(collate([sample]))[0]),)


def test_tokens_that_are_looked_for_after_normalization():
    """A fullwidth spelling becomes the token where a tokenizer normalizes first."""
    wide = "a ＜/s＞ a"
    for normalized in (False, True):  # by the model's own pieces, and by the added token
        tokenizer = unigram(normalized=normalized)
        ids = tokenizer(wide, add_special_tokens=False)["input_ids"]
        assert ids.count(tokenizer.eos_token_id) == 1, "a control: alone it does become the token"
        ours, _ = unpadded(ConversationCollator(llava(tokenizer), template=VICUNA_V1)([talk(wide, "red")]))
        assert ours.count(tokenizer.eos_token_id) == 1


QWEN = qwen()


@given(
    question=st.lists(st.sampled_from(["<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|video_pad|>", "a", "\n"]))
)
def test_written_out_image_marks_are_text_in_other_families(question):
    words = "".join(question) + "?"
    collate = ConversationCollator(QWEN)
    sample = Sample(0, "q", (Turn("user", f"{MARK}{words}"), Turn("assistant", f"b{words}")), (picture(5, (56, 84)),))
    batch = collate([sample])
    plain = collate([Sample(0, "q", (Turn("user", f"{MARK}?"), Turn("assistant", "b?")), sample.images)])
    for token in ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"):
        number = QWEN.tokenizer.convert_tokens_to_ids(token)
        assert (batch["input_ids"] == number).sum() == (plain["input_ids"] == number).sum(), token
    assert (batch["input_ids"] == QWEN.image_token_id).sum() == 6
    assert torch.equal(batch["pixel_values"], plain["pixel_values"])
    if "mm_token_type_ids" in batch:
        assert batch["mm_token_type_ids"].sum() == plain["mm_token_type_ids"].sum()
    supervised = batch["labels"][batch["labels"] != -100].tolist()
    assert QWEN.tokenizer.decode(supervised) == f"b{words}<|im_end|>"


@pytest.mark.parametrize("family", FAMILIES)
def test_processors_that_write_tokens_of_their_own(family):
    """What stands around images, rows of tiles and the like: only the processor writes it."""
    make, tokens = FAMILIES[family]
    processor = make()
    own = "{%- if part['type'] == 'image' -%}{{ '" + processor.image_token + "' }}"
    template = VICUNA_V1.replace("{%- if part['type'] == 'image' -%}{{ '" + MARK + "' }}", own)
    collate = ConversationCollator(processor, template=template)
    image, words = picture(7, (64, 64)), f"{' '.join(tokens)} x"

    def row(said: str) -> Sample:
        return Sample(0, "a", (Turn("user", f"{MARK}{said}"), Turn("assistant", said)), (image,))

    spelled, plain = collate([row(words)]), collate([row("x")])
    assert spelled["input_ids"].shape[1] > plain["input_ids"].shape[1]
    for token in tokens:
        number = processor.tokenizer.convert_tokens_to_ids(token)
        assert (spelled["input_ids"] == number).sum() == (plain["input_ids"] == number).sum(), token
        assert processor.tokenizer(words)["input_ids"].count(number) == 1, "a control: alone it becomes the token"
    assert torch.equal(spelled["pixel_values"], plain["pixel_values"])
    learned = processor.tokenizer.decode(spelled["labels"][spelled["labels"] != -100])
    assert learned == f" {words}</s>"


def test_marks_that_a_template_moves_make_no_token():
    first = VICUNA_V1.replace(
        "{%- for part in content -%}",
        "{%- for part in content if part['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}"
        "{%- for part in content if part['type'] != 'image' -%}",
    )
    processor = EVERY["byte-level"]
    sample = talk(f"</{MARK}s>", "a")
    ids, _ = unpadded(ConversationCollator(processor, template=first)([sample]))
    assert ids.count(processor.tokenizer.eos_token_id) == 1
    (text,), _ = render([sample.turns], first, special_tokens={"eos_token": "</s>"})
    assert text.count("</s>") == 2, "a control"


def test_tokens_that_text_may_spell_can_be_named():
    words = "<|box_start|>(1,2)<|im_end|>"
    box = QWEN.tokenizer.convert_tokens_to_ids("<|box_start|>")
    for allowed, count in (((), 0), (["<|box_start|>"], 1)):
        ids, _ = unpadded(ConversationCollator(QWEN, allowed_special=allowed)([talk(words, "b")]))
        assert ids.count(box) == count
        assert ids.count(QWEN.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    for bad in (["<|image_pad|>"], "<|box_start|>"):
        with pytest.raises(RangeError, match="allowed_special must be a list"):
            ConversationCollator(QWEN, allowed_special=bad)


def test_added_tokens_that_are_not_special_stay_tokens():
    think = QWEN.tokenizer.convert_tokens_to_ids("<think>")
    for words in ("<think>", "<think><|im_end|>"):
        ids, _ = unpadded(ConversationCollator(QWEN)([talk("a", words)]))
        assert ids.count(think) == 1


def test_what_the_template_writes_is_control_though_not_called_special():
    tokenizer = build_processor().tokenizer
    tokenizer.add_tokens(["USER:"])
    number = tokenizer.convert_tokens_to_ids("USER:")
    ids, _ = unpadded(ConversationCollator(llava(tokenizer), template=VICUNA_V1)([talk("USER: x", "y")]))
    assert ids.count(number) == 1


def test_private_characters_of_the_text_are_no_stand_ins():
    processor = EVERY["byte-level"]
    collate = COLLATORS[id(processor)]
    for strange in ("\U0010f001", "\U0010f800\U0010e800", "\U0010ffff"):
        words = f"{strange}</s>{strange}"
        ids, labels = unpadded(collate([talk(words, words)]))
        assert processor.tokenizer.decode([x for x in labels if x != -100]) == f" {words}</s>"
        assert ids.count(processor.tokenizer.eos_token_id) == 1
    every = "".join(chr(block + 7) for block in range(0x101000, 0x110000, 0x1000))
    assert collate([talk(every, "a")])
    with pytest.raises(DataError, match=r"row 0 \(id 'id-0'\) cannot be encoded.*private-use"):
        collate([talk(every, "</s>")])


def test_a_tokenizer_that_cannot_be_respelled_is_refused_for_such_rows_alone():
    collate = ConversationCollator(llava(sentencepiece()), template=VICUNA_V1)
    collate.encoder.control = ControlTokens(collate.encoder.processor.tokenizer, ["</s>", "red"])  # "red" is no token
    assert collate([talk("a", "blue")])
    with pytest.raises(
        DataError, match=r"row 1 \(id 'id-1'\) cannot be encoded.*'red', which cannot be told from text"
    ):
        collate([talk("a", "blue"), talk("a", "</s>", row_key=1)])


def vocabulary(processor):
    told = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    return told["added_tokens"], told["model"], told["normalizer"], told["pre_tokenizer"], told["post_processor"]


def test_the_users_processor_is_left_alone_and_collators_can_be_sent():
    processor = llava(sentencepiece())
    before = vocabulary(processor)
    collate = ConversationCollator(processor, template=VICUNA_V1)
    sample = talk("</s>", "<pad>")
    batch = collate([sample])
    for other in (pickle.loads(pickle.dumps(collate)), deepcopy(collate)):
        assert torch.equal(other([sample])["input_ids"], batch["input_ids"])
    collate([talk("a", "b")])
    assert vocabulary(processor) == before
