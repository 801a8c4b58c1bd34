"""Which family a test is about goes into its record, from which docs/families.md is made."""

import pytest


@pytest.fixture(autouse=True)
def family_in_the_record(request, record_property):
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "family" in parameters:
        record_property("family", parameters["family"])
