"""Everything that the library exports, held to the laws that users hold their own work to."""

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from tests.testing import discovery
from tokencurric.testing import Check, divergence_checks, parametrize_with_checks, schedule_checks
from tokencurric.testing.strategies import schedules


@parametrize_with_checks(discovery.compressors())
def test_compressor(subject: object, check: Check):
    check(subject)


@parametrize_with_checks(discovery.divergences(), checks=divergence_checks())
def test_divergence(subject: object, check: Check):
    check(subject)


@pytest.mark.parametrize("check", schedule_checks(), ids=lambda check: check.name)
@pytest.mark.parametrize("kind", discovery.schedules(), ids=lambda kind: kind.__name__)
def test_schedule(kind: type, check: Check):
    @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
    @given(schedules(kind))
    def holds(schedule: object) -> None:
        if check.claimed_by(schedule):
            check(schedule, examples=10)

    holds()


def test_discovery_finds_what_there_is():
    assert {"Random", "Uniform", "FastV", "DART"} <= {type(one).__name__ for one in discovery.compressors()}
    assert {"forward_kl", "reverse_kl", "jensen_shannon"} <= {one.__name__ for one in discovery.divergences()}
    assert {"Constant", "Linear", "Cosine", "Step", "Joined", "Clipped"} <= {
        kind.__name__ for kind in discovery.schedules()
    }


@pytest.mark.parametrize("kind", discovery.schedules(), ids=lambda kind: kind.__name__)
def test_schedules_of_every_class_are_drawn_and_differ(kind: type):
    pairs = st.tuples(schedules(kind), schedules(kind))
    one, other = find(pairs, lambda pair: pair[0] != pair[1], settings=settings(phases=[Phase.generate], database=None))
    assert type(one) is type(other) is kind
