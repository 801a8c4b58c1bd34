"""Where the prompt ends is decided once: a choice never depends on the answer."""

import pytest
import torch

from tests.adapters.tiny import IMAGE, RAGGED, tiny_batch, tiny_llava
from tokencurric import DART, FastV, Random, compress
from tokencurric.errors import RangeError, ShapeError
from tokencurric.testing.models import Recording

NEW, ANSWER = 4, 12
ARGUMENTS = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
ARGUMENTS |= {"suppress_tokens": [IMAGE]}
COMPRESSORS = [FastV(), DART(), Random()]
each_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda each: type(each).__name__)


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def chosen(recording, batch):
    """Which positions were dropped, at each call of the compressor."""
    return recording.dropped(*batch["input_ids"].shape)


@torch.no_grad()
def generated(model, batch, compressor, **settings):
    recording = Recording(compressor)
    options = {"per": settings.pop("per")} if "per" in settings else {}
    with compress(model, recording, keep=5, layer=2, **options):
        out = model.generate(**batch, **ARGUMENTS, **settings)
    return torch.stack(out.logits), out.sequences, len(recording.calls)


@each_compressor
@pytest.mark.parametrize("per", ["row", "image"])
def test_generate_without_a_cache_is_that_with_one(model, compressor, per):
    batch = tiny_batch(RAGGED)
    expected, tokens, _ = generated(model, batch, compressor, per=per)
    ours, same, choices = generated(model, batch, compressor, per=per, use_cache=False)
    assert choices == NEW, "control: each step chose again"
    assert torch.equal(tokens, same)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    plain = torch.stack(model.generate(**batch, **ARGUMENTS, use_cache=False).logits)
    assert (plain - ours).abs().max() > 0.05, "control"


def with_answers(batch, *, padding, seed=3):
    """Prompts with answers behind them; where each prompt ends, and labels."""
    answers = torch.randint(5, 90, (len(batch["input_ids"]), ANSWER), generator=torch.Generator().manual_seed(seed))
    rows, masks, ends, labels = [], [], [], []
    for ids, mask, answer in zip(batch["input_ids"], batch["attention_mask"], answers, strict=True):
        pad = int((mask == 0).sum())
        prompt = ids[mask.bool()]
        filler, nothing = torch.zeros(pad, dtype=torch.long), torch.zeros(pad, dtype=torch.long)
        whole, real = torch.cat((prompt, answer)), torch.ones(len(prompt) + ANSWER, dtype=torch.long)
        wanted = torch.cat((torch.full_like(prompt, -100), answer))
        order = (lambda a, b: torch.cat((a, b))) if padding == "left" else (lambda a, b: torch.cat((b, a)))
        rows.append(order(filler, whole))
        masks.append(order(nothing, real))
        labels.append(order(filler - 100, wanted))
        ends.append(len(prompt) + (pad if padding == "left" else 0))
    long = {**batch, "input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}
    return long, torch.tensor(ends), torch.stack(labels)


@torch.no_grad()
def survivors(model, compressor, batch, labels=None, **told):
    """Which of each row's visual tokens are kept, by their place among them."""
    recording, labelled = Recording(compressor), {} if labels is None else {"labels": labels}
    with compress(model, recording, keep=11, layer=2, **told):  # enough for DART to ask the prompt's text as well
        model(**batch, **labelled)
    gone = recording.dropped(*batch["input_ids"].shape)
    return [(~row[ids == IMAGE]).tolist() for row, ids in zip(gone, batch["input_ids"], strict=True)]


@each_compressor
@pytest.mark.parametrize("padding", ["left", "right"])
def test_scoring_an_answer_chooses_as_the_prompt_alone_does(model, compressor, padding):
    guesses = []
    for seed in range(6):
        prompt = tiny_batch(RAGGED, padding=padding, seed=seed)
        long, ends, labels = with_answers(prompt, padding=padding)
        alone = survivors(model, compressor, prompt)
        assert survivors(model, compressor, long, labels) == alone
        assert survivors(model, compressor, long, prompt_length=ends) == alone
        assert survivors(model, compressor, long, query=ends - 1) == alone
        guesses.append(survivors(model, compressor, long) == alone)
    assert not all(guesses), "control: where nobody states it, the answer is taken for prompt"


@torch.no_grad()
def test_one_prompt_length_for_all_rows(model):
    batch = tiny_batch(((3, "I", 5), (3, "I", 5)))
    long, ends, _ = with_answers(batch, padding="left")
    logits = []
    for length in (int(ends[0]), ends):
        with compress(model, FastV(), keep=5, layer=2, prompt_length=length):
            logits.append(model(**long).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("length", "error"),
    [(0, RangeError), (-1, RangeError), (10_000, RangeError), (torch.tensor([3]), ShapeError)],
    ids=str,
)
def test_a_prompt_length_that_cannot_be_is_refused(model, length, error, unchecked):
    batch = tiny_batch(RAGGED)
    with pytest.raises(error, match="prompt_length"), compress(model, FastV(), keep=5, layer=2, prompt_length=length):
        model(**batch)


def test_a_left_padded_row_without_a_prompt_is_refused(model):
    batch = tiny_batch(RAGGED)
    with pytest.raises(RangeError, match="prompt_length"), compress(model, FastV(), keep=5, layer=2, prompt_length=2):
        model(**batch)
