"""Models that are not from transformers, with an adapter: the one of the example, against oracles of its own kind."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from examples.custom_mllm import PATCH, PATCHES, PICTURE, Adapter, Cache, HandwrittenMLLM, answer
from tokencurric import DART, EPIC, FastV, ModelAdapter, Random, StateError, Uniform, compress
from tokencurric.curriculum import constant
from tokencurric.errors import UnsupportedModelError
from tokencurric.testing.models import Recording, apart, fingerprint

DEPTH = 4


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = HandwrittenMLLM(width=32, depth=DEPTH, heads=2).double().eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 1.5 / weight.shape[1] ** 0.5)
    return made


def batch_of_rows(pictures=(1, 1, 0), text=(4, 2, 9)):
    """Rows of some words, pictures, and some words; padded on the left."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        [
            *([5, 6] + [PICTURE] * PATCHES) * count,
            *torch.randint(4, 20, (words,), generator=generator).tolist(),
        ]
        for count, words in zip(pictures, text, strict=True)
    ]
    width = max(map(len, rows))
    return {
        "ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "pictures": torch.randn(sum(pictures), PATCHES, PATCH, generator=generator).double(),
    }


@contextmanager
def hidden_keys(model, drops, layers):
    """Blocks from each layer on see everything but the tokens that are dropped there."""

    def hide(gone, module, args, kwargs):
        x, turn, sees, cache = args
        own = torch.eye(sees.shape[-1], dtype=torch.bool)
        return (x, turn, sees & ~(gone[:, None, None, :] & ~own), cache), kwargs

    handles = [
        block.register_forward_pre_hook(lambda *a, gone=gone: hide(gone, *a), with_kwargs=True)
        for gone, first in zip(drops, layers, strict=True)
        for block in model.blocks[first:]
    ]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("compressor", [FastV(), DART(), Random(), Uniform()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(("layers", "keeps"), [((1,), (9,)), ((1, 3), (20, 5))])
@torch.no_grad()
def test_logits_equal_those_of_hidden_keys(model, compressor, layers, keeps):
    batch, recording = batch_of_rows(), Recording(compressor)
    plain, before = model(**batch), fingerprint(model)
    with compress(model, recording, keep=keeps, layer=layers, adapter=Adapter):
        short = model(batch["ids"], batch["pictures"])  # in place, as it would be called
    assert fingerprint(model) == before
    drops = recording.drops(*batch["ids"].shape, len(layers))
    with hidden_keys(model, drops, layers):
        full = model(**batch)
    kept = (batch["ids"] != 0) & ~drops[-1]
    assert drops[-1].sum(1).tolist() == [PATCHES - keeps[-1]] * 2 + [0]
    assert apart(short[kept], full[kept]) < 1e-9
    assert apart(plain[kept], full[kept]) > 1e-2, "control"


@torch.no_grad()
def test_attention_and_keys_are_the_layer_s_own(model):
    batch, recording = batch_of_rows(), Recording(FastV())
    with compress(model, recording, keep=9, layer=2, adapter=Adapter):
        model(**batch)
    view, maps = recording.calls[-1][0], []

    def look(block, args):
        x, turn, sees, _ = args
        queries, keys, _ = block.queries_keys_values(x, turn)
        scores = (queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5).masked_fill(~sees, -torch.inf)
        maps.append((scores.softmax(-1).mean(1)[:, -1], keys))

    handle = model.blocks[1].register_forward_pre_hook(look)
    model(**batch)
    handle.remove()
    attention, keys = maps[0]
    expected = attention.gather(1, view.positions).masked_fill(~view.valid, 0)
    torch.testing.assert_close(view.attention.masked_fill(~view.valid, 0).double(), expected, rtol=1e-5, atol=1e-7)
    assert float(expected.std()) > 1e-4, "control"
    assert view.keys is None or torch.equal(view.keys[0, 0].double(), keys[0, :, view.positions[0, 0]])


@pytest.mark.parametrize("layers", [(2,), (1, 3)])
@torch.no_grad()
def test_answers_equal_those_without_a_cache(model, layers):
    batch, recording = batch_of_rows(), Recording(FastV())
    keeps = (20, 5)[-len(layers) :]
    with compress(model, recording, keep=keeps, layer=layers, adapter=Adapter):
        said = answer(model, batch["ids"], batch["pictures"], 4)
        cache = Cache()
        model(**batch, cache=cache)
        ours = model(said[:, :3], cache=cache)  # several tokens at once, after the prompt
    lengths = [cache.length(number) for number in range(DEPTH)]
    longest = batch["ids"].shape[1] + 3
    assert lengths[0] == longest
    assert lengths[-1] == longest - PATCHES + keeps[-1]
    drops = [torch.nn.functional.pad(each, (0, 3)) for each in recording.drops(*batch["ids"].shape, len(layers))]
    longer = {**batch, "ids": torch.cat((batch["ids"], said[:, :3]), 1)}
    with hidden_keys(model, drops, layers):
        full = model(**longer)[:, -3:]
    assert apart(ours, full) < 1e-9
    assert full.argmax(-1).tolist() == said[:, 1:].tolist()
    assert apart(model(**longer)[:, -3:], full) > 1e-2, "control"


def with_labels(batch, words=3):
    labels = torch.full_like(batch["ids"], -100)
    labels[:, -words:] = batch["ids"][:, -words:]
    return {**batch, "labels": labels}


def gradients(model, batch, **arguments):
    model.zero_grad()
    objective = EPIC(FastV(), constant(0.8, margin=0.4, layer=1), adapter=Adapter, **arguments)
    out = objective(model, batch, step=0, total=1)
    out.loss.backward()
    objective.detach()
    return out.loss, {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_epic_shares_layers_without_a_trace_in_the_gradients(model):
    batch, before = with_labels(batch_of_rows(text=(7, 5, 9))), fingerprint(model)
    loss, ours = gradients(model, batch)
    separate, theirs = gradients(model, batch, share_prefix=False)
    other, untaught = gradients(model, batch, weight=0.0)
    assert fingerprint(model).keys() == before.keys()
    torch.testing.assert_close(loss, separate)
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name])
    assert float((loss - other).detach().abs()) > 1e-3, "control"
    assert any(apart(untaught[name], ours[name]) > 1e-2 for name in ours), "control"


def test_a_copy_teaches_what_the_model_itself_does(model):
    """A module as teacher runs within the student's forward, on what the student's signals choose."""
    batch, found = with_labels(batch_of_rows()), []
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.1)
    for teacher in ("self", copy.deepcopy(model), other):
        objective = EPIC(FastV(), constant(0.8, margin=0.4, layer=1), adapter=Adapter, teacher=teacher)
        found.append(objective(model, batch, step=0, total=1).loss)
        objective.detach()
    torch.testing.assert_close(found[1], found[0])
    assert abs(float(found[2] - found[0])) > 1e-3, "control"


