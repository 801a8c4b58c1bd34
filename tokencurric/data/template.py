"""Chat templates: LLaVA's own, what training needs of one, and rendering with the spans of the answers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from tokencurric.data.conversations import MARK, Turn
from tokencurric.errors import MissingDependencyError, UnsupportedModelError

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

VICUNA_V1 = (
    # Content is text, or a list of parts; pictures are rendered where they stand among the parts.
    "{%- macro say(content) -%}"
    "{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content -%}"
    "{%- if part['type'] == 'image' -%}{{ '" + MARK + "' }}{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{{ say(messages[0]['content']) + ' ' }}{%- set turns = messages[1:] -%}"
    "{%- else -%}"
    '{{ "' + VICUNA_SYSTEM + ' " }}{%- set turns = messages -%}'
    "{%- endif -%}"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' + say(message['content']) + ' ' }}"
    # The blank after the colon belongs to the answer: many tokenizers glue it to the answer's first word, and
    # a prompt that ended in a blank would tokenize differently from what was trained on.
    "{%- else -%}{{ 'ASSISTANT:' }}"
    "{%- generation -%}{{ ' ' + say(message['content']) + eos_token }}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
"""The form LLaVA-1.5 was trained in (`vicuna_v1`): system sentence, USER, ASSISTANT, end token.

Answers with their end token stand in generation tags. The template that is published with llava-1.5-7b-hf has
neither the system sentence nor the end token and puts pictures first.

Source: Vicuna v1.1 (Zheng et al. 2023, arXiv:2306.05685) as used by LLaVA-1.5 (arXiv:2310.03744).
"""

_PROBE = (
    Turn("user", f"{MARK} one?"),
    Turn("assistant", "first"),
    Turn("user", "two?"),
    Turn("assistant", "second"),
)


@runtime_checkable
class Processor(Protocol):
    """What is used of a Hugging Face processor."""

    tokenizer: Any
    image_processor: Any
    image_token: str
    chat_template: str | dict[str, str] | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Tokenize texts and prepare pictures."""
        ...


def render(
    conversations: Sequence[Sequence[Turn]],
    template: str,
    *,
    special_tokens: Mapping[str, Any],
    generation_prompt: bool = False,
) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Conversations as text, and where in the text the template's generation tags stood.

    Args:
        conversations: turns of each conversation.
        template: Jinja chat template.
        special_tokens: what the template may name, a tokenizer's `special_tokens_map`.
        generation_prompt: end each text with the header of an answer still to come.

    Returns:
        A text and a list of character spans (start, end) a conversation.

    Raises:
        MissingDependencyError: transformers is not installed.

    Example:
        >>> talk = [Turn("user", "2+2?"), Turn("assistant", "4")]
        >>> texts, spans = render([talk], VICUNA_V1, special_tokens={"eos_token": "</s>"})
        >>> texts[0][-30:], texts[0][slice(*spans[0][0])]
        ('s. USER: 2+2? ASSISTANT: 4</s>', ' 4</s>')
    """
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError as error:
        raise MissingDependencyError(
            "render needs transformers and jinja2; got none installed. Chat templates are theirs. "
            "Install them with `pip install tokencurric[hf] jinja2`."
        ) from error
    # Typed as a string upstream; with spans asked for it is a pair of lists.
    rendered: Any = render_jinja_template(
        conversations=[[turn.message for turn in turns] for turns in conversations],
        chat_template=template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=generation_prompt,
        **special_tokens,
    )
    texts, spans = rendered
    return list(texts), [[(start, end) for start, end in row] for row in spans]


def written_around(template: str, special_tokens: Mapping[str, Any]) -> str:
    """The text that a template writes by itself, outside of answers.

    Args:
        template: Jinja chat template with generation tags.
        special_tokens: names and tokens that the template may use, a tokenizer's `special_tokens_map`.

    Returns:
        Headers, separators and end tokens of a conversation, joined.

    Example:
        >>> written_around(VICUNA_V1, {"eos_token": "</s>"})[-23:]
        ' USER: two? ASSISTANT: '
    """
    (text,), (spans,) = render([_PROBE], template, special_tokens=special_tokens)
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    return " ".join(text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))


def choose_template(processor: Processor, template: str | None = None, *, end_token: str | None = None) -> str:
    """The chat template to train with: the one given or the processor's own, if it marks what to learn.

    Args:
        processor: a Hugging Face processor.
        template: Jinja chat template, for LLaVA-1.5 `VICUNA_V1`; None takes the processor's own.
        end_token: what ends an answer; None takes the tokenizer's end-of-sequence token.

    Returns:
        A template whose generation tags hold every answer and its end token and which renders every picture
        once.

    Raises:
        UnsupportedModelError: it does not; the text says what is missing.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import LlavaProcessor, PreTrainedTokenizerFast
        >>> from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        >>> words = Tokenizer(models.WordLevel({"<unk>": 0, MARK: 1, "</s>": 2}, unk_token="<unk>"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> processor = LlavaProcessor(CLIPImageProcessorPil(), tokenizer, patch_size=14)
        >>> choose_template(processor, VICUNA_V1) == VICUNA_V1
        True
    """
    origin = "template" if template is not None else "the processor's chat_template"
    if template is None:
        own = processor.chat_template
        template = own.get("default") if isinstance(own, dict) else own
    end = end_token if end_token is not None else processor.tokenizer.eos_token

    def refuse(needs: str, got: str, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"ConversationCollator needs {needs}; got {origin} {got}. {why} Pass template=VICUNA_V1 "
            "(tokencurric.data) for LLaVA-1.5, or a template of your own with these tags."
        )

    if template is None:
        raise refuse("a chat template", "= None", "Turns cannot be told apart without one.")
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise refuse(
            "{% generation %} tags around answers",
            "without them",
            "Nothing says which tokens are to be learned.",
        )
    if not end:
        raise UnsupportedModelError(
            f"ConversationCollator needs an end token; got eos_token={end!r}. A model that never learns to "
            "stop does not stop. Set the tokenizer's eos_token, or pass end_token=."
        )
    (text,), (spans,) = render([_PROBE], template, special_tokens=processor.tokenizer.special_tokens_map)
    spoken = [text[start:end] for start, end in spans]
    answers = [turn.text for turn in _PROBE if turn.role == "assistant"]
    if len(spoken) != len(answers) or any(answer not in said for answer, said in zip(answers, spoken, strict=True)):
        raise refuse(
            "{% generation %} tags around every answer, one pair each",
            f"which marks {spoken} of {answers}",
            "Answers would be lost.",
        )
    if any(end not in said.partition(answer)[2] for answer, said in zip(answers, spoken, strict=True)):
        raise refuse(
            f"the end token {end!r} inside the generation tags",
            f"which marks {spoken}",
            "A model that never learns to stop does not stop.",
        )
    if text.count(processor.image_token) != 1:
        raise refuse(
            f"one {processor.image_token!r} for every picture",
            f"which renders {text.count(processor.image_token)} for one",
            "The processor would find no place, or several, for it.",
        )
    return template
