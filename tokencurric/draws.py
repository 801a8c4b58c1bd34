"""Randomness as a function: an integer hash of whole numbers, evaluated on tensors.

A draw depends on its arguments alone, never on a generator's state, so it is the same in any batch, on any rank or
device, and when gradient checkpointing runs a layer twice.
"""

import torch
from jaxtyping import Int
from torch import Tensor

_MASK64 = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    value &= _MASK64
    return value - 2**64 if value >= 2**63 else value


def _shift_right(x: Int[Tensor, "*shape"], by: int) -> Int[Tensor, "*shape"]:
    """Logical right shift: torch shifts int64 arithmetically, so the copies of the sign bit are masked off."""
    logical: Tensor = (x >> by) & (2 ** (64 - by) - 1)
    return logical


def _mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """splitmix64's finalizer, on int64 with wrap-around."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def hash_tensor(seed: int, *keys: Int[Tensor, "*#shape"]) -> Int[Tensor, "*shape"]:
    """64 well-mixed bits for each combination of `seed` and the entries of `keys`, which broadcast.

    Args:
        seed: any Python int; bits above 64 are ignored.
        keys: integer tensors; their order matters.

    Returns:
        int64 tensor of the broadcast shape.

    Example:
        >>> index = torch.arange(3)
        >>> bool((hash_tensor(1, index) != hash_tensor(2, index)).all())
        True

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators" (splitmix64).
    """
    state: Tensor = torch.full((), _signed(hash_ints(seed)), dtype=torch.int64, device=keys[0].device)
    for key in keys:
        state = _mix((state ^ key.long()) + _signed(_GAMMA))
    return state


def hash_ints(*values: int) -> int:
    """The same hash on Python ints: an unsigned 64-bit number.

    Example:
        >>> hash_ints(0, 1) != hash_ints(1, 0)
        True
    """
    state = 0
    for value in values:
        x = ((state ^ (value & _MASK64)) + _GAMMA) & _MASK64
        x = ((x ^ (x >> 30)) * _MIX_1) & _MASK64
        x = ((x ^ (x >> 27)) * _MIX_2) & _MASK64
        state = x ^ (x >> 31)
    return state


def uniform(*values: int) -> float:
    """A number in [0, 1) that depends on `values` alone, with 53 random bits.

    Example:
        >>> 0 <= uniform(0, 17) < 1
        True
    """
    return (hash_ints(*values) >> 11) * 2.0**-53
