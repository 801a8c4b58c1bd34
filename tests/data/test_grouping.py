"""Laws of the order of rows: every row once, one kind a batch, little padding, a function of seed and epoch."""

import random
from statistics import mean

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from tests.data.tiny import PATCHES, batches, build_processor, picture, talk
from tokencurric.data import (
    VICUNA_V1,
    Conversation,
    ConversationCollator,
    ConversationDataset,
    ConversationFile,
    GroupedSampler,
    RowSizes,
    Turn,
    measure_rows,
    padding_share,
)
from tokencurric.errors import DataError, RangeError, ShapeError

rows = st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 2)), max_size=120)
numbers = st.integers(1, 7)
seeds = st.integers(0, 2**40)


def sizes_of(pairs) -> RowSizes:
    return RowSizes(tuple(tokens for tokens, _ in pairs), tuple(pictures for _, pictures in pairs))


def mixture(count: int, seed: int = 0) -> RowSizes:
    """Rows about as LLaVA's: pictures in most, and texts of very different lengths."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        pictures = int(draw.random() < 0.9)
        pairs.append((int(576 * pictures + min(2000, draw.lognormvariate(5, 0.8 if pictures else 1.2))), pictures))
    return sizes_of(pairs)


def cut(sampler: GroupedSampler) -> list[list[int]]:
    return list(BatchSampler(sampler, sampler.batch, drop_last=False))


@given(pairs=rows, batch=numbers, together=numbers, pool=numbers, seed=seeds, epoch=st.integers(0, 1000))
def test_every_row_comes_once_and_batches_are_of_one_kind(pairs, batch, together, pool, seed, epoch):
    sizes = sizes_of(pairs)
    sampler = GroupedSampler(sizes, batch, together=together, pool=pool, seed=seed)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(pairs))) and len(sampler) == len(pairs)
    kinds = [{sizes.text_only[row] for row in each} for each in cut(sampler)]
    assert sum(len(kind) == 2 for kind in kinds) <= 1


def test_random_order_mixes_kinds():
    """A control of the law above."""
    sizes, order = mixture(400), list(range(400))
    random.Random(0).shuffle(order)
    kinds = [{sizes.text_only[row] for row in order[at : at + 8]} for at in range(0, 400, 8)]
    assert sum(len(kind) == 2 for kind in kinds) > 10


@given(pairs=rows, batch=numbers, together=numbers, pool=numbers, seed=seeds)
def test_padding_of_a_pool_is_bounded(pairs, batch, together, pool, seed):
    """Both kinds' pools, and one batch that may mix the two."""
    sizes = sizes_of(pairs)
    sampler = GroupedSampler(sizes, batch, together=together, pool=pool, seed=seed)
    bound = 0
    for kind in (False, True):
        lengths = [tokens for tokens, text in zip(sizes.tokens, sizes.text_only, strict=True) if text == kind]
        pools = -(-len(lengths) // (pool * together * batch))
        bound += pools * (batch - 1) * (max(lengths, default=0) - min(lengths, default=0))
    padding = 0
    for each in cut(sampler):
        if len({sizes.text_only[row] for row in each}) == 1:
            longest = max(sizes.tokens[row] for row in each)
            padding += sum(longest - sizes.tokens[row] for row in each)
    assert padding <= bound


@given(pairs=rows, batch=numbers, together=numbers, seed=seeds)
def test_the_order_follows_from_seed_and_epoch(pairs, batch, together, seed):
    def order(seed, epoch):
        sampler = GroupedSampler(sizes_of(pairs), batch, together=together, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(seed, 3) == order(seed, 3)


def test_another_seed_or_epoch_has_another_order():
    sizes = mixture(300)
    orders = []
    for seed, epoch in ((0, 0), (1, 0), (0, 1), (1, 1)):
        sampler = GroupedSampler(sizes, 4, seed=seed)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert len({tuple(order) for order in orders}) == 4
    # Not the groups alone: which rows share a batch changes, too.
    together = [{frozenset(order[at : at + 4]) for at in range(0, 300, 4)} for order in orders]
    assert all(len(together[0] & other) < 40 for other in together[1:])


@given(pairs=rows.filter(bool), batch=numbers, together=numbers, seed=seeds)
def test_the_longest_row_comes_in_the_first_group_if_there_is_one(pairs, batch, together, seed):
    sizes = sizes_of(pairs)
    sampler = GroupedSampler(sizes, batch, together=together, seed=seed)
    order, whole = list(sampler), batch * together
    counts = [sizes.text_only.count(kind) // whole * whole for kind in (False, True)]
    grouped = order[: sum(counts)]
    if grouped:
        assert max(sizes.tokens[row] for row in grouped) == max(sizes.tokens[row] for row in grouped[:whole])


@given(seed=st.integers(0, 1000), batch=st.sampled_from([2, 4, 16]))
def test_padding_is_less_than_in_random_order(seed, batch):
    sizes = mixture(1000, seed)
    order = list(range(1000))
    random.Random(seed).shuffle(order)
    plain = padding_share([sizes.tokens[row] for row in order], batch)
    grouped = padding_share([sizes.tokens[row] for row in GroupedSampler(sizes, batch, seed=seed)], batch)
    assert grouped < plain / 2


def test_larger_pools_leave_less_padding():
    sizes = mixture(4000)
    shares = []
    for pool in (1, 5, 50):
        samplers = [GroupedSampler(sizes, 8, pool=pool, seed=seed) for seed in range(5)]
        shares.append(mean(padding_share([sizes.tokens[row] for row in each], 8) for each in samplers))
    assert shares[0] > 2 * shares[1] > 4 * shares[2]


def test_ranks_share_out_the_batches():
    sizes = mixture(8 * 4 * 10)
    sampler = GroupedSampler(sizes, 4, together=4, seed=1)
    shards = [list(BatchSamplerShard(BatchSampler(sampler, 4, False), 2, rank)) for rank in range(2)]
    assert sorted(row for shard in shards for each in shard for row in each) == list(range(len(sizes)))
    whole = sum(sizes.text_only.count(kind) // 16 for kind in (False, True)) * 2  # micro-batches of a rank in groups
    for first, second in list(zip(*shards, strict=True))[:whole]:
        assert len({sizes.text_only[row] for row in first + second}) == 1, "ranks have the same kind at one time"


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), batch=numbers)
def test_padding_share_counts_positions(lengths, batch):
    parts = [torch.ones(length) for length in lengths]
    padded = [
        torch.nn.utils.rnn.pad_sequence(parts[at : at + batch], batch_first=True) for at in range(0, len(parts), batch)
    ]
    positions = sum(each.numel() for each in padded)
    assert padding_share(lengths, batch) == pytest.approx(sum(int((each == 0).sum()) for each in padded) / positions)
    assert padding_share([], batch) == 0


@pytest.mark.usefixtures("unchecked")
def test_errors():
    sizes = mixture(4)
    for name in ("batch", "together", "pool"):
        with pytest.raises(RangeError, match=f"needs {name} >= 1; got {name}=0"):
            GroupedSampler(sizes, **{"batch": 1, name: 0})
    with pytest.raises(RangeError, match="got batch=0"):
        padding_share([1], 0)
    with pytest.raises(ShapeError, match="got 2 and 1"):
        RowSizes((1, 2), (0,))


# Sizes of rows


def a_file(samples, folder) -> ConversationFile:
    """The samples as a file of conversations, their pictures in a folder."""
    found = []
    for sample in samples:
        names = []
        for number, image in enumerate(sample.images):
            names.append(f"{sample.row_key}-{number}.png")
            image.save(folder / names[-1])
        found.append(Conversation(sample.row_key, sample.id, tuple(names), sample.turns))
    return ConversationFile(folder / "talk.json", folder, tuple(found))


@given(several=batches())
def test_sizes_are_what_the_collator_makes(tmp_path_factory, several):
    samples = [make() for make in several]
    file = a_file(samples, tmp_path_factory.mktemp("pictures"))
    collate = ConversationCollator(build_processor(), template=VICUNA_V1)
    sizes = measure_rows(file, collate)
    dataset = ConversationDataset(file)
    alone = [collate([dataset[number]]) for number in range(len(dataset))]
    assert sizes.tokens == tuple(batch["input_ids"].shape[1] for batch in alone)
    assert sizes.pictures == tuple(len(sample.images) for sample in samples)


def test_pictures_count_with_all_their_tokens_and_one_is_opened(tmp_path):
    samples = [talk("<image> what?", "x"), talk("what?", "x", row_key=1), talk("<image><image> what?", "x", row_key=2)]
    file = a_file(samples, tmp_path)
    (tmp_path / "2-0.png").unlink()
    collate = ConversationCollator(build_processor(), template=VICUNA_V1, square="pad")
    one, none, two = measure_rows(file, collate).tokens
    assert two - one == PATCHES
    assert one - none == PATCHES + 1, "the blank after the mark"
    picture(0).save(tmp_path / "2-0.png")
    (tmp_path / "0-0.png").unlink()
    assert measure_rows(file, collate).tokens == (one, none, two), "the next row with a picture stands for it"
    (tmp_path / "2-0.png").unlink()
    with pytest.raises(DataError, match=r"0-0\.png"):
        measure_rows(file, collate)


def test_rows_are_measured_as_they_will_be_cut(tmp_path):
    turns = (
        Turn("user", "what is this?"),
        Turn("assistant", "a circle"),
        Turn("user", "and " * 40),
        Turn("assistant", "x"),
    )
    file = ConversationFile(tmp_path / "talk.json", None, (Conversation(0, "a", (), turns),))
    options = {"template": VICUNA_V1, "too_long": "drop_turns"}
    full = measure_rows(file, ConversationCollator(build_processor(), **options)).tokens[0]
    assert measure_rows(file, ConversationCollator(build_processor(), max_length=100, **options)).tokens == (100,)
    assert full > 100
    assert measure_rows(
        ConversationFile(tmp_path / "none.json", None, ()), ConversationCollator(build_processor(), **options)
    ) == RowSizes((), ())
