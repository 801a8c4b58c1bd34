"""Settings of every test: how many examples a property gets, one thread for torch, and shape checks on demand."""

import os
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

for name, examples in {"dev": 25, "ci": 100, "nightly": 5000}.items():
    # Tensors are slow to draw beside integers, so only the number of examples bounds a property's time. With "ci" a
    # change is judged by the same examples wherever it runs; the other two draw new ones each time.
    settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        derandomize=name == "ci",
        suppress_health_check=[HealthCheck.too_slow],
        print_blob=True,
    )
# A mutant is noticed or not: no need to know by which smallest case.
settings.register_profile("mutants", settings.get_profile("dev"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("TOKENCURRIC_PROFILE", "dev"))

# Sums then have one order, and small tensors do not wait for a pool of threads.
torch.set_num_threads(1)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """The library as its users run it: without the shape checks that pytest switches on.

    Needed by a test that looks at our own message for a wrong shape (the checks would raise first), and by one that
    runs `torch.compile`, which fails on checked code.
    """
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
