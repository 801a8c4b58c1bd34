"""What a view accepts, derives and says when a signal is missing."""

import pytest
import torch
from hypothesis import given

from tokencurric import VisualView
from tokencurric.errors import MissingSignalError, ShapeError
from tokencurric.testing.strategies import views
from tokencurric.view import remedy

TOKENS = torch.zeros(2, 3, 4)


# A library that checks types by sampling, as is done while these tests run, draws from the module `random`.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@given(views())
def test_counts_and_ranks_number_the_tokens(view: VisualView):
    for row, mask in enumerate(view.mask.tolist()):
        assert int(view.counts[row]) == sum(mask)
        ranks = [rank for rank, real in zip(view.rank[row].tolist(), mask, strict=True) if real]
        assert ranks == list(range(sum(mask)))


def test_without_a_mask_all_are_tokens():
    assert VisualView(tokens=TOKENS).mask.tolist() == [[True] * 3] * 2
    assert VisualView(tokens=TOKENS).counts.tolist() == [3, 3]


def test_rows_are_keyed_by_their_index_unless_told():
    assert VisualView(tokens=TOKENS).keys_of_rows.tolist() == [0, 1]
    assert VisualView(tokens=TOKENS, row_key=torch.tensor([7, 3])).keys_of_rows.tolist() == [7, 3]


def test_signals_are_what_is_present():
    assert VisualView(tokens=TOKENS).signals == frozenset()
    assert VisualView(tokens=TOKENS, attention=torch.zeros(2, 3)).signals == {"attention"}


def test_a_signal_is_handed_out_as_it_came():
    attention = torch.rand(2, 3)
    assert VisualView(tokens=TOKENS, attention=attention).signal("attention", who="Mine") is attention


@pytest.mark.parametrize(
    ("signal", "advice"),
    [
        ("attention", "layer >= 1"),
        ("text_keys", "layer >= 1"),
        ("cls_attention", "vision tower"),
        ("grid", "vision tower"),
    ],
)
def test_a_missing_signal_is_named_with_its_remedy(signal: str, advice: str):
    with pytest.raises(MissingSignalError, match=f"Mine needs the signal '{signal}'; got a view with .*{advice}"):
        VisualView(tokens=TOKENS).signal(signal, who="Mine")
    assert advice in remedy(signal)


@pytest.mark.usefixtures("unchecked")
def test_tokens_without_a_batch_are_refused():
    with pytest.raises(ShapeError, match=r"VisualView needs tokens \[batch visual dim\]; got tokens of shape \(3, 4\)"):
        VisualView(tokens=torch.zeros(3, 4))


WRONG = {
    "valid": torch.ones(2, 4, dtype=torch.bool),
    "positions": torch.zeros(1, 3, dtype=torch.int64),
    "normed_tokens": torch.zeros(2, 2, 4),
    "keys": torch.zeros(3, 3, 1, 2),
    "attention": torch.zeros(2, 2),
    "cls_attention": torch.zeros(1, 3),
    "text_tokens": torch.zeros(1, 5, 4),
    "normed_text_tokens": torch.zeros(3, 5, 4),
    "text_keys": torch.zeros(1, 5, 1, 2),
    "text_valid": torch.ones(1, 5, dtype=torch.bool),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", WRONG)
def test_a_field_of_another_batch_or_length_is_refused(name: str):
    with pytest.raises(ShapeError, match=rf"VisualView needs {name} to begin with \[batch "):
        VisualView(tokens=TOKENS, **{name: WRONG[name]})


@pytest.mark.usefixtures("unchecked")
def test_text_fields_of_two_lengths_are_refused():
    with pytest.raises(ShapeError, match="needs text_keys to begin with"):
        VisualView(tokens=TOKENS, text_tokens=torch.zeros(2, 5, 4), text_keys=torch.zeros(2, 6, 1, 2))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["row_key", "grid"])
def test_a_field_without_an_entry_a_row_is_refused(name: str):
    wrong = {"row_key": torch.zeros(3, dtype=torch.int64), "grid": torch.zeros(1, 2, dtype=torch.int64)}[name]
    with pytest.raises(ShapeError, match=f"needs whole numbers {name} of shape"):
        VisualView(tokens=TOKENS, **{name: wrong})
