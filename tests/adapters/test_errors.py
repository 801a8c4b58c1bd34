"""What is refused, by its text; and what the less common arguments of compress() do."""

import pytest
import torch
import transformers as hf
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.adapters.fingerprint import Unchanged
from tests.adapters.tiny import DEPTH, LAYOUTS, RAGGED, tiny_batch, tiny_llava
from tests.adapters.zoo import TEXT
from tokencurric import DART, EPIC, FastV, Random, Uniform, compress, tcd
from tokencurric.adapters import find_parts
from tokencurric.adapters._requirement import check
from tokencurric.adapters.attachment import Attachment
from tokencurric.adapters.deepstack import take_over
from tokencurric.adapters.hugging_face import TransformersSeam
from tokencurric.adapters.layout import lay_out
from tokencurric.adapters.record import Record, Request
from tokencurric.compressors import Tags
from tokencurric.curriculum import constant
from tokencurric.errors import (
    MissingDependencyError,
    MissingSignalError,
    RangeError,
    ShapeError,
    StateError,
    UnsupportedModelError,
)
from tokencurric.testing.models import Recording
from tokencurric.token_budget import Count, Cut


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


class Answering:
    """A compressor that gives the answer it was made with."""

    tags = Tags()

    def __init__(self, answer, needs=()):
        self.answer, self.needs = answer, frozenset(needs)

    def __call__(self, view, keep, *, seed=0):
        return self.answer(view)


# Arguments


@pytest.mark.parametrize("arguments", [{}, {"keep": 4, "ratio": 0.5}])
def test_either_keep_or_ratio(model, arguments):
    with (
        pytest.raises(RangeError, match="TokenBudget needs either keep or ratio; got keep="),
        compress(model, Uniform(), **arguments),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"ratio": 1.5}, RangeError, "keep_count needs 0 <= ratio <= 1; got ratio=1.5"),
        ({"keep": -1}, RangeError, "A budget needs counts >= 0; got keep=-1"),
        ({"keep": torch.tensor([3, -1])}, RangeError, r"A budget needs counts >= 0; got keep=\[3, -1\]"),
        (
            {"keep": 4, "layer": -1},
            RangeError,
            "TokenBudget needs whole numbers layer >= 0; got layer=-1",
        ),
        ({"keep": 4, "layer": DEPTH + 1}, RangeError, "got layer=7"),
        ({"keep": 4, "layer": True}, RangeError, "got layer=True"),
    ],
)
def test_numbers_out_of_range(model, arguments, error, text):
    with pytest.raises(error, match=text), compress(model, Uniform(), **arguments):
        pass


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("keep", "text"), [(0.5, "use ratio="), (torch.ones(2, 2), "one whole number a row")])
def test_what_is_no_count(model, keep, text):
    with pytest.raises((RangeError, ShapeError), match=text), compress(model, Uniform(), keep=keep):
        pass


@pytest.mark.parametrize(("compressor", "signal"), [(FastV(), "attention"), (DART(), "keys")])
def test_layer_zero_has_no_layer_before_it(model, compressor, signal):
    with (
        pytest.raises(MissingSignalError, match=f"needs the signal '{signal}'; got layer=0, which has no"),
        compress(model, compressor, keep=4, layer=0),
    ):
        pass


@pytest.mark.parametrize("signal", ["cls_attention", "grid"])
def test_signals_of_the_vision_tower(model, signal):
    compressor = Answering(None, needs=[signal])
    with (
        pytest.raises(MissingSignalError, match=f"Answering needs the signal '{signal}'; a decoder layer"),
        compress(model, compressor, keep=4),
    ):
        pass


# Calls


def test_a_call_without_ids(model):
    embeds = torch.randn(1, 9, 32)
    with compress(model, Uniform(), keep=4), pytest.raises(StateError, match="got a call without input_ids"):
        model(inputs_embeds=embeds)


def test_a_mask_of_another_sequence(model):
    batch = tiny_batch(LAYOUTS["one"])
    visual = torch.ones(1, 7, dtype=torch.bool)
    batch.pop("attention_mask")
    with (
        compress(model, Uniform(), keep=4, visual_mask=visual),
        pytest.raises(ShapeError, match=r"needs token ids of the decoder's input, shape \(1, 24\); got \(1, 7\)"),
    ):
        model(**batch)


@pytest.mark.usefixtures("unchecked")
def test_a_query_of_another_batch(model):
    with (
        compress(model, FastV(), keep=4, query=torch.tensor([3, 3])),
        pytest.raises(ShapeError, match=r"lay_out needs query of shape \(3,\); got \(2,\)"),
    ):
        model(**tiny_batch(RAGGED))


