"""The laws of a compressed model against compressions that are wrong."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tests.adapters.tiny import DEPTH, EVEN, tiny_batch, tiny_llava
from tokencurric import compress
from tokencurric.errors import RangeError, UnsupportedModelError
from tokencurric.testing import LawError, check_model, model_checks
from tokencurric.testing.laws import models
from tokencurric.testing.models import Prompted, fingerprint

LAYERS = "model.language_model.layers"


@contextmanager
def one_layer_late(model, compressor, *, layer, **amount):
    with compress(model, compressor, layer=min(layer + 1, DEPTH - 1), **amount):
        yield


@contextmanager
def keeps_another_token(model, compressor, **where):
    class Shifted:
        needs, tags = compressor.needs, compressor.tags

        def __call__(self, view, keep, *, seed=0):
            return compressor(view, keep, seed=seed).roll(1, 1) & view.mask

    with compress(model, Shifted(), **where):
        yield


@contextmanager
def decodes_otherwise(model, compressor, *, layer, **amount):
    """The prompt is right, what reads the cache is not."""

    def scale(module, args, output):
        return output * 1.01 if output.shape[1] == 1 else output

    with compress(model, compressor, layer=layer, **amount):
        handle = model.get_submodule(LAYERS)[layer].register_forward_hook(scale)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def rounds(model, compressor, **where):
    """Costs a bit even where nothing is dropped."""
    with compress(model, compressor, **where):
        handle = model.lm_head.register_forward_hook(lambda module, args, logits: logits * (1 + 1e-6))
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def leaves_an_attribute(model, compressor, **where):
    with compress(model, compressor, **where):
        yield
    model.get_submodule(LAYERS)[1].seen = True


@contextmanager
def is_not_cleaned_up(model, compressor, **where):
    handle = model.register_forward_hook(lambda *_: None)
    with compress(model, compressor, **where):
        yield
    handle.remove()  # not reached by an exception


WRONG = {
    one_layer_late: "runs_short",
    keeps_another_token: "equals_the_masked_model",
    decodes_otherwise: "generates_what_a_recompute_gives",
    rounds: "keeps_all_when_allowed",
    leaves_an_attribute: "leaves_the_model_as_it_was",
    is_not_cleaned_up: "survives_an_exception",
}
CHECKS = {check.name: check for check in model_checks()}


@pytest.fixture
def subject():
    return Prompted(tiny_llava(), tiny_batch(EVEN), generation={"suppress_tokens": [99]})


@pytest.mark.parametrize(("wrong", "name"), WRONG.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_wrong_compression_is_caught(monkeypatch, subject, wrong, name):
    CHECKS[name](subject)
    monkeypatch.setattr(models, "compress", wrong)
    with pytest.raises(LawError, match=f"LlavaForConditionalGeneration breaks `{name}`"):
        CHECKS[name](subject)


def test_every_law_catches_something():
    assert set(WRONG.values()) == CHECKS.keys()


def test_a_report_tells_what_was_checked():
    report = check_model(tiny_llava(), tiny_batch(EVEN), examples=1, generation={"suppress_tokens": [99]})
    assert set(report.passed) == CHECKS.keys()
    assert "LlavaForConditionalGeneration: 6 laws hold, 0 broken" in repr(report)


def test_half_precision_is_held_to_what_it_can_show():
    batch = tiny_batch(EVEN)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    model = tiny_llava(dtype=torch.bfloat16)
    report = check_model(model, batch, generation={"suppress_tokens": [99]})
    assert not report.failed


def test_a_model_of_one_layer_is_asked_too():
    report = check_model(tiny_llava(depth=1), tiny_batch(EVEN), generation={"suppress_tokens": [99]})
    assert not report.failed


def test_a_changed_buffer_or_setting_is_seen():
    model = tiny_llava()
    before = fingerprint(model)
    assert fingerprint(model) == before
    model.model.language_model.rotary_emb.inv_freq.mul_(1)
    written = fingerprint(model)
    assert written != before
    model.config._noted = True
    assert fingerprint(model) != written


def test_what_cannot_generate_is_not_asked_to():
    report = check_model(tiny_llava(), tiny_batch(padding="right"), examples=1)
    assert set(report.unclaimed) == {"generates_what_a_recompute_gives", "leaves_the_model_as_it_was"}


def test_a_model_on_which_nothing_matters_is_no_proof(subject):
    for layer in subject.model.get_submodule(LAYERS):
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    with pytest.raises(LawError, match=r"Dropping moves the logits by 0.0e\+00 of the largest"):
        CHECKS["equals_the_masked_model"](subject)


def test_inputs_without_pictures_are_refused():
    with pytest.raises(RangeError, match="two visual tokens in some row; got 0"):
        check_model(tiny_llava(), tiny_batch(((4,), (6,))))


def test_a_model_that_cannot_be_compressed_is_refused():
    with pytest.raises(UnsupportedModelError, match="Linear has no decoder layers"):
        check_model(nn.Linear(2, 2), {})
