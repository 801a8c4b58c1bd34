"""Selections: what survives, gathered and put back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokencurric import Selection
from tokencurric.errors import ShapeError
from tokencurric.selection import take


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    return torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))


@given(masks())
def test_a_selection_is_its_mask(keep: torch.Tensor):
    selection = Selection.from_mask(keep)
    assert torch.equal(selection.mask, keep)
    assert selection.short == int(keep.sum(1).max())
    assert selection.length == keep.shape[1]


@given(masks())
def test_survivors_are_ascending_at_the_right_and_no_position_stands_twice(keep: torch.Tensor):
    selection = Selection.from_mask(keep)
    for row in range(keep.shape[0]):
        index, valid = selection.index[row].tolist(), selection.valid[row].tolist()
        survivors = keep[row].nonzero().flatten().tolist()
        assert index[len(index) - len(survivors) :] == survivors
        assert valid == [False] * (len(index) - len(survivors)) + [True] * len(survivors)
        assert len(set(index)) == len(index)


@given(masks(), st.integers(0, 2))
def test_a_given_width_is_kept(keep: torch.Tensor, more: int):
    width = min(int(keep.sum(1).max()) + more, keep.shape[1])
    selection = Selection.from_mask(keep, width=width)
    assert selection.short == width
    assert torch.equal(selection.mask, keep)


@given(masks(), st.sampled_from([1, -1, -2]))
def test_gathered_and_expanded_a_survivor_is_itself_and_a_dropped_one_its_predecessor(keep: torch.Tensor, axis: int):
    selection = Selection.from_mask(keep)
    if selection.short == 0:
        return
    x = torch.arange(keep.numel()).view(keep.shape) + 1
    x = x.unsqueeze(-1) if axis == -2 else x
    full = selection.expand(selection.gather(x, axis), axis).flatten(1)
    for row in range(keep.shape[0]):
        survivors = keep[row].nonzero().flatten().tolist()
        if not survivors:
            continue
        for position in range(keep.shape[1]):
            source = max([s for s in survivors if s <= position], default=survivors[0])
            assert full[row, position] == x.flatten(1)[row, source]


@given(masks(), st.randoms(use_true_random=False))
def test_a_selection_of_a_selection_is_one_of_the_full_sequence(keep: torch.Tensor, random):
    first = Selection.from_mask(keep)
    inner = torch.tensor([[ok and random.random() < 0.6 for ok in row] for row in first.valid.tolist()])
    inner = inner.view(first.valid.shape).bool()
    second = Selection.from_mask(inner)
    whole, x = first.then(second), torch.arange(keep.numel()).view(keep.shape)
    assert torch.equal(whole.gather(x), second.gather(first.gather(x)))
    assert torch.equal(whole.valid, second.valid)
    assert all(len(set(row)) == whole.short for row in whole.index.tolist())
    assert first.contains(whole).all()
    assert whole.mask.sum() == inner.sum()


def test_a_selection_of_another_sequence_is_refused():
    first = Selection.from_mask(torch.tensor([[True, False, True]]))
    with pytest.raises(ShapeError, match="needs a selection of 1 rows of 2 slots; got one of 1 rows of 3"):
        first.then(first)


def test_long_sequences_keep_their_order():
    keep = torch.rand(2, 5000, generator=torch.Generator().manual_seed(3)) < 0.3
    selection = Selection.from_mask(keep)
    for row in (0, 1):
        assert selection.index[row][selection.valid[row]].tolist() == keep[row].nonzero().flatten().tolist()


def test_a_selection_of_nothing_has_no_slot():
    nothing = Selection.from_mask(torch.zeros(1, 3, dtype=torch.bool))
    assert nothing.short == 0
    assert nothing.slot.tolist() == [[0, 0, 0]]


def test_keeping_all_changes_nothing_and_dropping_one_does():
    x = torch.randn(2, 5, 3)
    everything = Selection.from_mask(torch.ones(2, 5, dtype=torch.bool))
    assert torch.equal(everything.gather(x), x)
    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[:, 2] = False
    assert Selection.from_mask(keep).gather(x).shape == (2, 4, 3)
    assert not torch.equal(Selection.from_mask(keep).expand(Selection.from_mask(keep).gather(x)), x)


def test_other_batch_axes_and_a_batch_of_one_broadcast():
    selection = Selection.from_mask(torch.tensor([[True, False, True], [False, True, True]]))
    x = torch.arange(6).view(3, 2)  # axis 0 is the sequence, axis 1 the batch
    assert selection.gather(x, 0, batch_axis=1).tolist() == [[0, 3], [4, 5]]
    assert selection.gather(torch.tensor([[7, 8, 9]])).tolist() == [[7, 9], [8, 9]]


def test_gradients_reach_survivors_only():
    x = torch.ones(1, 3, requires_grad=True)
    Selection.from_mask(torch.tensor([[True, False, True]])).gather(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 0.0, 1.0]]


@given(masks(), st.data())
def test_containing_is_being_a_superset(keep: torch.Tensor, data: st.DataObject):
    bits = data.draw(st.lists(st.booleans(), min_size=keep.numel(), max_size=keep.numel()))
    other = torch.tensor(bits).view(keep.shape)
    found = Selection.from_mask(keep).contains(Selection.from_mask(other)).tolist()
    expected = [
        set(o.nonzero().flatten().tolist()) <= set(k.nonzero().flatten().tolist())
        for k, o in zip(keep, other, strict=True)
    ]
    assert found == expected


def test_an_empty_sequence_selects_nothing():
    selection = Selection.from_mask(torch.zeros(2, 0, dtype=torch.bool))
    assert (selection.short, selection.length) == (0, 0)
    assert selection.gather(torch.zeros(2, 0, 3)).shape == (2, 0, 3)


@pytest.mark.usefixtures("unchecked")
def test_a_mask_without_batch_is_refused():
    with pytest.raises(ShapeError, match=r"Selection needs a mask \[batch seq\]; got shape \(3,\)"):
        Selection.from_mask(torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("width", [-1, 4])
def test_a_width_beyond_the_sequence_is_refused(width: int):
    with pytest.raises(ShapeError, match=f"Selection needs 0 <= width <= 3; got width={width}"):
        Selection.from_mask(torch.ones(1, 3, dtype=torch.bool), width=width)


KEEP = torch.tensor([[True, False, True], [True, True, False]])


def test_tensors_of_another_length_are_refused():
    selection = Selection.from_mask(KEEP)
    with pytest.raises(ShapeError, match=r"Selection\.gather needs 3 positions along axis 1; got shape"):
        selection.gather(torch.zeros(2, 4))
    with pytest.raises(ShapeError, match=r"Selection\.expand needs 2 slots along axis 1; got shape"):
        selection.expand(torch.zeros(2, 3))


def test_another_batch_is_refused():
    with pytest.raises(ShapeError, match=r"take needs 2 rows \(or 1\) along axis 0; got shape \(3, 3\)"):
        take(torch.zeros(3, 3), Selection.from_mask(KEEP).index, 1)


def test_selections_of_two_sequences_are_not_compared():
    with pytest.raises(ShapeError, match=r"Selection\.contains needs two selections of one sequence"):
        Selection.from_mask(KEEP).contains(Selection.from_mask(KEEP[:, :2]))