def test_a_query_outside_the_sequence(model):
    with (
        compress(model, FastV(), keep=4, query=torch.tensor([24])),
        pytest.raises(RangeError, match=r"lay_out needs query positions from 0 to 23; got \[24\]"),
    ):
        model(**tiny_batch(LAYOUTS["one"]))


def test_as_many_counts_as_rows(model):
    with (
        compress(model, Uniform(), keep=torch.tensor([4, 4])),
        pytest.raises(ShapeError, match=r"needs a count for each of the batch's 3 rows; got 2 \(keep=\[4, 4\]\)"),
    ):
        model(**tiny_batch(RAGGED))


def test_nested_contexts(model):
    with (
        compress(model, Uniform(), keep=4),
        pytest.raises(StateError, match="Only one compression can be at work on a LlavaForConditionalGeneration"),
        compress(model, Uniform(), keep=8),
    ):
        pass


def test_one_after_another_is_no_nesting(model):
    objective = EPIC(Uniform(), tcd())
    objective.attach(model)  # its hooks rest
    with compress(model, Uniform(), keep=4):
        model(**tiny_batch(RAGGED))
    objective.detach()


def test_pictures_in_a_later_call(model):
    batch = tiny_batch(LAYOUTS["one"])
    with compress(model, Uniform(), keep=4), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        with pytest.raises(StateError, match="needs all pictures in the first call on a cache; got pixel_values with"):
            model(**batch, past_key_values=cache)


def test_a_prompt_in_chunks(model):
    batch = tiny_batch(LAYOUTS["one"])
    with (
        Unchanged(model),
        compress(model, Uniform(), keep=4),
        pytest.raises(StateError, match="needs the whole prompt in one call; got prefill_chunk_size=7"),
    ):
        model.generate(**batch, max_new_tokens=2, prefill_chunk_size=7)
    assert model.generate(**batch, max_new_tokens=2, prefill_chunk_size=100, do_sample=False).shape == (1, 26)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (lambda view: view.valid.float(), ShapeError, r"boolean mask of shape \(3, 32\); Answering returned dtype="),
        (lambda view: view.valid[:, :3], ShapeError, r"returned dtype=torch.bool, shape=\(3, 3\)"),
        (lambda view: view.valid, RangeError, r"exactly \[4, 4, 0\] tokens of the rows, as its tag exact=True says"),
    ],
)
def test_a_compressor_that_breaks_the_contract(model, answer, error, text):
    with compress(model, Answering(answer), keep=4), pytest.raises(error, match=text):
        model(**tiny_batch(RAGGED))


def test_an_unknown_tensor_that_is_as_long_as_the_sequence(model):
    batch = tiny_batch(LAYOUTS["one"])
    layer = model.get_decoder().layers[3]

    def add(module, args, kwargs):
        return args, {**kwargs, "gates": torch.ones(1, 24)}

    handle = layer.register_forward_pre_hook(add, with_kwargs=True)
    try:
        with (
            compress(model, Uniform(), keep=4),
            pytest.raises(
                UnsupportedModelError,
                match=r"LlamaModel passes gates of shape \(1, 24\) to its layers, which looks aligned",
            ),
        ):
            model(**batch)
    finally:
        handle.remove()


def test_a_decoder_that_keeps_arguments_from_its_layers():
    model = tiny_llava()

    def strip(module, args, kwargs):
        return args, {name: each for name, each in kwargs.items() if not name.startswith("tokencurric")}

    for layer in model.get_decoder().layers:
        layer.register_forward_pre_hook(strip, with_kwargs=True)
    with (
        compress(model, Uniform(), keep=4),
        pytest.raises(UnsupportedModelError, match="LlamaModel does not pass its keyword arguments on to its layers"),
    ):
        model(**tiny_batch(RAGGED))


def test_a_row_that_would_vanish(model):
    with (
        compress(model, Uniform(), keep=0),
        pytest.raises(RangeError, match=r"needs at least one token left in every row; got rows that keep \[8, 0\]"),
    ):
        model(**tiny_batch(((3, "I", 5), ("I",))))


def test_a_decoder_that_takes_an_unknown_tensor_as_long_as_the_sequence():
    class Decoder:
        def forward(self, inputs_embeds, vision_mask=None, **kwargs):
            raise NotImplementedError

    arguments = {"inputs_embeds": torch.zeros(1, 9, 4), "image_sizes": torch.ones(1, 9)}
    assert take_over(Decoder(), arguments, 6) == (arguments, None)  # passed on to layers, which refuse it
    with pytest.raises(UnsupportedModelError, match=r"Decoder takes vision_mask of shape \(1, 9\), which looks"):
        take_over(Decoder(), {**arguments, "vision_mask": torch.ones(1, 9)}, 6)
    late = {"inputs_embeds": torch.zeros(1, 9, 4), "visual_pos_masks": torch.ones(1, 9, dtype=torch.bool)}
    late["deepstack_visual_embeds"] = [torch.zeros(9, 4)] * 6
    with pytest.raises(UnsupportedModelError, match="Decoder adds visual features after 6 of its 6 layers"):
        take_over(Decoder(), late, 6)


