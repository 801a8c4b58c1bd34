"""Hypothesis strategies: what to try a compressor, a schedule or a loss on."""

from tokencurric.testing.strategies.budgets import budgets as budgets
from tokencurric.testing.strategies.cases import cases as cases
from tokencurric.testing.strategies.cases import packings as packings
from tokencurric.testing.strategies.cases import rows as rows
from tokencurric.testing.strategies.logits import LogitsCase as LogitsCase
from tokencurric.testing.strategies.logits import logits as logits
from tokencurric.testing.strategies.schedules import curricula as curricula
from tokencurric.testing.strategies.schedules import progress as progress
from tokencurric.testing.strategies.schedules import schedules as schedules
from tokencurric.testing.strategies.views import attention_maps as attention_maps
from tokencurric.testing.strategies.views import views as views