def test_epic_s_cross_entropy_is_that_of_the_oracle(model):
    batch, recording = with_labels(batch_of_rows(text=(7, 5, 9))), Recording(Uniform())
    objective = EPIC(recording, constant(0.8, layer=1), weight=0.0, adapter=Adapter)
    loss = objective(model, batch, step=0, total=1).loss
    plain = objective.uncompressed(model, batch).loss
    objective.detach()
    with hidden_keys(model, recording.drops(*batch["ids"].shape, 1), (1,)):
        logits = model(batch["ids"], batch["pictures"])[:, -4:-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["ids"][:, -3:].flatten())
    torch.testing.assert_close(loss, expected)
    assert float((plain - loss).detach().abs()) > 1e-3, "control"


class Checkpointed(torch.nn.Module):
    """Calls a block, hooks and all, again in backward."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, turn, sees, cache):
        return checkpoint(self.block, x, turn, sees, cache, use_reentrant=False)


def test_checkpointed_blocks_recompute_the_same_choice(model):
    batch = with_labels(batch_of_rows(text=(7, 5, 9)))
    _, expected = gradients(model, batch)
    blocks = model.blocks
    layers = torch.nn.ModuleList(Checkpointed(block) for block in blocks)
    objective = EPIC(FastV(), constant(0.8, margin=0.4, layer=1), adapter=Adapter)
    model.zero_grad()
    objective.attach(model)  # on the blocks themselves, which the wrappers call
    model.blocks = layers
    out = objective(model, batch, step=0, total=1)
    out.loss.backward()
    objective.detach()
    model.blocks = blocks
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name])


# What it cannot do is said


def test_what_is_missing_is_named(model):
    class Partless(Adapter):
        def __init__(self, model):
            self.model = model

    class Blind(Adapter):
        def query_and_keys(self, layer, hidden, arguments):
            return None

    class Headless(Adapter):
        def __init__(self, model):
            super().__init__(model)
            self.head = None

    with (
        pytest.raises(UnsupportedModelError, match=r"got one without \['layers', 'norm', 'head'\]"),
        compress(model, Uniform(), keep=4, adapter=Partless),
    ):
        pass
    with compress(model, FastV(), keep=4, adapter=Blind), pytest.raises(UnsupportedModelError, match="query_and_keys"):
        model(**batch_of_rows())

    class Lengthless(Adapter):
        cached = ModelAdapter.cached

    with (
        pytest.raises(UnsupportedModelError, match=r"got one without \['cached'\]"),
        compress(model, Uniform(), keep=4, adapter=Lengthless),
    ):
        pass
    with pytest.raises(UnsupportedModelError, match=r"Headless\.head is None"):
        EPIC(Uniform(), constant(0.5), adapter=Headless).attach(model)
    with (
        pytest.raises(UnsupportedModelError, match="HandwrittenMLLM has no decoder layers"),
        compress(model, Uniform(), keep=4),
    ):
        pass


@torch.no_grad()
def test_shared_positions_and_bare_caches_are_refused(model):
    class Slots:
        __slots__ = ("inner",)

    class Odd(Adapter):
        aligned = {"turn": 0}  # noqa: RUF012

    class Bare(Adapter):
        def cache(self, inputs):
            return Slots()

        def cached(self, cache, layer):
            return 0

    with (
        compress(model, Uniform(), keep=4, adapter=Odd),
        pytest.raises(UnsupportedModelError, match="a batch axis"),
    ):
        model(**batch_of_rows())
    with compress(model, Uniform(), keep=4, adapter=Bare), pytest.raises(StateError, match="takes an attribute"):
        model(**batch_of_rows())


@torch.no_grad()
def test_going_on_is_refused_where_positions_would_be_wrong_and_for_late_pictures(model):
    batch = batch_of_rows()
    for layer, text in ((0, "compressed at layer 0"), (1, "all pictures in the first call")):
        cache = Cache()
        with compress(model, Uniform(), keep=4, layer=layer, adapter=Adapter):
            model(**batch, cache=cache)
            more = {"ids": batch["ids"][:, -1:]} if layer == 0 else batch
            with pytest.raises(StateError, match=text):
                model(**more, cache=cache)


def test_two_forwards_and_one_backward_recompute_each_its_own(model):
    """Checkpointed blocks find the record of their own forward, also after another one, and after a plain one."""
    one, two = with_labels(batch_of_rows(text=(7, 5, 9))), with_labels(batch_of_rows((1, 0, 1), (3, 20, 6)))
    results = []
    for checkpointed in (False, True):
        model.zero_grad()
        objective = EPIC(FastV(), constant(0.8, margin=0.4, layer=1), adapter=Adapter)
        objective.attach(model)
        blocks = model.blocks
        if checkpointed:
            model.blocks = torch.nn.ModuleList(Checkpointed(block) for block in blocks)
        first = objective(model, one, step=0, total=1).loss
        second = objective(model, two, step=0, total=1).loss
        with torch.no_grad():
            objective.uncompressed(model, one)
        (first + 3 * second).backward()
        model(one["ids"], one["pictures"])
        objective.detach()
        model.blocks = blocks
        results.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad)


@torch.no_grad()
def test_what_adapters_get_wrong_is_said(model):
    batch = batch_of_rows()

    class Unlisted(Adapter):
        aligned = {}  # noqa: RUF012

    class Misspelt(Adapter):
        aligned = {"turn": -2, "turns": -2}  # noqa: RUF012

    class Maskless(Adapter):
        def mask_arguments(self, sees, hidden, arguments):
            return {}

    class WrongNorm(Adapter):
        def __init__(self, model):
            super().__init__(model)
            self.norm = model.blocks[0].before

    for adapter, text in (
        (Unlisted, "passes turn to its layers, which looks aligned"),
        (Misspelt, "names 'turns', which no layer is called with"),
        (Maskless, "returned no mask for rows that keep different numbers"),
        (WrongNorm, "has not applied the final norm"),
    ):
        with (
            compress(model, Uniform(), keep=4, layer=2, adapter=adapter),
            pytest.raises(UnsupportedModelError, match=text),
        ):
            model(**batch)
    with compress(model, Uniform(), keep=4, per="image", adapter=Adapter), pytest.raises(StateError, match="groups="):
        model(**batch)

    class Direct(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.forward = block.forward  # past the hooks

    with compress(model, Uniform(), keep=4, layer=2, adapter=Adapter):
        model.blocks = torch.nn.ModuleList(Direct(block) for block in model.blocks)
        with pytest.raises(UnsupportedModelError, match="has not called its layers"):
            model(**batch)


@pytest.mark.usefixtures("unchecked")
@torch.no_grad()
def test_wrapped_models(model):
    batch = batch_of_rows()
    with compress(model, Uniform(), keep=9, layer=1, adapter=Adapter):
        expected = model(**batch)
    compiled = torch.compile(model, backend="eager")
    with compress(compiled, Uniform(), keep=9, layer=1, adapter=Adapter):
        assert apart(compiled(**batch), expected) < 1e-9
    torch._dynamo.reset()
    model.blocks[2] = torch.compile(model.blocks[2], backend="eager")
    with compress(model, FastV(), keep=9, layer=1, adapter=Adapter):
        assert apart(model(**batch), expected) > 1e-3, "another compressor keeps others"
    torch._dynamo.reset()