def test_an_attention_that_cannot_be_tapped():
    model = tiny_llava()
    attention = model.get_decoder().layers[1].self_attn

    def forward(hidden_states, **kwargs):
        return torch.zeros_like(hidden_states), None

    attention.forward = forward
    with (
        compress(model, FastV(), keep=4),
        pytest.raises(
            StateError, match="FastV needs attention or keys of layer 1; that layer's attention module never called"
        ),
    ):
        model(**tiny_batch(RAGGED))


def test_upper_layers_need_a_captured_input(model):
    attachment = Attachment(TransformersSeam(model))
    layout = lay_out(torch.ones(1, 2, dtype=torch.bool))
    record = Record(Request(Uniform(), (Cut(2, Count(4)),)), layout, torch.zeros(1, dtype=torch.long))
    with pytest.raises(StateError, match="run_upper_layers needs a forward pass that captured"):
        attachment.run_upper_layers(record, None)
    attachment.remove()


# Models


def with_config(**settings):
    """A tiny LLaVA whose text config says something else; its layers are not looked at."""
    model = tiny_llava(depth=1)
    for name, value in settings.items():
        setattr(model.config.text_config, name, value)
    return model


def mllama():
    config = hf.MllamaConfig(
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2},
        text_config={**TEXT, "cross_attention_layers": [1]},
        image_token_index=159,
    )
    with torch.device("meta"):
        return hf.MllamaForConditionalGeneration(config)


def qwen3_5():
    kinds = ["linear_attention", "full_attention"] * 3
    config = hf.Qwen3_5Config(
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32},
        text_config={**TEXT, "model_type": "qwen3_5_text", "layer_types": kinds},
        image_token_id=150,
    )
    with torch.device("meta"):
        return hf.Qwen3_5ForConditionalGeneration(config)


def florence2():
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 160}
    with torch.device("meta"):
        return hf.Florence2ForConditionalGeneration(hf.Florence2Config(text_config={"model_type": "bart", **small}))


def text_only():
    with torch.device("meta"):
        return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))


def without_norm():
    model = tiny_llava(depth=1)
    model.get_decoder().norm = None
    return model


def fsdp1():
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # a real one needs a process group
    nn.Module.__init__(wrapper)
    return wrapper


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (mllama, "MllamaForConditionalGeneration .*: its layers read vision by cross-attention"),
        (qwen3_5, "Qwen3_5ForConditionalGeneration .*: it has layers of kind linear_attention"),
        (florence2, "Florence2ForConditionalGeneration .*: it is an encoder-decoder"),
        (lambda: with_config(num_kv_shared_layers=2), ": its upper layers share keys and values of lower ones"),
        (without_norm, "LlavaForConditionalGeneration has no final norm beside its decoder layers"),
        (lambda: nn.Linear(2, 2), "Linear has no decoder layers to drop tokens in"),
        (fsdp1, r"FullyShardedDataParallel \(FSDP1\) hides the layers from hooks"),
    ],
)
def test_models_that_are_refused_by_name(make, text):
    with pytest.raises(UnsupportedModelError, match=text), compress(make(), Uniform(), keep=4):
        pass


def test_a_config_without_a_visual_token_is_refused_with_the_first_ids():
    model, ids = text_only().to_empty(device="cpu"), torch.ones(1, 4, dtype=torch.long)
    text = r"LlamaForCausalLM names no visual token in its config \(looked for image_token_id.*\nHint: pass visual_mask"
    with compress(model, Uniform(), keep=4, layer=1), pytest.raises(UnsupportedModelError, match=text):
        model(input_ids=ids)
    with pytest.raises(UnsupportedModelError, match=text):
        EPIC(Uniform(), constant(0.5, layer=1))(model, {"input_ids": ids, "labels": ids}, step=0, total=1)


def test_layers_without_self_attention(model):
    odd = tiny_llava(depth=2)
    del odd.get_decoder().layers[1].self_attn
    with pytest.raises(UnsupportedModelError, match="a decoder layer has no self_attn"):
        find_parts(odd)


@pytest.mark.parametrize("found", [None, "5.22.1", "6.0.0", "4.57"])
def test_another_version_of_transformers(found):
    with pytest.raises(MissingDependencyError, match=r"needs transformers >=5.23,<6; .*Install tokencurric\[hf\]"):
        check(found)


# What the less common arguments do


