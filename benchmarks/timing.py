"""Timing two or more ways of doing a thing side by side, so that the machine's drift hits all of them."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of the rounds, and their smallest and largest."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Of the rounds."""
        return cls(statistics.median(seconds), min(seconds), max(seconds))


def side_by_side(ways: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 1) -> dict[str, Timing]:
    """Call all `ways` in turn, `rounds` times."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm_up + rounds):
        for name, call in ways.items():
            start = time.perf_counter()
            call()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(each) for name, each in seconds.items()}


def machine() -> dict[str, Any]:
    """What the times were taken on."""
    return {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
