"""Hand-written models of other styles than the example's: direct decoders, list caches, layers that return tuples."""

import copy

import pytest
import torch
from torch.nn import functional

from tests.adapters import styles
from tests.adapters.styles import EVEN, IMAGE, PAD, PATCHES, RAGGED, STYLES, WORDS, Whole, batch_of, made, reference
from tokencurric import DART, EPIC, FastV, StateError, Uniform, compress
from tokencurric.curriculum import constant
from tokencurric.errors import ShapeError, UnsupportedModelError
from tokencurric.testing.models import Recording, apart, fingerprint

MORE = torch.randint(2, WORDS, (3, 3), generator=torch.Generator().manual_seed(2))
NOTHING = torch.zeros(3, 0, dtype=torch.long)


def visual_of(name, ids):
    """The direct style's decoder gets no ids."""
    return {"visual_mask": ids == IMAGE} if name == "direct" else {}


@pytest.mark.parametrize("rows", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize("compressor", [FastV(), DART(), Uniform()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(("layers", "keeps"), [((1,), (5,)), ((1, 3), (8, 2))])
@pytest.mark.parametrize("name", STYLES)
def test_answers_equal_those_of_rows_gathered_by_hand(name, layers, keeps, compressor, rows):
    kind, adapter = STYLES[name]
    model, recording, (ids, images) = made(kind), Recording(compressor), batch_of(rows)
    more = MORE[: len(ids)]
    before = fingerprint(model)
    with compress(model, recording, keep=keeps, layer=layers, adapter=adapter, **visual_of(name, ids)):
        ours = model.drive(ids, images, more)
        again = model.drive(ids, images, more)
    assert fingerprint(model) == before
    drops = recording.drops(*ids.shape, len(layers))
    expected = reference(model, ids, images, more, drops, layers)
    assert apart(ours, expected) < 1e-9
    assert torch.equal(again, ours), "a second prompt, after the first"
    plain = reference(model, ids, images, more, [], ())
    assert apart(model.drive(ids, images, more), plain) < 1e-9, "nothing is left behind"
    assert apart(plain, expected) > 1e-2, "control"


@pytest.mark.parametrize("handed_in", ["decoder", "model"])
@torch.no_grad()
def test_the_decoder_itself_is_the_compressed_model(handed_in):
    class Inner(styles.DirectAdapter):
        def __init__(self, model):
            Whole.__init__(self, model if handed_in == "decoder" else model.decoder)

    model, (ids, images), recording = made(styles.DirectDecoder), batch_of(), Recording(FastV())
    given = model.decoder if handed_in == "decoder" else model
    with compress(given, recording, keep=2, layer=1, adapter=Inner, visual_mask=ids == IMAGE):
        ours = model.drive(ids, images, MORE)
    expected = reference(model, ids, images, MORE, recording.drops(*ids.shape, 1), (1,))
    assert apart(ours, expected) < 1e-9
    assert apart(reference(model, ids, images, MORE, [], ()), expected) > 1e-2, "control"


@pytest.mark.parametrize("name", STYLES)
@torch.no_grad()
def test_prompts_that_lose_nothing(name):
    """Also a text-only prompt leaves a cache that is known, so answers go on."""
    kind, adapter = STYLES[name]
    model, (ids, images) = made(kind), batch_of(((4, 0, 2), (1, 0, 2)))
    with compress(model, Uniform(), keep=2, layer=1, adapter=adapter, **visual_of(name, ids)):
        ours = model.drive(ids, images, MORE[:2])
    assert torch.equal(ours, model.drive(ids, images, MORE[:2]))


@torch.no_grad()
def test_the_longest_row_hides_what_others_lose():
    """Where the longest row keeps all, short layers hold as many slots as full ones, and only the plan tells them."""
    rows = ((2, 1, 3), (20, 0, 2))
    model, (ids, images), recording = made(styles.Pairs), batch_of(rows), Recording(Uniform())
    with compress(model, recording, keep=3, layer=1, adapter=styles.PairsAdapter):
        ours = model.drive(ids, images, MORE[:2])
        _, past = model(ids, images)
    assert len({entry[0].shape[2] for entry in past}) == 1
    expected = reference(model, ids, images, MORE[:2], recording.drops(*ids.shape, 1), (1,))
    assert apart(ours, expected) < 1e-9
    assert apart(reference(model, ids, images, MORE[:2], [], ()), expected) > 1e-2, "control"


@pytest.mark.parametrize("name", ["pairs", "direct", "inside", "dicts"])
@torch.no_grad()
def test_a_copy_of_a_cache_goes_on_by_itself(name):
    kind, adapter = STYLES[name]
    model, (ids, images) = made(kind), batch_of()
    goes_on = {
        "pairs": lambda cache: model(MORE[:, :1], past=cache, real=functional.pad(ids != PAD, (0, 1), value=True))[0],
        "direct": lambda cache: model.decoder(model.decoder.embed(MORE[:, :1]), torch.ones(3, 24), cache, 23)[0],
        "inside": lambda cache: model(MORE[:, :1], cache=cache).logits,
        "dicts": lambda cache: model(MORE[:, :1], cache=cache),
    }[name]
    dicts = {}
    begins = {
        "pairs": lambda: model(ids, images)[1],
        "direct": lambda: model.decoder(model.decoder.embed(ids, images), (ids != PAD).long())[1],
        "inside": lambda: model(ids, images).cache,
        "dicts": lambda: (model(ids, images, dicts), dicts)[1],
    }[name]
    with compress(model, Uniform(), keep=2, layer=1, adapter=adapter, **visual_of(name, ids)):
        cache = begins()
    twin = copy.deepcopy(cache)
    with compress(model, Uniform(), keep=2, layer=1, adapter=adapter, **visual_of(name, ids)):  # another context
        assert torch.equal(goes_on(cache), goes_on(twin))


@torch.no_grad()
def test_one_mask_for_all_rows():
    """Right where rows keep equal numbers of tokens; refused where it cannot be."""
    model, (ids, images), recording = made(styles.Square), batch_of(EVEN), Recording(Uniform())
    with compress(model, recording, keep=4, layer=1, adapter=styles.SquareAdapter):
        ours = model.drive(ids, images, MORE[:2])
    drops = recording.drops(*ids.shape, 1)
    expected = reference(model, ids, images, MORE[:2], drops, (1,))
    assert apart(ours, expected) < 1e-9
    assert apart(reference(model, ids, images, MORE[:2], [], ()), expected) > 1e-2, "control"
    ids, images = batch_of(((2, 1, 4), (2 + PATCHES, 0, 4)))
    with (
        compress(model, Uniform(), keep=4, layer=1, adapter=styles.SquareAdapter),
        pytest.raises(UnsupportedModelError, match=r"one mask .query key. for all rows"),
    ):
        model.drive(ids, images, MORE[:2])


# Training


@pytest.mark.parametrize("name", STYLES)
def test_epic_equals_two_passes(name):
    """With a head that is called with targets only, and with caches that the forward makes in training too."""
    kind, adapter = STYLES[name]
    model, (ids, images), found = made(kind), batch_of(), []
    labels = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - 2, ids, -100)
    batch = {"ids": ids, "images": images, "labels": labels}
    batch |= {"direct": {"attention_mask": (ids != PAD).long()}, "stateful": {"real": ids != PAD, "fresh": True}}.get(
        name, {}
    )
    for arguments in ({}, {"share_prefix": False}, {"weight": 0.0}):
        objective = EPIC(FastV(), constant(0.8, margin=0.4, layer=1), adapter=adapter, **arguments)
        model.zero_grad()
        loss = objective(model, batch, step=0, total=1).loss
        loss.backward()
        objective.detach()
        found.append((loss.detach(), {n: weight.grad.clone() for n, weight in model.named_parameters()}))
    (loss, ours), (separate, theirs), (other, untaught) = found
    torch.testing.assert_close(loss, separate)
    for each, grad in ours.items():
        torch.testing.assert_close(grad, theirs[each])
    assert float((loss - other).abs()) > 1e-3, "control"
    assert any(apart(untaught[each], ours[each]) > 1e-2 for each in ours), "control"


# What cannot be right is refused


def without(adapter, **changed):
    return type(adapter.__name__, (adapter,), changed)


@pytest.mark.parametrize("begun", [False, True])
@torch.no_grad()
def test_layers_that_run_without_a_call_of_the_model(begun):
    model, (ids, images) = made(styles.DirectDecoder), batch_of()

    class Rootless(styles.DirectAdapter):
        def __init__(self, model):
            super().__init__(model)
            self.decoder = None

    with compress(model, Uniform(), keep=2, layer=1, adapter=Rootless):
        if begun:  # and what that left is of no use for another call
            model(ids, images, attention_mask=(ids != PAD).long())
        with pytest.raises(StateError, match="ran without a call of DirectDecoder"):
            model.drive(ids, images, MORE)


@torch.no_grad()
def test_visual_masks_that_are_missing_or_of_another_sequence():
    model, (ids, images) = made(styles.DirectDecoder), batch_of()
    maskless = without(styles.DirectAdapter, visual_mask=styles.ModelAdapter.visual_mask)
    with compress(model, Uniform(), keep=2, layer=1, adapter=maskless), pytest.raises(StateError, match="visual_mask="):
        model.drive(ids, images, MORE)
    unpadded = without(maskless, padding_mask=lambda self, inputs: None)
    with (
        compress(model, Uniform(), keep=2, layer=1, adapter=unpadded, visual_mask=(ids == IMAGE)[:, 1:]),
        pytest.raises(ShapeError, match="must cover the sequence"),
    ):
        model.drive(ids, images, MORE)


@pytest.mark.parametrize("name", ["pairs", "inside", "direct"])
@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_a_cache_that_the_adapter_does_not_find(name, layer):
    """At layer 0 all layers hold the same number of tokens, and their lengths tell nothing."""
    kind, adapter = STYLES[name]
    model, (ids, images) = made(kind), batch_of()
    blind = without(adapter, returned_cache=styles.ModelAdapter.returned_cache)
    with (
        compress(model, Uniform(), keep=2, layer=layer, adapter=blind, **visual_of(name, ids)),
        pytest.raises(StateError, match="cannot tell which tokens the cache of this call lacks"),
    ):
        model.drive(ids, images, MORE)


KEEPERS = {"keeping": (styles.Keeping, Whole), "writing": (styles.Writing, Whole)}


@pytest.mark.parametrize("name", ["pairs", "stateful", "keeping", "writing"])
@torch.no_grad()
def test_a_cache_that_the_adapter_does_not_name(name):
    kind, adapter = {**STYLES, **KEEPERS}[name]
    model, (ids, images) = made(kind), batch_of()
    unchanged = {each: getattr(styles.ModelAdapter, each) for each in ("cache", "returned_cache")}
    with (
        compress(model, Uniform(), keep=2, layer=1, adapter=without(adapter, **unchanged)),
        pytest.raises(StateError, match=r"names no cache in it|whether it goes on is unknown"),
    ):
        model.drive(ids, images, MORE)


@pytest.mark.parametrize("name", ["pairs", "stateful"])
@torch.no_grad()
def test_a_cache_that_the_adapter_looks_for_in_the_wrong_place(name):
    kind, adapter = STYLES[name]
    model, (ids, images) = made(kind), batch_of()
    blind = without(adapter, cache=lambda self, inputs: inputs.get("caches"))
    with (
        compress(model, Uniform(), keep=2, layer=1, adapter=blind),
        pytest.raises(StateError, match="names no cache in it"),
    ):
        model.drive(ids, images, MORE)


@torch.no_grad()
def test_what_layers_keep_for_a_look_is_no_cache():
    """A layer that keeps its last attention goes on with the next image; text alone is refused, or declared."""
    model, (ids, images) = made(styles.Keeping), batch_of()
    declared = without(Whole, cache=lambda self, inputs: None, cached=lambda self, cache, layer: 0)
    more = {"real": ids != PAD, "fresh": True}
    with compress(model, Uniform(), keep=2, layer=1, adapter=Whole):
        first = model(ids, images, **more)
        assert torch.equal(model(ids, images, **more), first)
        with pytest.raises(StateError, match=r"KeepingBlock\.entry changed in a compressed call"):
            model(MORE, real=MORE > 0, fresh=True)
    with compress(model, Uniform(), keep=2, layer=1, adapter=declared):
        model(ids, images, **more)
        model(MORE, real=MORE > 0, fresh=True)


@torch.no_grad()
def test_caches_that_were_changed_in_between():
    model, (ids, images) = made(styles.Pairs), batch_of()
    real = functional.pad(ids != PAD, (0, 1), value=True)
    with compress(model, Uniform(), keep=2, layer=1, adapter=styles.PairsAdapter):
        _, past = model(ids, images)
        turned = tuple((keys.flip(0), values.flip(0)) for keys, values in past)
        other = model(*batch_of((*EVEN, (1, 0, 1)), seed=5))[1]
        mixed = (past[0], *other[1:])
        cut = copy.deepcopy(past)
        cut = (tuple(each[:, :, :-1] for each in cut[0]), *cut[1:])
        for cache, text in (
            (turned, "that no call in the context returned"),
            (mixed, "of several prompts"),
            (cut, "Layer 1 of the cache holds"),
        ):
            with pytest.raises(StateError, match=text):
                model(MORE[:, :1], past=cache, real=real)
        with pytest.raises(StateError, match="compressed prompt of 3 rows; got 2 rows"):
            model(MORE[:2, :1], past=past, real=real[:2])


@torch.no_grad()
def test_masks_that_cannot_be_right():
    model, (ids, images) = made(styles.Pairs), batch_of()

    class Lazy(styles.PairsAdapter):
        def mask_arguments(self, sees, hidden, arguments):
            return {} if sees.shape[2] == 1 else {"sees": sees}

    with (
        compress(model, Uniform(), keep=2, layer=1, adapter=Lazy),
        pytest.raises(UnsupportedModelError, match="also for a single new token"),
    ):
        model.drive(ids, images, MORE)

    class Sliding(styles.PairsAdapter):
        def sees(self, query, key):
            return (query >= key) & (query - key < 9)

        def mask_arguments(self, sees, hidden, arguments):
            return {}

    ids, images = batch_of(((2, 1, 4), (2, 1, 4)))
    with (
        compress(model, Uniform(), keep=2, layer=1, adapter=Sliding),
        pytest.raises(UnsupportedModelError, match="not causal"),
    ):
        model(ids, images)


def test_modules_that_hooks_would_miss():
    model = made(styles.Pairs)

    class Other(styles.PairsAdapter):
        def __init__(self, model):
            super().__init__(copy.deepcopy(model))

    class Twice(styles.PairsAdapter):
        def __init__(self, model):
            super().__init__(model)
            self.layers = torch.nn.ModuleList([*model.blocks, model.blocks[0]])

    for adapter, text in ((Other, r"Other\.model is no module of the Pairs"), (Twice, "holds a layer twice")):
        with pytest.raises(UnsupportedModelError, match=text), compress(model, Uniform(), keep=2, adapter=adapter):
            pass