@torch.no_grad()
def test_embeddings_with_a_visual_mask_equal_ids(model):
    batch = tiny_batch(RAGGED)
    visual = batch["input_ids"] == model.config.image_token_id
    seen = {}

    def catch(module, args, kwargs):
        seen["inputs_embeds"] = kwargs["inputs_embeds"]

    handle = model.get_decoder().register_forward_pre_hook(catch, with_kwargs=True)
    plain = model(**batch).logits
    handle.remove()
    key = torch.arange(3)
    with compress(model, FastV(), keep=4, row_key=key):
        from_ids = model(**batch).logits
    with compress(model, FastV(), keep=4, row_key=key, visual_mask=visual):
        from_embeddings = model(**seen, attention_mask=batch["attention_mask"]).logits
    assert torch.equal(from_embeddings, from_ids)
    assert not torch.allclose(plain, from_ids, atol=0.05), "control"


@torch.no_grad()
def test_a_count_for_each_row(model):
    batch, recording = tiny_batch(RAGGED), Recording(Uniform())
    with compress(model, recording, keep=torch.tensor([3, 20, 5])):
        model(**batch)
    assert recording.calls[-1][1].sum(1).tolist() == [3, 20, 0]


@torch.no_grad()
def test_the_query_is_the_position_whose_attention_is_read():
    model = tiny_llava(attention="eager")
    batch, recording = tiny_batch(LAYOUTS["even"]), Recording(FastV())
    query = torch.tensor([20, 22])
    with compress(model, recording, keep=4, query=query):
        model(**batch)
    view = recording.calls[-1][0]
    maps = model(**batch, output_attentions=True).attentions[1].mean(1)
    for row in range(2):
        torch.testing.assert_close(view.attention[row], maps[row, query[row], view.positions[row]])
        assert not torch.allclose(view.attention[row], maps[row, -1, view.positions[row]])


@torch.no_grad()
def test_the_row_key_names_the_draw(model):
    batch = tiny_batch(LAYOUTS["even"])

    def drawn(**arguments):
        recording = Recording(Random())
        with compress(model, recording, keep=4, **arguments):
            model(**batch)
        return recording.calls[-1][1]

    ours = drawn(row_key=torch.tensor([5, 9]))
    assert torch.equal(ours, drawn(row_key=torch.tensor([5, 9])))
    assert torch.equal(ours, drawn(row_key=torch.tensor([9, 5])).flip(0))
    assert not torch.equal(ours, drawn(row_key=torch.tensor([5, 9]), seed=1))
    assert not torch.equal(ours, drawn())


# Restoration


class Broken(Exception):
    pass


@pytest.mark.parametrize("number", range(DEPTH))
def test_an_exception_in_a_layer_leaves_no_trace(number):
    model = tiny_llava()
    model(**tiny_batch(RAGGED))  # transformers puts hooks of its own at a first call

    def fail(module, args):
        raise Broken

    with Unchanged(model):
        handle = model.get_decoder().layers[number].mlp.register_forward_pre_hook(fail)
        with pytest.raises(Broken), compress(model, FastV(), keep=4, layer=2):
            model(**tiny_batch(RAGGED))
        handle.remove()
    plain = model(**tiny_batch(RAGGED)).logits
    assert torch.equal(plain, tiny_llava()(**tiny_batch(RAGGED)).logits)


def test_an_exception_in_the_compressor_leaves_no_trace(model):
    def fail(view):
        raise Broken

    with Unchanged(model), pytest.raises(Broken), compress(model, Answering(fail, needs=["keys"]), keep=4):
        model(**tiny_batch(RAGGED))


def test_an_exception_before_the_layer_that_is_tapped(model):
    def fail(module, args):
        raise Broken

    inner = model.get_decoder().layers[1].input_layernorm
    with Unchanged(model):
        handle = inner.register_forward_pre_hook(fail)
        with compress(model, FastV(), keep=4, layer=2):
            with pytest.raises(Broken):
                model(**tiny_batch(RAGGED))
            handle.remove()
            short = model(**tiny_batch(RAGGED)).logits  # the context is still open, and works
    assert not torch.allclose(short, model(**tiny_batch(RAGGED)).logits, atol=0.05)


def test_the_fingerprint_sees_what_is_left_behind(model):
    for leave, undo in (
        (lambda: setattr(model, "trace", 1), lambda: delattr(model, "trace")),
        (lambda: setattr(model.lm_head, "training", True), lambda: setattr(model.lm_head, "training", False)),
    ):
        with pytest.raises(AssertionError), Unchanged(model):
            leave()
        undo()
    with pytest.raises(AssertionError), Unchanged(model):
        handle = model.lm_head.register_forward_hook(print)
    handle.remove()
