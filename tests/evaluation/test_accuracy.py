"""Exact match: of a rigged model it is what it must be; of a real one it depends on what it should depend on."""

from types import SimpleNamespace

import pytest
import torch

from tests.adapters.tiny import PATCHES, tiny_batch, tiny_llava
from tokencurric import FastV, Random, Uniform
from tokencurric.data import Prompts
from tokencurric.errors import DataError, RangeError
from tokencurric.evaluation import answer_prompts, kept_tokens, sweep

END = 2


class Numbers:
    """A tokenizer whose words are the ids themselves."""

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids, skip_special_tokens=True):
        assert not skip_special_tokens
        return " ".join(map(str, ids))


class Rigged:
    """A model that says what it is told to."""

    def __init__(self, replies, end):
        self.replies, self.training, self.device = list(replies), True, torch.device("cpu")
        self.generation_config = SimpleNamespace(eos_token_id=end)
        self.asked = []

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode

    def generate(self, *, input_ids, max_new_tokens, do_sample, num_beams, **inputs):
        assert not (self.training or do_sample)
        self.asked.append(max_new_tokens)
        said = [self.replies.pop(0)[:max_new_tokens] for _ in input_ids]
        width = max(map(len, said))
        return torch.cat([input_ids, torch.tensor([row + [0] * (width - len(row)) for row in said])], dim=1)


def prompts(*references):
    ids = torch.ones(len(references), 3, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": ids}
    return Prompts(inputs, references, torch.arange(len(references)))


@pytest.mark.parametrize("end", [END, [END, 3]])
def test_a_rigged_model_has_the_accuracy_it_was_given(end):
    replies = {
        "7": [7, END],  # right
        "8": [9, END],  # wrong
        "5 6": [5, 6, END],  # right, and longer than the others
        "4": [4, 4, END],  # goes on
        "10": [END],  # says nothing
        "11": [11, 0, END],  # has a special token in it
    }
    model = Rigged(replies.values(), end)
    batches = [prompts("7", "8", "5 6"), prompts("4", "10", "11")]
    answers = answer_prompts(model, batches, Numbers())
    assert answers.correct.tolist() == [True, False, True, False, False, False]
    assert answers.accuracy == pytest.approx(2 / 6)
    assert answers.error == pytest.approx((2 / 6 * 4 / 6 / 6) ** 0.5)
    assert answers.texts == ("7", "9", "5 6", "4 4", "", "11 0")
    assert model.asked == [3, 3], "one token more than the longest reference"
    assert model.training, "the mode is restored"


def test_without_prompts_there_is_no_accuracy():
    with pytest.raises(DataError, match="answer_prompts needs prompts"):
        answer_prompts(Rigged([], END), [], Numbers())


def pictured(rows, *, seed=1):
    inputs = tiny_batch(((3, "I", 5),) * rows, seed=seed)
    return Prompts(inputs, ("1 2",) * rows, torch.arange(rows))


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def test_sweep_equals_single_passes_and_shares_the_bare_one(model):
    asked, batches = [], [pictured(3), pictured(2, seed=5)]
    compressors = {"random": Random(), "fastv": FastV()}
    table = sweep(model, batches, Numbers(), compressors, [PATCHES, 3], layer=2, seed=4, tell=asked.append)
    assert asked == ["all tokens", "random, 3", "fastv, 3", "blind"]
    assert table["random", PATCHES] is table["fastv", PATCHES]
    assert table["random", PATCHES].texts == answer_prompts(model, batches, Numbers()).texts
    for name, compressor in compressors.items():
        alone = answer_prompts(model, batches, Numbers(), compressor=compressor, keep=3, layer=2, seed=4)
        assert table[name, 3].texts == alone.texts
        assert alone.texts != table[name, PATCHES].texts, "control: dropping changes what is said"


def test_blind_sees_nothing_of_the_picture(model):
    one, other = pictured(6), pictured(6)
    other.inputs["pixel_values"] = -other.inputs["pixel_values"]
    tables = [sweep(model, [batch], Numbers(), {"uniform": Uniform()}, [PATCHES]) for batch in (one, other)]
    assert tables[0]["blind", 0].texts == tables[1]["blind", 0].texts
    assert tables[0]["uniform", PATCHES].texts != tables[1]["uniform", PATCHES].texts


def test_answers_do_not_depend_on_batches(model):
    whole = pictured(4)
    parts = [
        Prompts(
            {name: value[at : at + 1] for name, value in whole.inputs.items()}, ("1 2",), whole.row_key[at : at + 1]
        )
        for at in range(4)
    ]
    settings = {"compressor": Random(), "keep": 4, "layer": 2}
    together = answer_prompts(model, [whole], Numbers(), **settings)
    assert together.texts == answer_prompts(model, parts, Numbers(), **settings).texts
    other_seed = answer_prompts(model, [whole], Numbers(), **settings, seed=1)
    assert together.texts != other_seed.texts, "control: another draw, other answers"


def test_kept_tokens_are_those_of_the_compressor(model):
    batch = pictured(2)
    kept = kept_tokens(model, batch.inputs, Uniform(), keep=5)
    assert kept.shape == (2, PATCHES)
    assert kept.sum(1).tolist() == [5, 5]
    fewer = kept_tokens(model, batch.inputs, Uniform(), keep=3)
    assert (kept | fewer).equal(kept)
    by_attention = kept_tokens(model, batch.inputs, FastV(), keep=5)
    assert not by_attention.equal(kept)
    with pytest.raises(RangeError, match="below the number of visual tokens"):
        kept_tokens(model, batch.inputs, Uniform(), keep=PATCHES)
