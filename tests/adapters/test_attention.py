"""The attention that is read, held against what the model's own attention function does with values.

Eager attention, given the identity as its values, returns the weights that reach the output: with softmax, cap, mask
and sinks as the family has them.
"""

import sys

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

from tests.adapters.tiny import LAYOUTS, tiny_batch, tiny_llava
from tests.adapters.zoo import HALVES, llava, scaled, tiny_inputs
from tokencurric import FastV, compress
from tokencurric.adapters.discovery import attention_of
from tokencurric.adapters.tap import AttentionTap, attention_row
from tokencurric.errors import UnsupportedModelError
from tokencurric.testing.models import Recording

WINDOW = {"sliding_window": 12}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Text models whose attention is more than a softmax of scaled products, and what makes them small.
SINKS = {
    "gpt_oss": {**WINDOW, **EXPERTS, "layer_types": HALVES, "rope_parameters": ROPE},
    "flint": {},
    "granite_swa": WINDOW,
    "granitemoe_swa": {**WINDOW, **EXPERTS},
    "mimo_v2_flash": {**WINDOW, "n_routed_experts": 4, "num_experts_per_tok": 2},
}
OTHERS = {
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "vaultgemma": {**WINDOW, "attn_logit_softcapping": 2.0},
    "doge": {"keep_window_size": 8},  # adds to the mask what it learnt of each key, head by head
    "mistral": WINDOW,
}


def model_on(backbone):
    torch.manual_seed(0)
    config = llava(backbone, **(SINKS | OTHERS)[backbone])
    model = scaled(hf.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("sinks", ".A")):  # one entry for each head
                parameter.normal_(0, 2.0)
    return model


def true_weights(monkeypatch, model, inputs, layer):
    """[batch heads query key] weights with which a layer's values reach its output."""
    attention = attention_of(model.get_decoder().layers[layer])
    module = sys.modules[type(attention).__module__]
    eager, seen = module.eager_attention_forward, []

    def spy(where, query, key, value, attention_mask, **arguments):
        if where is attention:
            identity = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
            seen.append(eager(where, query, key, identity, attention_mask, **arguments)[0].transpose(1, 2))
        return eager(where, query, key, value, attention_mask, **arguments)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "eager_attention_forward", spy)
        model(**inputs)
    return seen[0]


@torch.no_grad()
def read(model, inputs, layer):
    """View of a compressor that reads attention of `layer`."""
    recording = Recording(FastV())
    with compress(model, recording, keep=5, layer=layer + 1):
        model(**inputs)
    return recording.calls[-1][0]


