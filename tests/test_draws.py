"""Randomness as a function: the hash, and how evenly it falls."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reference.random import splitmix
from tokencurric.draws import hash_ints, hash_tensor, uniform

INT64 = st.integers(-(2**63), 2**63 - 1)


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def test_the_hash_is_splitmix64():
    # The first output of the generator seeded with 1234567, as commonly published.
    assert hash_ints(1234567) == 6457827717110365317 == splitmix(1234567)


@given(st.integers(), INT64, INT64)
def test_tensors_and_ints_hash_alike(seed: int, a: int, b: int):
    found = hash_tensor(seed, torch.tensor([a]), torch.tensor([b]))
    assert found.tolist() == [signed(hash_ints(seed, a, b))]
    assert hash_ints(seed, a, b) == splitmix(splitmix(splitmix(seed % 2**64) ^ a % 2**64) ^ b % 2**64)


def test_one_key_is_enough():
    assert hash_tensor(3, torch.tensor([5])).tolist() == [signed(hash_ints(3, 5))]


def test_keys_broadcast():
    found = hash_tensor(3, torch.tensor([[1], [2]]), torch.arange(4))
    assert found.shape == (2, 4)
    assert found[1, 2] == signed(hash_ints(3, 2, 2))


@given(st.lists(INT64, min_size=2, max_size=3, unique=True))
def test_order_and_number_of_values_matter(values: list[int]):
    assert hash_ints(*values) != hash_ints(*reversed(values))
    assert hash_ints(*values) != hash_ints(*values, 0)


def test_every_bit_depends_on_every_bit():
    # One flipped bit of the input flips half of the output's, give or take: 64·500 fair coins.
    flips = [
        (hash_ints(value) ^ hash_ints(value ^ (1 << bit))).bit_count() for bit in range(64) for value in range(500)
    ]
    assert abs(sum(flips) / len(flips) - 32) < 0.2
    assert min(flips) > 8


def test_uniform_numbers_fill_the_unit_interval():
    drawn = sorted(uniform(0, i) for i in range(4000))
    assert drawn[0] >= 0
    assert drawn[-1] < 1
    # Kolmogorov and Smirnov: the largest distance from the diagonal is below 1.95/√n in all but a thousandth of draws.
    distance = max(max(abs(x - i / 4000), abs(x - (i + 1) / 4000)) for i, x in enumerate(drawn))
    assert distance < 1.95 / 4000**0.5
    assert max(abs(x**2 - i / 4000) for i, x in enumerate(drawn)) > 1.95 / 4000**0.5
