"""compress() and EPIC on wrapped models: PEFT, accelerate's hooks, low precision, torch.compile."""

import copy

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model

from tests.adapters.fingerprint import Unchanged
from tests.adapters.tiny import IMAGE, RAGGED, tiny_batch, tiny_llava
from tests.adapters.zoo import tiny_inputs, tiny_model
from tokencurric import DART, EPIC, FastV, Random, compress, tcd
from tokencurric.curriculum import constant
from tokencurric.errors import UnsupportedModelError
from tokencurric.testing.models import Recording, apart, hidden

GREEDY = {
    "max_new_tokens": 4,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
    "suppress_tokens": [IMAGE],
}


def compressed(model, batch, compressor=None):
    """Logits of a prefill and of generation, under compression."""
    with torch.no_grad(), compress(model, FastV() if compressor is None else compressor, keep=5, layer=2):
        prefill = model(**batch).logits
        return prefill, torch.stack(model.generate(**batch, **GREEDY).logits)


# DeepSpeed, without an import of it


def engine(model, module="deepspeed.runtime.engine"):
    """A class of the name of DeepSpeed's, around a model."""

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    wrapped = type("DeepSpeedEngine", (torch.nn.Module,), {"__module__": module, "forward": forward})()
    wrapped.module = model
    return wrapped


def test_deepspeeds_engine_is_looked_through():
    model, batch = tiny_llava(), tiny_batch(RAGGED)
    wrapped = engine(model)
    with torch.no_grad():
        with compress(wrapped, FastV(), keep=5, layer=2):
            found = wrapped(**batch).logits
        with compress(model, FastV(), keep=5, layer=2):
            expected = model(**batch).logits
        assert torch.equal(found, expected)
        assert not torch.equal(found, wrapped(**batch).logits), "control: it was compressed"
    other = engine(model, module="someone.elses")
    with pytest.raises(UnsupportedModelError, match="DeepSpeedEngine"), compress(other, FastV(), keep=5):
        pass


# PEFT


def lora(model, **settings):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False, **settings)
    return get_peft_model(model, config).eval()


def test_lora_equals_its_merged_model():
    torch.manual_seed(3)
    model, batch = lora(tiny_llava()), tiny_batch(RAGGED)
    model(**batch)
    with Unchanged(model):
        prefill, generated = compressed(model, batch)
    merged = compressed(copy.deepcopy(model).merge_and_unload(), batch)
    base = compressed(tiny_llava(), batch)
    torch.testing.assert_close(prefill, merged[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(generated, merged[1], rtol=1e-4, atol=1e-4)
    assert apart(base[0], prefill) > 1e-2, "control"


def test_epic_trains_lora_alone():
    torch.manual_seed(3)
    # LLaVA never reads the last layer of its tower, so adapters there would learn nothing.
    model = lora(tiny_llava(dtype=torch.float64), exclude_modules=".*vision_tower.*")
    batch = tiny_batch(RAGGED, padding="right", answers=2)
    objective = EPIC(DART(), constant(0.8, margin=0.4))
    out = objective(model, batch, step=0, total=1)
    out.loss.backward()
    objective.detach()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name for name in trained)
    merged = EPIC(DART(), constant(0.8, margin=0.4))(copy.deepcopy(model).merge_and_unload(), batch, step=0, total=1)
    torch.testing.assert_close(out.loss, merged.loss)


# accelerate


def test_hooks_that_align_devices():
    model, batch = tiny_llava(), tiny_batch(RAGGED)
    expected = compressed(model, batch)
    for layer in model.get_decoder().layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    with Unchanged(model):
        ours = compressed(model, batch)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


def test_weights_that_come_and_go():
    model, batch = tiny_llava(), tiny_batch(RAGGED)
    plain, expected = model(**batch).logits.detach(), compressed(model, batch, DART())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    ours = compressed(model, batch, DART())
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])
    assert apart(plain, ours[0]) > 1e-2, "control"


# Precision


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_vl"])
@torch.no_grad()
def test_low_precision(family, dtype, attention):
    model, inputs = tiny_model(family, attention=attention, dtype=dtype), tiny_inputs(family)
    recording = Recording(FastV())
    plain = model(**inputs).logits
    with compress(model, recording, keep=5, layer=2):
        short = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    dropped = recording.dropped(*inputs["input_ids"].shape)
    with hidden(model, dropped, 2):
        full = model(**inputs).logits
    kept = inputs["attention_mask"].bool() & ~dropped
    assert short.dtype == dtype
    assert apart(short[kept], full[kept]) < 0.03
    assert apart(plain[kept], full[kept]) > 0.1, "control"
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3


# torch.compile


def compiled(model, first):
    """With each layer from `first` on compiled by itself."""
    layers = model.get_decoder().layers
    for number in range(first, len(layers)):
        layers[number] = torch.compile(layers[number], backend="aot_eager")
    return model


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked", "fresh_compiler")
def test_epic_on_compiled_layers():
    batch = tiny_batch(RAGGED, padding="right", answers=2)
    grads = []
    for make in (tiny_llava, lambda **settings: compiled(tiny_llava(**settings), 0)):
        model = make(dtype=torch.float64)
        objective = EPIC(Random(), tcd())
        objective(model, batch, step=9, total=10).loss.backward()
        grads.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    for plain, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain)
