"""Exact match of greedy answers, with every question's outcome kept."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tokencurric.adapters import compress, find_parts
from tokencurric.adapters.discovery import is_visual
from tokencurric.compressors import Compressor, Uniform, require_compressor
from tokencurric.data.prompts import Prompts
from tokencurric.errors import DataError
from tokencurric.evaluation.significance import binomial_error


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model said to a list of questions.

    Args:
        texts: what it said. correct: whether that was the expected answer. seconds: how long it took.
    """

    texts: tuple[str, ...]
    correct: Bool[Tensor, " question"]
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct.double().mean().item()

    @property
    def error(self) -> float:
        """Standard error of `accuracy`."""
        return binomial_error(self.correct)


def answer_prompts(
    model: Any,
    prompts: Sequence[Prompts],
    tokenizer: Any,
    *,
    compressor: Compressor | None = None,
    keep: int = 0,
    layer: int = 2,
    seed: int = 0,
) -> Answers:
    """Answer every prompt greedily, and hold the answers against the expected ones.

    An answer is right if the text up to the end token equals the reference, blanks at its ends aside. One token more
    than the longest reference needs is generated, so an answer that goes on is seen, and is wrong.

    Args:
        model: a multimodal transformers model that can `generate`.
        prompts: batches of left-padded prompts, as `tokencurric.data.PromptCollator` returns them.
        tokenizer: of the model.
        compressor: what drops visual tokens; None runs the model as it is. keep: tokens that stay.
        layer: first that runs short. seed: of the compressor, whose draws also depend on each sample's `row_key`.

    Returns:
        Texts and outcomes in the order of the prompts.

    Raises:
        DataError: there is no prompt. NotACompressorError: `compressor` is none.

    Example:
        >>> answers = answer_prompts(model, prompts, processor.tokenizer,  # doctest: +SKIP
        ...                          compressor=FastV(), keep=64)
        >>> answers.accuracy, answers.error  # doctest: +SKIP
        (0.874, 0.0105)
    """
    if compressor is not None:
        require_compressor(compressor, who="answer_prompts")
    if not prompts:
        raise DataError("answer_prompts needs prompts; got none. An accuracy is about questions. Pass a batch of them.")
    longest = max(
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for batch in prompts for text in batch.references
    )
    texts: list[str] = []
    begun = time.perf_counter()
    with torch.no_grad(), _evaluating(model):
        for batch in prompts:
            inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
            shortened: AbstractContextManager[Any] = nullcontext()
            if compressor is not None:
                row_key = batch.row_key.to(model.device)
                shortened = compress(model, compressor, keep=keep, layer=layer, row_key=row_key, seed=seed)
            with shortened:
                tokens = model.generate(**inputs, max_new_tokens=longest + 1, do_sample=False, num_beams=1)
            texts += _read(tokens[:, inputs["input_ids"].shape[1] :], model, tokenizer)
    references = [text.strip() for batch in prompts for text in batch.references]
    correct = torch.tensor([text == reference for text, reference in zip(texts, references, strict=True)])
    return Answers(tuple(texts), correct, time.perf_counter() - begun)


def sweep(
    model: Any,
    prompts: Sequence[Prompts],
    tokenizer: Any,
    compressors: Mapping[str, Compressor],
    keeps: Sequence[int],
    *,
    layer: int = 2,
    seed: int = 0,
    tell: Callable[[str], None] = lambda name: None,
) -> dict[tuple[str, int], Answers]:
    """Answers for every compressor and count, and blind.

    A count that drops nothing is measured once for all compressors: nothing runs there but the bare model. Blind,
    under ("blind", 0), is every visual token dropped before the first layer.

    Args:
        model, prompts, tokenizer, layer, seed: as for `answer_prompts`.
        compressors: by name. keeps: visual tokens that stay.
        tell: is called with a word about each pass before it begins, for a progress bar.

    Returns:
        (name, count) -> answers.

    Raises:
        NotACompressorError: a value of `compressors` is none.

    Example:
        >>> table = sweep(model, prompts, tokenizer, {"fastv": FastV()}, [576, 64])  # doctest: +SKIP
        >>> table["fastv", 64].accuracy  # doctest: +SKIP
        0.874
    """
    for name, compressor in compressors.items():
        require_compressor(compressor, who="sweep", name=f"compressors[{name!r}]")
    visual_ids = find_parts(model).visual_ids
    most = max(int(is_visual(batch.inputs["input_ids"], visual_ids).sum(1).max()) for batch in prompts)
    table: dict[tuple[str, int], Answers] = {}
    bare: Answers | None = None
    for keep in keeps:
        for name, compressor in compressors.items():
            if keep >= most:
                if bare is None:
                    tell("all tokens")
                    bare = answer_prompts(model, prompts, tokenizer)
                table[name, keep] = bare
                continue
            tell(f"{name}, {keep}")
            table[name, keep] = answer_prompts(
                model, prompts, tokenizer, compressor=compressor, keep=keep, layer=layer, seed=seed
            )
    tell("blind")
    table["blind", 0] = answer_prompts(model, prompts, tokenizer, compressor=Uniform(), keep=0, layer=0)
    return table


def _read(tokens: Tensor, model: Any, tokenizer: Any) -> list[str]:
    """Text before the first end token of each row. Other special tokens stay: a right answer has none."""
    end = model.generation_config.eos_token_id
    ends = torch.tensor([end] if isinstance(end, int) else end or [], device=tokens.device, dtype=tokens.dtype)
    before_end = torch.isin(tokens, ends).cumsum(1) == 0
    return [
        tokenizer.decode(row[mask].tolist(), skip_special_tokens=False).strip()
        for row, mask in zip(tokens, before_end, strict=True)
    ]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
