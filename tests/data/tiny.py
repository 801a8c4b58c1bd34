"""A processor made from nothing, pictures, and samples of every shape that the data format allows."""

from collections.abc import Callable
from functools import partial
from typing import Any

from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tokencurric.data import MARK, Sample, Turn

PATCHES = 4
"""Tokens of a picture: 16 pixels in patches of 8, the class token added and taken away again."""


def build_processor(*, trim_offsets: bool = True, bos: bool = True, **options: Any) -> LlavaProcessor:
    """LLaVA's processor around a byte-level tokenizer, which gives every text back exactly."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.train_from_iterator(
        ["A chat between a curious user and an assistant. USER: what is this? ASSISTANT: a red circle"] * 3,
        trainers.BpeTrainer(
            vocab_size=330,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<pad>", "<s>", "</s>", MARK],
        ),
    )
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]))
    words.post_processor = processors.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        **{"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | options.pop("tokens", {}),
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        **options,
    )


def picture(shade: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, (shade % 256, 0, 255 - shade % 256))


def talk(*texts: str, start: str = "user", row_key: int = 0) -> Sample:
    """A sample whose turns alternate; its pictures differ in shade by their place in the row."""
    roles = ("user", "assistant") if start == "user" else ("assistant", "user")
    turns = tuple(Turn(roles[n % 2], text) for n, text in enumerate(texts))
    marks = sum(turn.marks for turn in turns)
    return Sample(row_key, f"id-{row_key}", turns, tuple(picture(row_key * 50 + n * 9) for n in range(marks)))


words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda text: text.strip() and "<" not in text
)
"""Any Unicode, controls and blanks at the edges included."""

questions = st.one_of(
    words,
    words.map(lambda text: f"{MARK}\n{text}"),
    words.map(lambda text: f"{text}\n{MARK}"),
    st.tuples(words, words).map(lambda pair: f"{pair[0]}{MARK}{pair[1]}{MARK}"),
)


Make = Callable[[], Sample]
"""Samples are made in the test, not while drawing: checking their types takes random numbers that Hypothesis owns."""


@st.composite
def samples(draw: st.DrawFn, row_key: int = 0) -> Make:
    pairs = draw(st.lists(st.tuples(questions, words), min_size=1, max_size=3))
    texts = [text for pair in pairs for text in pair]
    if draw(st.booleans()):
        return partial(talk, draw(words), *texts, start="assistant", row_key=row_key)
    return partial(talk, *texts, row_key=row_key)


@st.composite
def batches(draw: st.DrawFn) -> list[Make]:
    return [draw(samples(row_key=10 + n)) for n in range(draw(st.integers(1, 3)))]
