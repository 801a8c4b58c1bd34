"""How compression enters a transformers model: the only room, with `trainer`, that imports transformers."""

from tokencurric.adapters._requirement import TRANSFORMERS as TRANSFORMERS
from tokencurric.adapters.adapter import ModelAdapter as ModelAdapter
from tokencurric.adapters.compress import compress as compress
from tokencurric.adapters.discovery import ModelParts as ModelParts
from tokencurric.adapters.discovery import find_parts as find_parts
