"""What torch's allocators hand out while something runs."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from tokencurric.evaluation import peak_memory

METERS = {"cpu": "memory events of torch's profiler, added up", "cuda": "torch.cuda.max_memory_allocated"}


def peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that `run` holds at most on the device beyond what there was."""
    if device.type == "cpu":
        return cpu_peak(run)
    before = torch.cuda.memory_allocated(device)
    return (peak_memory(run, device) or 0) - before


def cpu_peak(run: Callable[[], object]) -> int:
    """Bytes that `run` holds at most on the CPU beyond what there was.

    The profiler's memory events added up, so it is exact and leaves out what the process holds besides.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
