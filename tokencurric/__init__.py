"""tokencurric: building blocks for visual-token compression in multimodal language models.

What needs transformers (`compress`, `EPIC`, `EpicTrainer`) is imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from tokencurric.budget import keep_count as keep_count
from tokencurric.compressors import DART as DART
from tokencurric.compressors import Compressor as Compressor
from tokencurric.compressors import FastV as FastV
from tokencurric.compressors import Random as Random
from tokencurric.compressors import Uniform as Uniform
from tokencurric.curriculum import Curriculum as Curriculum
from tokencurric.curriculum import Stage as Stage
from tokencurric.curriculum import icd as icd
from tokencurric.curriculum import lcd as lcd
from tokencurric.curriculum import tcd as tcd
from tokencurric.errors import StateError as StateError
from tokencurric.errors import TokencurricError as TokencurricError
from tokencurric.losses import ConsistencyLoss as ConsistencyLoss
from tokencurric.schedules import Constant as Constant
from tokencurric.schedules import Cosine as Cosine
from tokencurric.schedules import Linear as Linear
from tokencurric.schedules import Schedule as Schedule
from tokencurric.schedules import Step as Step
from tokencurric.selection import Selection as Selection
from tokencurric.token_budget import TokenBudget as TokenBudget
from tokencurric.view import VisualView as VisualView

if TYPE_CHECKING:
    from tokencurric.adapters import ModelAdapter as ModelAdapter
    from tokencurric.adapters import compress as compress
    from tokencurric.distill import EPIC as EPIC
    from tokencurric.trainer import EpicTrainer as EpicTrainer

__version__ = "0.1.0"

_LAZY = {
    "compress": "tokencurric.adapters",
    "ModelAdapter": "tokencurric.adapters",
    "EPIC": "tokencurric.distill",
    "EpicTrainer": "tokencurric.trainer",
}

__all__ = [
    "DART",
    "EPIC",
    "Compressor",
    "ConsistencyLoss",
    "Constant",
    "Cosine",
    "Curriculum",
    "EpicTrainer",
    "FastV",
    "Linear",
    "ModelAdapter",
    "Random",
    "Schedule",
    "Selection",
    "Stage",
    "Step",
    "TokenBudget",
    "TokencurricError",
    "Uniform",
    "VisualView",
    "compress",
    "icd",
    "keep_count",
    "lcd",
    "tcd",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
