"""Tokenizers of every kind, and processors of two families, made from nothing."""

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3Processor,
    Idefics3Processor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from tests.data.tiny import build_processor

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
TEXT = [
    "A chat between a user and an assistant. USER: what is this? ASSISTANT: a red circle </s> <s> <image> s> </ 0123"
]


def _wrapped(words: Tokenizer, *, bos: bool = True) -> PreTrainedTokenizerFast:
    if bos:
        first = words.token_to_id("<s>")
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def _special(words: Tokenizer, **flags: Any) -> None:
    words.add_special_tokens([AddedToken(token, special=True, **{"normalized": False} | flags) for token in SPECIAL])


def byte_level() -> PreTrainedTokenizerFast:
    """As of GPT-2, Llama 3 and Qwen."""
    return build_processor().tokenizer


def _pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary as of Llama 2, in which merges lead to the control tokens themselves."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL)}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for letter in sorted(set("".join(TEXT)) | {"▁"}):
        vocabulary.setdefault(letter, len(vocabulary))
    merges = [("s", ">"), ("<", "/"), ("</", "s>"), ("<", "s"), ("<s", ">"), ("▁", "a"), ("r", "e"), ("re", "d")]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    return vocabulary, merges


def sentencepiece(*, legacy: bool = False) -> PreTrainedTokenizerFast:
    """As of Llama 2 and Vicuna: pieces with bytes for what is unknown."""
    vocabulary, merges = _pieces()
    words = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        words.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _special(words)
    return _wrapped(words)


def unigram(*, normalized: bool = False) -> PreTrainedTokenizerFast:
    """As of T5, whose model itself has pieces for control tokens."""
    words = Tokenizer(models.Unigram())
    words.normalizer = normalizers.NFKC()
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.train_from_iterator(
        TEXT * 5,
        trainers.UnigramTrainer(
            vocab_size=90, show_progress=False, special_tokens=[] if normalized else SPECIAL, unk_token="<unk>"
        ),
    )
    if normalized:
        _special(words, normalized=True)
    return _wrapped(words)


def word_pieces() -> PreTrainedTokenizerFast:
    """As of BERT."""
    letters = sorted(set("".join(TEXT).lower()))
    vocabulary = {piece: n for n, piece in enumerate([*SPECIAL, *letters, *(f"##{letter}" for letter in letters)])}
    words = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    _special(words)
    return _wrapped(words)


def words() -> PreTrainedTokenizerFast:
    """Whole words, control tokens among them."""
    made = Tokenizer(models.WordLevel({token: n for n, token in enumerate([*SPECIAL, "a", "red"])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _special(made)
    return _wrapped(made)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "sentencepiece": sentencepiece,
    "sentencepiece, legacy": lambda: sentencepiece(legacy=True),
    "unigram": unigram,
    "unigram, normalized": lambda: unigram(normalized=True),
    "word pieces": word_pieces,
    "words": words,
}


def llava(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


class Qwen(Qwen2VLProcessor):
    """Qwen2-VL's processor without its video processor, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = map(
            tokenizer.convert_tokens_to_ids, (self.image_token, self.video_token)
        )
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- macro parts(content) -%}{%- for part in content -%}"
    "{%- if part.type == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{%- else -%}{{ part.text }}"
    "{%- endif -%}{%- endfor -%}{%- endmacro -%}"
    "{%- if message.role == 'assistant' -%}{%- generation -%}{{ parts(message.content) + '<|im_end|>' }}"
    "{%- endgeneration -%}{%- else -%}{{ parts(message.content) + '<|im_end|>' }}{%- endif -%}{{ '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def qwen() -> Qwen:
    """Qwen2-VL's processor and form of a chat, with a small tokenizer."""
    tokenizer = build_processor(bos=False, tokens={"eos_token": "<|im_end|>", "bos_token": None}).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": [*QWEN_TOKENS, "<|box_start|>"]})
    tokenizer.add_tokens(["<think>"])
    return Qwen(Qwen2VLImageProcessorPil(patch_size=14, merge_size=2), tokenizer, chat_template=QWEN_TEMPLATE)


def _with_tokens(*tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def llava_next() -> ProcessorMixin:
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 64], [64, 64]]
    )
    return LlavaNextProcessor(
        pictures, byte_level(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def idefics3() -> ProcessorMixin:
    places = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    tokenizer = _with_tokens("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *places)
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return Idefics3Processor(pictures, tokenizer, image_seq_len=4)


def gemma3() -> ProcessorMixin:
    tokenizer = _with_tokens("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    for name, token in (("boi", "<start_of_image>"), ("eoi", "<end_of_image>"), ("image", "<image_soft_token>")):
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    return Gemma3Processor(Gemma3ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, image_seq_length=4)


FAMILIES: dict[str, tuple[Callable[[], ProcessorMixin], list[str]]] = {
    "llava_next": (llava_next, ["</s>", "<pad>"]),
    "idefics3": (idefics3, ["</s>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>"]),
    "gemma3": (gemma3, ["</s>", "<start_of_image>", "<image_soft_token>", "<end_of_image>"]),
}
"""Processors, and tokens that they or the tokenizer write by themselves."""