def agree(ours, theirs, view):
    at = theirs.gather(1, view.positions)
    return torch.allclose(ours[view.valid], at[view.valid], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("backbone", [*SINKS, *OTHERS])
def test_the_signal_is_what_reaches_the_output(monkeypatch, backbone, layer):
    model, inputs = model_on(backbone), tiny_inputs("llava")
    weights, view = true_weights(monkeypatch, model, inputs, layer), read(model, inputs, layer)
    assert agree(view.attention, weights.mean(1)[:, -1], view)
    assert float(view.attention[view.valid].std()) > 1e-4, "control: not all the same"


@pytest.mark.parametrize("backbone", SINKS)
def test_sinks_change_the_signal(monkeypatch, backbone):
    """Control: weights that leave them out are others."""
    model, inputs = model_on(backbone), tiny_inputs("llava")
    layer = next(n for n in (1, 2) if attention_of(model.get_decoder().layers[n]).sinks is not None)
    weights, view = true_weights(monkeypatch, model, inputs, layer), read(model, inputs, layer)
    row = weights[:, :, -1]
    without = (row / row.sum(-1, keepdim=True)).mean(1)
    assert agree(view.attention, row.mean(1), view)
    assert not agree(view.attention, without, view)


@pytest.mark.parametrize("backbone", ["gpt_oss", "mimo_v2_flash"])
@torch.no_grad()
def test_the_signal_is_the_models_own_map(backbone):
    model, inputs = model_on(backbone), tiny_inputs("llava")
    maps = model(**inputs, output_attentions=True).attentions
    for layer in (1, 2):
        view = read(model, inputs, layer)
        assert agree(view.attention, maps[layer].mean(1)[:, -1], view)
        assert not agree(view.attention, maps[layer + 1].mean(1)[:, -1], view), "control: another layer's"


def test_a_mask_with_values_for_each_head_is_added():
    torch.manual_seed(0)
    query, key, at = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.tensor([5, 3])
    sees = torch.arange(6) <= at[:, None]
    bias = torch.randn(2, 4, 6)
    bias[:, 1, 2] = float("-inf")
    logits = torch.einsum("bhd,bhsd->bhs", query[torch.arange(2), :, at], key.repeat_interleave(2, 1)) / 8**0.5 + bias
    expected = logits.masked_fill(~sees[:, None], float("-inf")).softmax(-1).mean(1)
    torch.testing.assert_close(attention_row(query, key, at, sees, bias=bias), expected)
    assert not torch.allclose(attention_row(query, key, at, sees), expected)


def test_a_scale_of_zero_is_one():
    query, key = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    row = attention_row(query, key, torch.tensor([2]), torch.ones(1, 3, dtype=torch.bool), scale=0.0)
    torch.testing.assert_close(row, torch.full((1, 3), 1 / 3))


class Config:
    def __init__(self, implementation):
        self._attn_implementation = implementation


class Attending(nn.Module):
    """An attention module as AttentionTap sees it."""

    def __init__(self, implementation):
        super().__init__()
        self.config = Config(implementation)


def tapped(implementation, mask=None, **arguments):
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    tap = AttentionTap(Attending(implementation), torch.tensor([5]), torch.ones(1, 6, dtype=torch.bool))
    tap.read(query, key, mask, arguments)
    return tap.tapped.attention


def test_flash_attention_has_its_window_in_an_argument():
    """Its mask has two axes or is None, so the window of a sliding layer is nowhere else."""
    assert int((tapped("flash_attention_2", sliding_window=3) > 0).sum()) == 3
    assert int((tapped("flash_attention_2") > 0).sum()) == 6
    window = torch.ones(6, 6, dtype=torch.bool).tril() & torch.ones(6, 6, dtype=torch.bool).triu(-2)
    in_the_mask = tapped("sdpa", window[None, None], sliding_window=3)
    torch.testing.assert_close(tapped("flash_attention_2", sliding_window=3), in_the_mask)


def test_arguments_that_leave_the_weights_alone():
    same = {"dropout": 0.1, "is_causal": True, "position_ids": torch.arange(6)[None], "position_bias": None}
    torch.testing.assert_close(tapped("sdpa", **same), tapped("sdpa"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"position_bias": torch.ones(1, 2, 6, 6)},
        {"sinks": torch.ones(1, 2, 6, 1)},
        {"indices": torch.ones(1)},
        {"cu_seq_lens_q": torch.tensor([0, 3, 6])},
    ],
)
def test_what_is_not_known_to_leave_the_weights_alone_is_refused_by_name(arguments):
    with pytest.raises(
        UnsupportedModelError, match=f"Attending hands {next(iter(arguments))} to its attention function"
    ):
        tapped("sdpa", **arguments)


def test_an_argument_of_the_call_that_no_attention_function_names_is_let_through(monkeypatch):
    model, batch = tiny_llava(), tiny_batch(LAYOUTS["one"])
    plain = Recording(FastV())
    with torch.no_grad(), compress(model, plain, keep=4):
        model(**batch)
    with torch.no_grad(), compress(model, again := Recording(FastV()), keep=4):
        model(**batch, colour=torch.ones(3))
    assert torch.equal(plain.calls[-1][0].attention, again.calls[-1][0].attention)
    with compress(model, FastV(), keep=4), pytest.raises(UnsupportedModelError, match="hands position_bias to"):
        model(**batch, position_bias=torch.zeros(1, 1, 1, 1))  # sdpa takes it, here and in the vision tower


def test_attention_of_a_subclass_finds_the_eager_function_of_its_parent():
    model = tiny_llava(attention="eager")
    batch = tiny_batch(LAYOUTS["one"])
    expected = read(model, batch, 1).attention
    attention = attention_of(model.get_decoder().layers[1])
    attention.__class__ = type("Mine", (type(attention),), {"__module__": __name__})
    torch.testing.assert_close(read(model, batch, 1).attention, expected)


def test_a_mask_that_is_no_tensor_cannot_be_read():
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 6, 6, device="cpu")
    with pytest.raises(UnsupportedModelError, match="Attending has a BlockMask as its mask"):
        tapped("sdpa", mask)
