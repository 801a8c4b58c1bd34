"""Copies of a model made while compression is at work on it are plain models."""

import copy
import io
import pickle

import pytest
import torch

from tests.adapters.tiny import IMAGE, RAGGED, tiny_batch, tiny_llava
from tokencurric import DART, EPIC, FastV, Random, compress, tcd

NEW = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
NEW |= {"suppress_tokens": [IMAGE]}


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


WAYS = [copy.deepcopy, saved, pickled]


def fresh():
    """A model that never ran: at its first call transformers puts hooks on it that pickle refuses."""
    model = tiny_llava()
    new = type(model)(model.config).eval()
    new.load_state_dict(model.state_dict())
    new.generation_config = model.generation_config
    return new


def answers(model):
    with torch.no_grad():
        batch = tiny_batch(RAGGED)
        return torch.cat(
            (model(**batch).logits.flatten(), torch.stack(model.generate(**batch, **NEW).logits).flatten())
        )


def marks(model):
    """Everything that is put on modules: hooks and attributes that are no parts."""
    return [
        {name: len(value) if isinstance(value, dict) else None for name, value in vars(module).items()}
        for module in model.modules()
    ]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("per", ["row", "image"])
def test_a_copy_made_within_the_context_is_plain(way, per):
    model = fresh()
    plain, before = answers(tiny_llava()), marks(model)
    with compress(model, FastV(), keep=5, layer=2, per=per):
        twin = way(model)
        assert marks(twin) == before
        short = answers(model)
        assert torch.equal(answers(twin), plain)
        assert torch.equal(answers(model), short)
        later = copy.deepcopy(model)
        assert torch.equal(answers(later), plain)
    assert not torch.equal(short, plain), "control"
    for each in (model, twin, later):
        assert torch.equal(answers(each), plain)
    assert marks(twin) == marks(model)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.data_ptr() != other.data_ptr()
    with compress(twin, FastV(), keep=5, layer=2, per=per):
        assert torch.equal(answers(twin), short), "a copy can be compressed like any model"


def test_a_copy_of_a_part_is_plain():
    model = tiny_llava()
    with compress(model, DART(), keep=5, layer=2):
        twin = copy.deepcopy(model.model.language_model)
    assert marks(twin) == marks(model.model.language_model)


def test_a_copy_shares_weights_if_it_is_told_to():
    model = tiny_llava()
    plain = answers(model)
    with compress(model, FastV(), keep=5, layer=2):
        twin = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
        assert torch.equal(answers(twin), plain)
    assert all(one is other for one, other in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_copy_made_while_training_is_plain(way):
    model, objective = fresh(), EPIC(Random(), tcd())
    before = marks(model)
    objective.attach(model)
    twin = way(model)
    with compress(model, FastV(), keep=5, layer=2):  # a second user on the same modules
        third = way(model)
        objective.detach()  # the first one leaves first
        fourth = way(model)
    assert marks(twin) == marks(third) == marks(fourth) == before == marks(model)


def test_hooks_and_methods_of_the_user_are_copied():
    model, calls = tiny_llava(), []
    model.lm_head.register_forward_hook(count := Counting(calls))
    model.model.forward = Forwarding(model.model)
    with compress(model, FastV(), keep=5, layer=2):
        twin = copy.deepcopy(model)
    assert [type(hook) for hook in twin.lm_head._forward_hooks.values()] == [type(count)]
    assert type(twin.model.forward) is Forwarding
    assert twin.model.forward.module is twin.model
    assert type(model.model.forward) is Forwarding


class Counting:
    def __init__(self, calls):
        self.calls = calls

    def __call__(self, module, args, output):
        self.calls.append(module)


class Forwarding:
    """A forward of the instance, as accelerate puts one."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *args, **kwargs):
        return type(self.module).forward(self.module, *args, **kwargs)
