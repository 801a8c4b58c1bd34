"""compress() and torch.compile: what is one graph, what is compiled again, and what was compiled before.

Not collected with the other tests: test_compiled.py runs it in a process whose library is not checked, for the compiler
cannot trace checks.
"""

import os
import shutil
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from transformers import CompileConfig, StaticCache

from tests.adapters.tiny import EVEN, IMAGE, ONE, RAGGED, tiny_batch, tiny_llava
from tokencurric import DART, EPIC, FastV, Uniform, compress
from tokencurric.curriculum import constant
from tokencurric.errors import UnsupportedModelError
from tokencurric.testing.models import Recording, apart, fingerprint, recomputed

DEPTH, LAYER, KEEP, NEW = 3, 1, 5, 4
COMPRESSORS = [pytest.param(FastV(), id="FastV")]
COMPRESSORS += [pytest.param(each, id=type(each).__name__, marks=pytest.mark.slow) for each in (Uniform(), DART())]
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler, g++ or that in $CXX"
)
BACKENDS = ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])]

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Graphs:
    """A backend of torch.compile that counts the graphs it makes, and how often one runs."""

    def __init__(self, backend="aot_eager"):
        self.backend = lookup_backend(backend)
        self.made = self.ran = 0

    def __call__(self, graph, inputs):
        self.made += 1
        run = self.backend(graph, inputs)

        def counted(*args):
            self.ran += 1
            return run(*args)

        return counted

    def __deepcopy__(self, memo):
        return self  # transformers copies its settings


