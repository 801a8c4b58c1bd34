"""The text that LLaVA was trained on, and which templates can be trained with."""

from copy import deepcopy

import pytest

from tests.data.tiny import build_processor, talk
from tokencurric.data import MARK, VICUNA_V1, ConversationCollator, PromptCollator, choose_template
from tokencurric.data.template import render
from tokencurric.errors import UnsupportedModelError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TOKENS = {"eos_token": "</s>"}
TAGGED = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% elif m.role == 'user' %}{{ part.text }}{% else %}"
    "{% generation %}{{ part.text }}END{% endgeneration %}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def test_vicuna_text_is_the_one_llava_was_trained_on():
    sample = talk(f"{MARK}\nWhat?", "A cat.", f"Where?\n{MARK}", "There.")
    (text,), (spans,) = render([sample.turns], VICUNA_V1, special_tokens=TOKENS)
    assert text == (f"{SYSTEM} USER: {MARK}\nWhat? ASSISTANT: A cat.</s>USER: Where?\n{MARK} ASSISTANT: There.</s>")
    assert [text[start:end] for start, end in spans] == [" A cat.</s>", " There.</s>"]


def test_vicuna_text_may_start_with_an_answer_and_end_with_a_question():
    (text,), (spans,) = render([talk("Hi.", "And?", start="assistant").turns], VICUNA_V1, special_tokens=TOKENS)
    assert text == f"{SYSTEM} ASSISTANT: Hi.</s>USER: And? "
    assert [text[start:end] for start, end in spans] == [" Hi.</s>"]
    (prompt,), _ = render([talk("And?").turns], VICUNA_V1, special_tokens=TOKENS, generation_prompt=True)
    assert prompt == f"{SYSTEM} USER: And? ASSISTANT:"


def test_vicuna_takes_plain_text_and_another_system_sentence(processor):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And?"}]
    text = processor.apply_chat_template(messages, chat_template=VICUNA_V1, add_generation_prompt=True)
    assert text == "Be brief. USER: And? ASSISTANT:"


def test_the_processors_own_template_is_used_if_it_marks_answers():
    for own in (VICUNA_V1, {"default": VICUNA_V1, "other": "x"}):
        assert choose_template(build_processor(chat_template=own)) == VICUNA_V1
    processor = build_processor(chat_template="unused")
    assert choose_template(processor, VICUNA_V1) == VICUNA_V1


def test_another_end_token_can_be_named(processor):
    assert choose_template(processor, TAGGED, end_token="END") == TAGGED
    with pytest.raises(UnsupportedModelError, match=r"the end token '</s>' inside"):
        choose_template(processor, TAGGED)


REFUSED = {
    r"a chat template; got the processor's chat_template = None": None,
    r"\{% generation %\} tags around answers; got": "{% for m in messages %}{{ m.role }}{% endfor %}",
    r"tags around every answer, one pair each": "{% generation %}{{ messages }}{% endgeneration %}",
    r"the end token '</s>' inside the generation tags": TAGGED.replace(
        "END{% endgeneration %}", "{% endgeneration %}</s>"
    ),
    r"one '<image>' for every picture": VICUNA_V1.replace("'<image>'", "'<image><image>'"),
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("collator", [ConversationCollator, PromptCollator])
def test_templates_that_would_lose_something_are_refused(collator, message):
    processor = build_processor(chat_template=REFUSED[message])
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        collator(processor)
    assert "VICUNA_V1" in str(caught.value)
    assert collator(processor, template=VICUNA_V1)


def test_processors_that_cannot_give_labels_are_refused(processor):
    without_padding = build_processor(tokens={"pad_token": None})
    with pytest.raises(UnsupportedModelError, match="a padding token; got pad_token=None"):
        ConversationCollator(without_padding, template=VICUNA_V1)
    without_end = build_processor(tokens={"eos_token": None})
    with pytest.raises(UnsupportedModelError, match="an end token; got eos_token=None"):
        ConversationCollator(without_end, template=VICUNA_V1)
    slow = deepcopy(processor)
    slow.tokenizer = type("SlowTokenizer", (), {"is_fast": False})()
    with pytest.raises(UnsupportedModelError, match=r"a fast tokenizer; got .* with tokenizer=SlowTokenizer"):
        ConversationCollator(slow, template=VICUNA_V1)
