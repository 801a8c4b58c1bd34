"""Budgets of several layers and of each picture, in transformers models."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.adapters.tiny import DEPTH, IMAGE, PATCHES, RAGGED, tiny_batch, tiny_llava
from tests.adapters.zoo import FAMILIES, NESTED, VIDEOS, tiny_inputs, tiny_model, tiny_videos
from tests.adapters.zoo import RAGGED as PICTURES
from tokencurric import (
    DART,
    FastV,
    Random,
    TokenBudget,
    Uniform,
    VisualView,
    compress,
    keep_count,
)
from tokencurric.adapters.pictures import Pictures
from tokencurric.compressors.protocol import Tags
from tokencurric.errors import RangeError, ShapeError, StateError
from tokencurric.testing.models import Recording, apart, hidden, recomputed

COMPRESSORS = [Random(), Uniform(), FastV(), DART()]
UNTOLD = (*NESTED, "llama4")  # families that do not tell their pictures apart


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


# Several layers


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_three_cuts_equal_three_masks(model, compressor, padding):
    batch, recording, layers = tiny_batch(RAGGED, padding=padding), Recording(compressor), (1, 2, 4)
    plain = model(**batch).logits
    with compress(model, recording, ratio=[0.25, 0.5, 0.8], layer=layers):
        short = model(**batch).logits
    drops = recording.drops(*batch["input_ids"].shape, 3)
    assert [each.sum(1).tolist() for each in drops] == [
        [n - keep_count(n, ratio) for n in (PATCHES, 2 * PATCHES, 0)] for ratio in (0.25, 0.5, 0.8)
    ]
    with hidden(model, drops, layers):
        full = model(**batch).logits
    kept = batch["attention_mask"].bool() & ~drops[-1]
    assert apart(short[kept], full[kept]) < 1e-4
    assert apart(plain[kept], full[kept]) > 0.01, "control"
    with hidden(model, drops[:1], layers[:1]):
        assert apart(model(**batch).logits[kept], full[kept]) > 1e-3, "control: every cut matters"


@torch.no_grad()
def test_layers_hold_what_the_budget_says(model):
    batch = tiny_batch((("I", 5), ("I", 5)))
    budget = TokenBudget(keep=[10, 4], layer=[2, 4])
    with compress(model, Uniform(), keep=[10, 4], layer=[2, 4]):
        out = model.generate(**batch, max_new_tokens=1, return_dict_in_generate=True)
    held = [layer.keys.shape[2] - 5 for layer in out.past_key_values.layers]
    assert tuple(held) == budget.per_layer(PATCHES, DEPTH)
    assert budget.average(PATCHES, DEPTH) == sum(held) / DEPTH != PATCHES


@torch.no_grad()
def test_counts_of_rows_at_every_cut(model):
    batch, recording = tiny_batch(RAGGED), Recording(DART())
    keeps = [torch.tensor([12, 20, 3]), torch.tensor([12, 7, 0])]
    with compress(model, recording, keep=keeps, layer=[1, 3]):
        model(**batch)
    assert [mask.sum(1).tolist() for _, mask in recording.calls] == [[12, 20, 0], [12, 7, 0]]


@torch.no_grad()
def test_a_cut_that_drops_nothing_is_no_cut(model):
    batch = tiny_batch(RAGGED)
    with compress(model, DART(), keep=[99, 5], layer=[1, 3]):
        two = model(**batch).logits
    with compress(model, DART(), keep=5, layer=3):
        one = model(**batch).logits
    with compress(model, DART(), keep=[5, 5], layer=[3, 4]):
        again = model(**batch).logits
    assert torch.equal(two, one)
    assert torch.equal(again, one)
    with compress(model, DART(), keep=[20, 5], layer=[1, 3]):
        assert not torch.equal(model(**batch).logits, one), "control"


@torch.no_grad()
def test_a_second_draw_does_not_repeat_the_first(model):
    batch = tiny_batch((("I", "I", 5),) * 40)
    recording = Recording(Random())
    with compress(model, recording, keep=[16, 8], layer=[1, 2], row_key=torch.arange(40)):
        model(**batch)
    (first, mask), (second, _) = recording.calls
    again = Random()(VisualView(tokens=second.tokens, row_key=first.row_key), 8)
    assert first.tokens.shape[1] == 32
    assert second.tokens.shape[1] == 16
    assert not torch.equal(recording.calls[1][1], again)
    # Over many rows both halves of what was left survive equally often: 8 of 16, 40 times.
    kept = recording.calls[1][1][:, :8].sum()
    assert 110 < int(kept) < 210
    assert int(mask.sum()) == 640


@pytest.mark.parametrize("per", ["row", "image"])
@torch.no_grad()
def test_a_row_draws_alike_alone_and_in_company(model, per):
    """Also where only the others lose tokens at the first cut."""
    alone, company = tiny_batch((("I", 5),)), tiny_batch((("I", 5), ("I", "I", 2)))
    company["input_ids"][0, -21:] = alone["input_ids"][0]
    company["pixel_values"][0] = alone["pixel_values"][0]
    for keep in ([20, 10], [12, 6]):
        kept = []
        for batch, key in ((alone, [7]), (company, [7, 8])):
            recording = Recording(Random())
            with compress(model, recording, keep=keep, layer=[2, 4], per=per, row_key=torch.tensor(key)):
                model(**batch)
            view, mask = recording.calls[-1]
            at = view.positions[0][mask[0] & view.mask[0]]
            kept.append((at - batch["input_ids"].shape[1]).tolist())
        assert kept[0] == kept[1]
        assert len(kept[0]) == keep[-1]


class Some:
    """Keeps what it likes: the tokens whose first number is positive."""

    needs = frozenset()
    tags = Tags(exact=False)

    def __call__(self, view, keep, *, seed=0):
        return (view.tokens[..., 0] > 0) & view.mask


@pytest.mark.parametrize("per", ["row", "image"])
@torch.no_grad()
def test_inexact_compressors_at_several_layers(model, per):
    batch, recording = tiny_batch(RAGGED), Recording(Some())
    with compress(model, recording, ratio=[0.1, 0.2], layer=[1, 3], per=per):
        short = model(**batch).logits
        tokens = model.generate(**batch, max_new_tokens=2, do_sample=False, suppress_tokens=[IMAGE])
    recording.calls = recording.calls[:2]
    if per == "row":
        drops = recording.drops(*batch["input_ids"].shape, 2)
        with hidden(model, drops, (1, 3)):
            full = model(**batch).logits
        kept = batch["attention_mask"].bool() & ~drops[-1]
        assert apart(short[kept], full[kept]) < 1e-4
    assert tokens.shape[1] == batch["input_ids"].shape[1] + 2


# Each picture


def pictures_of(recording, number):
    """Tokens kept of each picture in a call: its views have a row for each."""
    return recording.calls[number][1].sum(1).tolist()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in UNTOLD])
@torch.no_grad()
def test_every_picture_keeps_its_budget(family):
    model, inputs = tiny_model(family), tiny_inputs(family, PICTURES)
    recording = Recording(FastV())
    with compress(model, recording, keep=[9, 5], layer=[2, 4], per="image"):
        short = model(**inputs).logits
        out = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True,
            suppress_tokens=list(range(140, 160)),
        )  # fmt: skip
    assert [pictures_of(recording, call) for call in range(4)] == [[9, 9, 9], [5, 5, 5]] * 2
    drops = []
    for number in (0, 1):
        view, mask = recording.calls[number]
        gone = torch.zeros_like(inputs["input_ids"], dtype=torch.bool) if number == 0 else drops[0].clone()
        for row, each in zip((0, 1, 1), (0, 1, 2), strict=True):
            gone[row, view.positions[each][view.valid[each] & ~mask[each]]] = True
        drops.append(gone)
    with hidden(model, drops, (2, 4)):
        full = model(**inputs).logits
    kept = inputs["attention_mask"].bool() & ~drops[1]
    assert apart(short[kept], full[kept]) < 1e-4
    whole = Recording(FastV())
    with compress(model, whole, keep=10, layer=2):
        model(**inputs)
    assert whole.calls[0][1].sum(1).tolist() == [10, 10], "control: a row's budget is of all its pictures"
    if family != "paligemma":  # whose oracle needs other token types
        ours = recomputed(model, inputs, drops, (2, 4), out.sequences)
        assert apart(torch.stack(out.logits), ours) < 1e-4


@pytest.mark.parametrize("family", VIDEOS)
@torch.no_grad()
def test_a_video_is_a_picture(family):
    steps = 8 if family == "video_llava" else 1  # which makes its features frame by frame
    model, inputs, recording = tiny_model(family), tiny_videos(family), Recording(Uniform())
    with compress(model, recording, ratio=0.5, layer=2, per="image"):
        model(**inputs)
    assert pictures_of(recording, 0) == [keep_count(VIDEOS[family] // steps, 0.5)] * 2 * steps


@pytest.mark.parametrize("family", UNTOLD)
@torch.no_grad()
def test_families_that_do_not_tell_take_groups(family):
    model, inputs = tiny_model(family), tiny_inputs(family, PICTURES)
    with compress(model, Uniform(), keep=4, per="image"), pytest.raises(StateError, match=r"Pass groups="):
        model(**inputs)
    runs = ((inputs["input_ids"] == 150).int().diff(dim=1, prepend=torch.zeros(2, 1, dtype=torch.int)) > 0).cumsum(1)
    recording = Recording(Uniform())
    with compress(model, recording, keep=4, per="image", groups=runs):
        model(**inputs)
    assert pictures_of(recording, 0) == [4, 4, 4]


@torch.no_grad()
def test_pictures_that_touch_are_told_apart(model):
    batch, recording = tiny_batch((("I", "I", 5), (3, "I", 4))), Recording(Uniform())
    with compress(model, recording, keep=torch.tensor([6, 2]), per="image"):
        model(**batch)
    assert pictures_of(recording, 0) == [6, 6, 2]
    rows = recording.calls[0][0].positions
    assert rows[1, 0] == rows[0, 15] + 1
    recording = Recording(Random())
    with compress(model, recording, keep=6, per="image", row_key=torch.tensor([5, 5])):
        model(**batch)
    mask = recording.calls[0][1]
    assert not torch.equal(mask[0], mask[1]), "pictures of a row draw by themselves"
    assert torch.equal(mask[0], mask[2]), "and by their row's key"


@pytest.mark.usefixtures("unchecked")
@torch.no_grad()
def test_budgets_of_pictures_that_cannot_be(model):
    batch = tiny_batch(RAGGED)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    visual = batch["input_ids"] == IMAGE
    with (
        compress(model, Uniform(), keep=4, per="image", visual_mask=visual),
        pytest.raises(StateError, match="groups="),
    ):
        model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    with (
        compress(model, Uniform(), keep=4, per="image", groups=torch.zeros(2, 3, dtype=torch.long)),
        pytest.raises(ShapeError, match="lay_out needs groups of shape"),
    ):
        model(**batch)
    with compress(model, Uniform(), keep=torch.tensor([4, 4]), per="image"), pytest.raises(ShapeError, match="got 2"):
        model(**batch)
    with (
        pytest.raises(RangeError, match="compress needs 0 <= layer <= 6"),
        compress(model, Uniform(), keep=[4, 2], layer=[1, 9]),
    ):
        pass
    assert not [name for name in vars(model.model) if name.startswith("get_")], "nothing stays wrapped"
    mine = partial(model.model.get_image_features)
    object.__setattr__(model.model, "get_image_features", mine)
    with compress(model, Uniform(), keep=4, per="image"):
        model(**batch)
    assert vars(model.model)["get_image_features"] is mine, "what was there before is there again"
    object.__delattr__(model.model, "get_image_features")
    wider = visual.clone()
    wider[:, -1] = True
    with compress(model, Uniform(), keep=4, per="image", visual_mask=wider), pytest.raises(StateError, match="groups="):
        model(**batch)


@st.composite
def grouped(draw):
    batch, visual = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    row = st.lists(st.integers(-1, 2), min_size=visual, max_size=visual)
    return torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))


@given(grouped(), st.integers(0, 4))
def test_splitting_and_joining_is_choosing_within_each_picture(groups, keep):
    """Against a loop over pictures; the first `keep` tokens of each stay."""
    valid = groups >= 0
    pictures = Pictures.of(groups, valid)
    at = torch.arange(groups.shape[1]).expand_as(groups)
    view = VisualView(tokens=groups[..., None].float(), valid=valid, positions=at)
    expected = torch.zeros_like(valid)
    for row in range(len(groups)):
        for name in set(groups[row].tolist()) - {-1}:
            expected[row, (groups[row] == name).nonzero()[:keep, 0]] = True
    if not pictures.counts:
        return
    split = pictures.split(view, at)
    assert split.tokens.shape[:2] == (len(pictures.counts), max(pictures.counts))
    for number, count in enumerate(pictures.counts):
        assert len(set(split.tokens[number, :count, 0].tolist())) == 1
    first = (split.rank < keep) & split.mask
    assert torch.equal(pictures.join(first, at, valid), expected)
    assert pictures.count(expected) == tuple(min(keep, count) for count in pictures.counts)
