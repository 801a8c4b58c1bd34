"""Which family a test is about goes into its record, from which docs/families.md is made."""

import functools

import pytest
import transformers

from tests.adapters.zoo import tiny_inputs, tiny_model


@pytest.fixture(autouse=True)
def family_in_the_record(request, record_property):
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "family" in parameters:
        record_property("family", parameters["family"])


# Families that a release of transformers itself cannot run, and what it then raises.
BROKEN = {"llama4": (AttributeError, "image_outputs")}


@functools.cache
def broken_by_itself(family):
    error, text = BROKEN[family]
    try:
        tiny_model(family)(**tiny_inputs(family))
    except error as found:
        return str(found) if text in str(found) else None
    return None


@pytest.fixture(autouse=True)
def family_runs_without_us(request):
    family = request.node.callspec.params.get("family") if hasattr(request.node, "callspec") else None
    if family in BROKEN and (reason := broken_by_itself(family)) is not None:
        pytest.skip(f"transformers {transformers.__version__} fails on {family} by itself: {reason}")
