"""Text that spells control tokens stays text: it is hidden from the template and tokenized without them."""

import copy
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from tokencurric.data.conversations import MARK, Turn
from tokencurric.errors import DataError

# Private-use characters, which fonts and texts hardly use, in blocks of 4,096. Where a text has characters of a block,
# the next one is used. In a block: digits of the names of tokens, names of tokens too short for digits, stand-ins of
# first characters, the begin and the filling of a name.
_BLOCKS = tuple(range(0x10F000, 0x100000, -0x1000))
_SHORT, _FIRSTS, _BEGIN, _FILLING, _ROOM = 1024, 2048, 4000, 4001, 1024


class ControlTokens:
    r"""The tokens that steer a model, and how to keep text that spells them from becoming them.

    A text is rendered and expanded with the first character of each spelled token replaced by a stand-in, so that
    neither template nor processor sees a token there. Before it is tokenized the stand-ins are taken back, and the
    tokens that the *template* wrote are respelled instead: a twin of the tokenizer knows them by other names, with the
    same number and the same length. So the text is tokenized whole, and offsets stay those of the text.

    Args:
        tokenizer: fast tokenizer of transformers.
        contents: spellings of the tokens.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.BPE({letter: n for n, letter in enumerate("ab</s>")}, []))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> control = ControlTokens(tokenizer, ["</s>"])
        >>> hidden = control.hide([Turn("assistant", "a</s>b")])
        >>> encoded = control.twin()([hidden[0].text + "</s>"])
        >>> tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
        ['a', '<', '/', 's', '>', 'b', '</s>']
    """

    def __init__(self, tokenizer: Any, contents: Iterable[str]) -> None:
        self.tokenizer = tokenizer
        self.contents = tuple(sorted(set(contents), key=lambda text: (-len(text), text)))
        self.firsts = tuple(sorted({text[0] for text in self.contents}))
        self._known = frozenset(self.contents)
        self._lengths = tuple(sorted({len(text) for text in self.contents}, reverse=True))
        self._first = re.compile(f"[{re.escape(''.join(self.firsts))}]" if self.firsts else "(?!)")
        self._named: dict[int, dict[str, str]] = {}
        self._twins: dict[int, Any] = {}

    def spells(self, turns: Iterable[Turn]) -> bool:
        """Whether tokenizing the turns' words would give a control token where only text is meant."""
        return any(self._spelled(turn.words) for turn in turns)

    def hide(self, turns: Sequence[Turn], block: int = _BLOCKS[0]) -> list[Turn]:
        """Turns with a stand-in for the first character of each control token that their words spell."""
        return [Turn(turn.role, self._hidden(turn, block)) for turn in turns]

    def block(self, texts: Iterable[str]) -> int:
        """The first block of stand-ins that no text uses.

        Raises:
            DataError: the texts use characters of every block.
        """
        used = {ord(letter) & ~0xFFF for text in texts for letter in text if letter >= "\U00100000"}
        free = next((block for block in _BLOCKS if block not in used), None)
        if free is None:
            raise DataError(
                "a text that spells control tokens must leave some private-use characters unused.\n"
                "Hint: the rows of this batch use all blocks from U+101000 to U+10FFFF; leave them out."
            )
        return free

    def twin(self, block: int = _BLOCKS[0]) -> "TwinTokenizer":
        """A tokenizer for texts with stand-ins.

        Raises:
            DataError: the tokenizer cannot be respelled, so spelled tokens could not be told from real ones.
        """
        if block not in self._twins:
            self._twins[block] = self._made(block)
        return TwinTokenizer(self, self._twins[block], block)

    def respelled(self, text: str, block: int) -> str:
        """`text` with other names for its control tokens, and with what stand-ins stand for."""
        names, pieces, done = self._names(block), [], 0
        for start, end in self._places(text):
            if start >= done:
                pieces += [text[done:start], names[text[start:end]]]
                done = end
        text = "".join([*pieces, text[done:]])
        return text.translate({block + _FIRSTS + number: first for number, first in enumerate(self.firsts)})

    def _spelled(self, words: str) -> bool:
        if any(True for _ in self._places(words)):
            return True
        # Some tokens are looked for after normalization, or are in the model's own vocabulary: a fullwidth "</s>".
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        return normalizer is not None and any(True for _ in self._places(normalizer.normalize_str(words)))

    def _places(self, text: str) -> Iterator[tuple[int, int]]:
        """Where tokens are spelled, the longest at each place. Some tokenizers have thousands, too many for a regex."""
        for found in self._first.finditer(text):
            start = found.start()
            for length in self._lengths:
                if text[start : start + length] in self._known:
                    yield start, start + length
                    break

    def _hidden(self, turn: Turn, block: int) -> str:
        # Templates may move images to the front, so tokens are looked for across the marks, too.
        words = turn.words
        places = {start for start, _ in self._places(words)}
        if not places:
            return turn.text
        stand_in = {first: chr(block + _FIRSTS + number) for number, first in enumerate(self.firsts)}
        letters = iter([stand_in[letter] if at in places else letter for at, letter in enumerate(words)])
        return MARK.join("".join(islice(letters, len(piece))) for piece in turn.text.split(MARK))

    def _names(self, block: int) -> dict[str, str]:
        """Other names of the tokens, each as long as its token."""
        if block not in self._named:
            names, short = {}, 0
            for number, content in enumerate(self.contents):
                if len(content) < 3:
                    names[content] = chr(block + _SHORT + short) * len(content)
                    short += 1
                else:
                    digits = "".join(chr(block + digit) for digit in divmod(number, _ROOM))
                    names[content] = chr(block + _BEGIN) + digits + chr(block + _FILLING) * (len(content) - 3)
            if max(short, len(self.firsts), len(names) // _ROOM) > _ROOM:
                raise self._unsupported(f"{len(names)} control tokens")
            self._named[block] = names
        return self._named[block]

    def _made(self, block: int) -> Any:
        from tokenizers import Tokenizer

        names = self._names(block)
        told = json.loads(self.tokenizer.backend_tokenizer.to_str())
        try:
            twin = Tokenizer.from_str(json.dumps(_renamed(told, names)))
        except Exception as error:  # the Rust side raises plain Exception
            raise self._unsupported(f"an error while respelling it ({error})") from error
        made = copy.copy(self.tokenizer)
        made._tokenizer = twin
        # Special tokens are looked up by the names that the tokenizer itself has for them.
        made.convert_tokens_to_ids = self.tokenizer.convert_tokens_to_ids
        self._check(made, block)
        return made

    def _check(self, made: Any, block: int) -> None:
        """Tokens are found under their new names, and under the old ones are text."""
        if made.backend_tokenizer is self.tokenizer.backend_tokenizer:
            raise self._unsupported("no backend that can be exchanged")
        probes = [f"one{content}{content} two {content}" for content in self.contents]
        respelled = [self.respelled(probe, block) for probe in probes]
        plain = {"add_special_tokens": False, "padding": False, "truncation": False}
        real, alike, spelled = (
            tokenizer(texts, **plain)["input_ids"]
            for tokenizer, texts in ((self.tokenizer, probes), (made, respelled), (made, probes))
        )
        for number, content in enumerate(self.contents):
            token = self.tokenizer.convert_tokens_to_ids(content)
            alone = token not in spelled[number] or token == self.tokenizer.unk_token_id
            if real[number] != alike[number] or not alone:
                raise self._unsupported(f"{content!r}, which cannot be told from text")

    def _unsupported(self, got: str) -> DataError:
        return DataError(
            f"text that spells control tokens cannot be tokenized with {type(self.tokenizer).__name__}: {got}.\n"
            "Hint: leave the rows out, or name the tokens in allowed_special= if the text means them."
        )


class TwinTokenizer:
    """A tokenizer for texts with stand-ins; in all else the tokenizer that it stands for."""

    def __init__(self, control: ControlTokens, twin: Any, block: int) -> None:
        self._control, self._twin, self._block = control, twin, block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control.tokenizer, name)

    def __call__(self, text: str | Sequence[str], **options: Any) -> Any:
        """Tokenize one text or several."""
        if isinstance(text, str):
            return self._twin(self._control.respelled(text, self._block), **options)
        return self._twin([self._control.respelled(each, self._block) for each in text], **options)


def control_contents(
    tokenizer: Any, named: Iterable[str | None], written: str, *, allowed: Collection[str] = ()
) -> list[str]:
    """Spellings of the tokens that steer a model.

    Args:
        tokenizer: fast tokenizer; its special tokens are control tokens.
        named: tokens that processor and template have names for; None is no token.
        written: what a template writes around turns; added tokens in it are control tokens.
        allowed: tokens that text may spell.

    Returns:
        Spellings, without those of `allowed`.
    """
    added = tokenizer.added_tokens_decoder
    found = {token.content for token in added.values() if token.special or token.content in written}
    found |= {str(token) for token in tokenizer.all_special_tokens}
    found |= {str(token) for token in getattr(tokenizer, "chat_control_tokens", None) or ()}
    found |= {token for token in named if token and tokenizer.convert_tokens_to_ids(token) in added}
    # Some tokenizers list blanks and line breaks as added tokens; these are text.
    return [content for content in found if content.strip() and content not in allowed]


def _renamed(told: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A tokenizer as JSON, with other names for some tokens."""
    for token in told["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = told["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
    else:  # of a unigram model: pieces with their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if model.get("merges"):
        pairs = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
    return told