@pytest.fixture
def fresh_compiler():
    """With room for a graph of each layer: one that writes into a cache knows its own number."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


def by_layers(model, graphs):
    """Each layer is one graph, the one that is listened to as well, or torch.compile fails."""
    layers = model.get_decoder().layers
    for number in range(DEPTH):
        layers[number] = torch.compile(layers[number], backend=graphs, fullgraph=True)
    return model


def layers_in_place(model, graphs):
    for layer in model.get_decoder().layers:
        layer.compile(backend=graphs)
    return model


def whole(model, graphs):
    return torch.compile(model, backend=graphs)


def whole_in_place(model, graphs):
    model.compile(backend=graphs)
    return model


def decoder_in_place(model, graphs):
    model.get_decoder().compile(backend=graphs)
    return model


WAYS = [by_layers]
WAYS += [pytest.param(x, marks=pytest.mark.slow) for x in (layers_in_place, whole, whole_in_place, decoder_in_place)]


@torch.no_grad()
def prefill(model, batch, compressor=None, keep=KEEP):
    """Logits, compressed if there is a compressor."""
    with nullcontext() if compressor is None else compress(model, compressor, keep=keep, layer=LAYER):
        return model(**batch).logits


@torch.no_grad()
def generated(model, batch, compressor, *, static=True, new=NEW, **settings):
    """Logits of the new tokens, and those of a recompute without a cache where dropped tokens are hidden."""
    recording = Recording(compressor)
    config = model.config.text_config
    cache = {"past_key_values": StaticCache(config=config, max_cache_len=80)} if static else {}
    asked = {"max_new_tokens": new, "do_sample": False, "suppress_tokens": [IMAGE]}
    told = {"output_logits": True, "return_dict_in_generate": True}
    with compress(model, recording, keep=KEEP, layer=LAYER):
        out = model.generate(**batch, **asked, **told, **cache, **settings)
    dropped = recording.dropped(*batch["input_ids"].shape)
    again = recomputed(tiny_llava(depth=DEPTH), batch, dropped, LAYER, out.sequences)
    full = recomputed(tiny_llava(depth=DEPTH), batch, torch.zeros_like(dropped), LAYER, out.sequences)
    assert apart(full, again) > 1e-2, "control"
    return torch.stack(out.logits), again


# One graph a layer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("rows", [EVEN, pytest.param(RAGGED, marks=pytest.mark.slow)], ids=["even", "ragged"])
def test_a_layer_is_one_graph_in_prefill(backend, compressor, rows):
    batch, graphs = tiny_batch(rows), Graphs(backend)
    expected = prefill(tiny_llava(depth=DEPTH), batch, compressor)
    ours = prefill(by_layers(tiny_llava(depth=DEPTH), graphs), batch, compressor)
    assert graphs.ran == DEPTH, "control: it was graphs that ran"
    assert apart(ours, expected) < 1e-4
    assert apart(prefill(tiny_llava(depth=DEPTH), batch), expected) > 1e-2, "control"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("static", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["static", "dynamic"])
def test_a_layer_is_one_graph_in_decoding(backend, compressor, static):
    batch, graphs = tiny_batch(EVEN), Graphs(backend)
    model = by_layers(tiny_llava(depth=DEPTH), graphs)
    ours, again = generated(model, batch, compressor, static=static)
    assert apart(ours, again) < 1e-4
    assert graphs.ran == DEPTH * NEW, "control: it was graphs that ran, in the prefill and in each step after it"
    made = graphs.made
    ours, again = generated(model, tiny_batch(EVEN, seed=7), compressor, static=static, new=NEW + 4)
    assert apart(ours, again) < 1e-4
    assert graphs.made == made, "neither another prompt nor a longer answer is compiled again"
    generated(model, tiny_batch(ONE), compressor, static=static)
    assert graphs.made > made, "control: another number of rows is"


# Compiled again?


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("way", WAYS)
def test_other_contents_are_not_compiled_again(way, compressor):
    reference, graphs = tiny_llava(depth=DEPTH), Graphs()
    model = way(tiny_llava(depth=DEPTH), graphs)
    made, ran = [], []
    for seed in (1, 2, 3):
        batch = tiny_batch(EVEN, seed=seed)
        ours, expected = prefill(model, batch, compressor), prefill(reference, batch, compressor)
        assert apart(ours, expected) < 1e-5
        assert apart(prefill(reference, batch), expected) > 1e-2, "control"
        made.append(graphs.made)
        ran.append(graphs.ran)
    assert made[1:] == made[:1] * 2
    assert ran[2] - ran[1] >= DEPTH, "control: graphs ran"
    prefill(model, tiny_batch(ONE), compressor)
    assert graphs.made > made[0], "control: another number of rows is"


# Compiled before the context was open: torch.compile does not look whether hooks were put on since


@pytest.mark.parametrize("way", WAYS)
def test_graphs_from_before_do_not_overlook_the_hooks(way):
    reference, batch, graphs = tiny_llava(depth=DEPTH), tiny_batch(EVEN), Graphs()
    model = way(tiny_llava(depth=DEPTH), graphs)
    plain, expected = prefill(reference, batch), prefill(reference, batch, FastV())
    assert apart(plain, expected) > 1e-2, "control"
    before = fingerprint(model)
    made = []
    for _ in range(3):
        assert apart(prefill(model, batch), plain) < 1e-5
        assert apart(prefill(model, batch, FastV()), expected) < 1e-5
        assert apart(prefill(model, batch, FastV(), keep=7), prefill(reference, batch, FastV(), keep=7)) < 1e-5
        made.append(graphs.made)
    assert made[1] == made[2], "and the graphs of both are kept, once there is one of each kind"
    assert fingerprint(model) == before


@pytest.mark.parametrize("fullgraph", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_decoding_that_generate_compiles_by_itself(fullgraph):
    """As it does on accelerators, for a static cache."""
    model, batch, graphs = tiny_llava(depth=DEPTH), tiny_batch(EVEN), Graphs()
    config = CompileConfig(backend=graphs, mode=None, fullgraph=fullgraph)
    config._compile_all_devices = True
    cache = StaticCache(config=model.config.text_config, max_cache_len=80)
    with torch.no_grad():  # as one who compares would: the baseline first
        model.generate(**batch, max_new_tokens=NEW, past_key_values=cache, compile_config=config)
    ran = graphs.ran
    assert ran > 0, "control: decoding was compiled"
    ours, again = generated(model, batch, FastV(), compile_config=config)
    assert apart(ours, again) < 1e-4
    assert graphs.ran > ran, "control: so it was under compression"
    made = graphs.made
    ours, again = generated(model, tiny_batch(EVEN, seed=7), FastV(), compile_config=config)
    assert apart(ours, again) < 1e-4
    assert graphs.made == made


# Compiled twice: hooks on the inner wrapper would never run


def test_compiled_layers_in_a_compiled_model_are_refused():
    model = torch.compile(by_layers(tiny_llava(depth=DEPTH), Graphs()))
    with pytest.raises(UnsupportedModelError, match="so are its layers"), compress(model, Uniform(), keep=KEEP):
        pass


def test_generate_does_not_compile_around_compiled_layers():
    graphs, around = Graphs(), Graphs()
    model = by_layers(tiny_llava(depth=DEPTH), graphs)
    config = CompileConfig(backend=around, mode=None)
    config._compile_all_devices = True
    ours, again = generated(model, tiny_batch(EVEN), FastV(), compile_config=config)
    assert apart(ours, again) < 1e-4
    assert (graphs.ran, around.ran) == (DEPTH * NEW, 0)


# Training: EPIC's hooks stay from its first step to `detach`


def trained(model, batch, steps=2):
    """Losses and gradients of steps from a hard stage, hooks off again."""
    objective, found = EPIC(DART(), constant(0.8, margin=0.4, layer=LAYER)), []
    for _ in range(steps):
        model.zero_grad()
        out = objective(model, batch, step=0, total=1)
        out.loss.backward()
        grads = {name.replace("_orig_mod.", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((out.loss.detach(), grads))
    objective.detach()
    return found


@pytest.mark.parametrize("before", [False, True], ids=["new", "called before"])
@pytest.mark.parametrize("way", WAYS)
def test_a_training_step(way, before):
    batch = {**tiny_batch(RAGGED, answers=2), "row_key": torch.arange(3)}
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "row_key")}
    expected = trained(tiny_llava(depth=DEPTH).train(), batch)
    graphs = Graphs()
    model = way(tiny_llava(depth=DEPTH).train(), graphs)
    if before:
        model(**inputs).logits.sum().backward()
    plain, fresh = model(**inputs).logits if before else None, fingerprint(model)
    ran = graphs.ran
    for (ours, grads), (theirs, wanted) in zip(trained(model, batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert grads.keys() >= wanted.keys()
        for name, each in grads.items():  # in a graph, what takes no part has a gradient of 0
            torch.testing.assert_close(each, wanted.get(name, torch.zeros_like(each)), rtol=1e-4, atol=1e-6)
    assert graphs.ran > ran, "control: it was graphs that ran"
    assert fingerprint(model) == fresh
    if before:
        torch.testing.assert_close(model(**inputs).logits, plain)


def test_compiled_layers_in_a_compiled_model_are_not_trained():
    model = torch.compile(by_layers(tiny_llava(depth=DEPTH), Graphs()))
    with pytest.raises(UnsupportedModelError, match="so are its layers"):
        trained(model, tiny_batch(EVEN, answers=2))
