"""A context that checks that a model comes out of it as it went in."""

import torch

from tokencurric.testing.models import fingerprint


class Unchanged:
    """Checks on leaving, also by an exception: hooks, attributes, settings and every weight."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.before = fingerprint(self.model)
        self.weights = {name: (value, value.clone()) for name, value in self.model.state_dict().items()}
        return self.model

    def __exit__(self, *exception):
        after = fingerprint(self.model)
        assert after.keys() == self.before.keys()
        for name, before in self.before.items():
            assert after[name] == before, name
        weights = self.model.state_dict()
        assert weights.keys() == self.weights.keys()
        for name, (value, copy) in self.weights.items():
            assert weights[name].data_ptr() == value.data_ptr()
            assert torch.equal(weights[name], copy)
