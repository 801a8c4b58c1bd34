"""Wall time of prefill and decoding."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from tokencurric.errors import RangeError


@dataclass(frozen=True)
class Timing:
    """Seconds of a prefill, and of each token decoded after it.

    Example:
        >>> Timing(prefill=0.2, decode=0.01).prefill
        0.2
    """

    prefill: float
    decode: float


def time_generation(
    model: Any,
    inputs: Mapping[str, Any],
    context: Callable[[], AbstractContextManager[Any]],
    *,
    new_tokens: int = 8,
    repeats: int = 3,
) -> Timing:
    """Median times of generating one token, and of each further one; the end token does not stop it.

    Args:
        model, inputs: what generates. context: makes what is open around each run, such as `compress(...)` or
            `nullcontext()`; opening it counts. new_tokens: decoded after the first. repeats: after one to warm up.

    Raises:
        RangeError: a number is below 1.

    Example:
        >>> time_generation(model, inputs, lambda: compress(model, FastV(), keep=64))  # doctest: +SKIP
        Timing(prefill=0.031, decode=0.012)
    """
    for name, number in (("new_tokens", new_tokens), ("repeats", repeats)):
        if number < 1:
            raise RangeError(f"time_generation needs {name} >= 1; got {name}={number}. There is nothing to time.")
    first = _seconds(model, inputs, context, 1, repeats)
    all_of_them = _seconds(model, inputs, context, 1 + new_tokens, repeats)
    return Timing(prefill=first, decode=max(0.0, all_of_them - first) / new_tokens)


def _seconds(
    model: Any,
    inputs: Mapping[str, Any],
    context: Callable[[], AbstractContextManager[Any]],
    tokens: int,
    repeats: int,
) -> float:
    times = []
    for _ in range(repeats + 1):
        _wait(model.device)
        begun = time.perf_counter()
        with torch.no_grad(), context():
            model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        _wait(model.device)
        times.append(time.perf_counter() - begun)
    return median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
