"""Everything about a model that hooks could leave behind."""

import torch

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def fingerprint(model):
    """Types, attributes, hooks and settings of every module."""
    return {
        name: (
            type(module),
            sorted(vars(module)),
            {hooks: len(getattr(module, hooks)) for hooks in HOOKS},
            id(getattr(module, "config", None)),
            _settings(getattr(module, "config", None)),
            module.training,
        )
        for name, module in model.named_modules()
    }


def _settings(config):
    return None if config is None else (sorted(vars(config)), config._attn_implementation, str(config))


class Unchanged:
    """A context that checks on leaving, also by an exception, that the model is what it was."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.before = fingerprint(self.model)
        self.weights = {name: (value, value.clone()) for name, value in self.model.state_dict().items()}
        return self.model

    def __exit__(self, *exception):
        assert fingerprint(self.model) == self.before
        after = self.model.state_dict()
        assert after.keys() == self.weights.keys()
        for name, (value, copy) in self.weights.items():
            assert after[name].data_ptr() == value.data_ptr()
            assert torch.equal(after[name], copy)
