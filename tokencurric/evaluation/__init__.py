"""What compression costs and what it saves: accuracy with standard errors, FLOPs, cache bytes, time, a report."""

from tokencurric.evaluation.accuracy import Answers as Answers
from tokencurric.evaluation.accuracy import answer_prompts as answer_prompts
from tokencurric.evaluation.accuracy import sweep as sweep
from tokencurric.evaluation.efficiency import Efficiency as Efficiency
from tokencurric.evaluation.efficiency import measure_efficiency as measure_efficiency
from tokencurric.evaluation.flops import Flops as Flops
from tokencurric.evaluation.flops import count_flops as count_flops
from tokencurric.evaluation.flops import prefill_flops as prefill_flops
from tokencurric.evaluation.kept import kept_tokens as kept_tokens
from tokencurric.evaluation.memory import cache_bytes as cache_bytes
from tokencurric.evaluation.memory import kv_bytes as kv_bytes
from tokencurric.evaluation.memory import paper_kv_bytes as paper_kv_bytes
from tokencurric.evaluation.memory import peak_memory as peak_memory
from tokencurric.evaluation.pictures import draw_kept as draw_kept
from tokencurric.evaluation.pictures import plot_kept as plot_kept
from tokencurric.evaluation.plots import save_figures as save_figures
from tokencurric.evaluation.significance import Difference as Difference
from tokencurric.evaluation.significance import binomial_error as binomial_error
from tokencurric.evaluation.significance import paired_difference as paired_difference
from tokencurric.evaluation.significance import recovered_share as recovered_share
from tokencurric.evaluation.timing import Timing as Timing
from tokencurric.evaluation.timing import time_generation as time_generation
from tokencurric.evaluation.tokens import PromptShape as PromptShape
from tokencurric.evaluation.tokens import tokens_per_layer as tokens_per_layer
