"""What dropping tokens saves, side by side: tokens, FLOPs, cache bytes, peak memory, time."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tokencurric.adapters import compress, find_parts
from tokencurric.adapters.discovery import is_visual
from tokencurric.compressors import Compressor, require_compressor
from tokencurric.errors import ShapeError
from tokencurric.evaluation.flops import Flops, count_flops, prefill_flops
from tokencurric.evaluation.memory import cache_bytes, kv_bytes, paper_kv_bytes, peak_memory
from tokencurric.evaluation.timing import Timing, time_generation
from tokencurric.evaluation.tokens import PromptShape, tokens_per_layer
from tokencurric.hosts.names import CACHE
from tokencurric.token_budget import TokenBudget


@dataclass(frozen=True)
class Efficiency:
    """One kept count on one model. All figures are true ones of the run, but for `paper_kv_bytes`.

    Args:
        batch: prompts that the figures are the sum of. kept: visual tokens of each that stay to the end. layer: first
            layer that runs on them; of several cuts, the first of each.
        tokens: visual tokens each layer saw. flops: in closed form. counted_flops: counted while it ran, with the
            choice of tokens.
        kv_bytes: measured in the cache. formula_kv_bytes: in closed form. paper_kv_bytes: visual tokens only, counted
            as dropped in every layer. peak_memory: of all tensors, weights too, while the prompt was read; None where
            the device is not CUDA. timing: of prefill and decoding.
    """

    batch: int
    kept: int
    layer: int | tuple[int, ...]
    tokens: tuple[int, ...]
    flops: Flops
    counted_flops: Flops
    kv_bytes: int
    formula_kv_bytes: int
    paper_kv_bytes: int
    peak_memory: int | None
    timing: Timing

    @property
    def layer_average(self) -> float:
        """Mean of `tokens`: what some papers mean by "64 tokens"."""
        return sum(self.tokens) / len(self.tokens)

    def plain(self) -> dict[str, Any]:
        """As data for JSON."""
        totals = {"flops_total": self.flops.total, "flops_decoder": self.flops.decoder}
        return {**asdict(self), **totals, "layer_average": self.layer_average}


def measure_efficiency(
    model: Any,
    inputs: Mapping[str, Any],
    compressor: Compressor,
    keeps: Sequence[int | Sequence[int]],
    *,
    layer: int | Sequence[int] = 2,
    new_tokens: int = 8,
    repeats: int = 3,
) -> list[Efficiency]:
    """Measure a prompt at several kept counts.

    Args:
        model: a LLaVA-like model in evaluation mode. inputs: of prompts that are equally long, such as a single one.
        compressor: what drops tokens. keeps: counts, the number of visual tokens among them for comparison.
        layer: first that runs short. For several cuts a list, and in `keeps` a list of counts for each measurement.
        new_tokens, repeats: as for `time_generation`.

    Raises:
        ShapeError: the prompts differ in length. RangeError: counts and layers make no budget.
        UnsupportedModelError: the model is not built as LLaVA is. NotACompressorError: `compressor` is none.

    Example:
        >>> rows = measure_efficiency(model, prompts.inputs, Random(), [576, 64])  # doctest: +SKIP
        >>> rows[0].kv_bytes / rows[1].kv_bytes  # doctest: +SKIP
        4.2
    """
    require_compressor(compressor, who="measure_efficiency")
    ids = inputs["input_ids"]
    visual = is_visual(ids, find_parts(model).visual_ids).sum(1)
    if bool((inputs["attention_mask"] == 0).any()) or len(visual.unique()) > 1:
        raise ShapeError(
            f"measure_efficiency needs prompts of one length; got lengths {inputs['attention_mask'].sum(1).tolist()}. "
            "A cost per prompt would be a mean of unlike ones. Pass one prompt."
        )
    batch, shape = ids.shape[0], PromptShape(int(visual[0]), ids.shape[1] - int(visual[0]))
    images = inputs["pixel_values"].shape[0] // batch if "pixel_values" in inputs else 0

    def row(keep: int | Sequence[int]) -> Efficiency:
        kept = TokenBudget(keep=keep, layer=layer).kept(shape.visual)

        def shortened() -> AbstractContextManager[Any]:
            whole = kept[-1] == shape.visual
            return nullcontext() if whole else compress(model, compressor, keep=keep, layer=layer)

        caches = []

        def read() -> None:
            said = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
            caches.append(CACHE.read(said))

        with torch.no_grad(), shortened():
            counted = count_flops(model, inputs)
            peak = peak_memory(read, model.device)
        cut: Mapping[str, Any] = {"keep": keep, "layer": layer}
        return Efficiency(
            batch=batch,
            kept=kept[-1],
            layer=layer if isinstance(layer, int) else tuple(layer),
            tokens=tokens_per_layer(find_parts(model).depth, shape.visual, **cut),
            flops=prefill_flops(model, shape, **cut, images=images, batch=batch),
            counted_flops=counted,
            kv_bytes=cache_bytes(caches[0]),
            formula_kv_bytes=kv_bytes(model, shape, **cut, batch=batch),
            paper_kv_bytes=batch * paper_kv_bytes(model, keep=kept[-1]),
            peak_memory=peak,
            timing=time_generation(model, inputs, shortened, new_tokens=new_tokens, repeats=repeats),
        )

    return [row(keep) for keep in keeps]
