"""What a model was trained with, as plain data for a JSON file beside its weights."""

from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn

from tokencurric.distill import EPIC


def describe(value: Any) -> Any:
    """A dataclass as its name and fields, through and through; anything else as itself or its name.

    Example:
        >>> from tokencurric import Linear
        >>> describe(Linear(0.0, 0.5))
        {'type': 'Linear', 'start': 0.0, 'end': 0.5}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__, **{f.name: describe(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, tuple | list):
        return [describe(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = value if callable(value) and hasattr(value, "__qualname__") else type(value)
    return {"type": kind.__name__, "module": kind.__module__, "name": kind.__qualname__}


def describe_objective(objective: EPIC) -> dict[str, Any]:
    """Compressor, curriculum, weights and loss of an objective.

    Example:
        >>> from tokencurric import EPIC, Random, tcd
        >>> describe_objective(EPIC(Random(), tcd()))["weight"]
        0.7
    """
    return {
        "compressor": describe(objective.compressor),
        "curriculum": describe(objective.curriculum),
        "weight": objective.weight,
        "temperature": objective.loss.temperature,
        "divergence": describe(objective.loss.divergence)["type"],
        "feature_weight": objective.feature_weight,
        "teacher": type(objective.teacher).__name__ if isinstance(objective.teacher, nn.Module) else "self",
        "share_prefix": objective.share_prefix,
    }
