"""What compressed inference costs and saves, beside the least that it could cost.

    python benchmarks/inference_efficiency.py [--json FILE] [--size llava-7b|quarter] [--quick]
    python benchmarks/inference_efficiency.py --limits    # closed forms of LLaVA-1.5-7B; nothing is run

The model is LLaVA-1.5-7B in shape, with random weights: on a GPU in half precision; without one, a model whose every
width is a quarter of it, in float32. A prompt of one picture (576 visual tokens) and 60 text tokens is read and a few
tokens are decoded, with 576, 256, 128 and 64 visual tokens from layer 2 on.

Beside it runs the *ideal*, `handmade.py`: the same weights on the same kept positions, by plain calls of the model's
modules, without a choice, a hook, or a look at masks. Before anything is timed, both have to give the same logits. All
ways are timed in turn in one run, every second round backwards. The figures to read, times being ratios of medians:

- `prefill_vs_ideal`: ours over the ideal, choice of tokens and opening of the context included. Goal: at most 1.03 at
  64 of 576. `decode_vs_ideal`: the same of a decoded token. In the row without compression, "ours" is transformers.
- `prefill_speedup`: no compression over ours. `prefill_speedup_limit`: the same in operations.
- `kv_bytes` measured in the cache and `kv_bytes_formula`, which have to be equal; `flops` counted while it ran and
  `flops_formula`, which have to be equal for a compressor whose choice takes no counted operation.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

# Not the script's folder, where selectors.py hides the standard library's module.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import transformers
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from benchmarks.allocator import METERS, peak
from benchmarks.handmade import read_prompt, read_token
from benchmarks.llava import IMAGE, LLAVA_7B, Shape, make_config
from benchmarks.timing import Timing
from tokencurric import DART, Compressor, FastV, Random, Uniform, compress
from tokencurric.evaluation import (
    PromptShape,
    cache_bytes,
    count_flops,
    kept_tokens,
    kv_bytes,
    paper_kv_bytes,
    prefill_flops,
    tokens_per_layer,
)
from tokencurric.hosts.names import CACHE
from tokencurric.testing.models import apart

COMPRESSORS: list[Compressor] = [Uniform(), Random(), FastV(), DART()]
LAYER, GOAL = 2, 1.03
SHARES = (4 / 9, 2 / 9, 1 / 9)  # 256, 128 and 64 of 576
BEFORE, TEXT = 5, 60  # text tokens before the picture, and in all
SIZES = {
    "llava-7b": replace(LLAVA_7B, text=TEXT),
    "quarter": replace(
        LLAVA_7B, width=1024, heads=8, inner=2752, vocabulary=8016, tower_width=256, tower_heads=4, text=TEXT
    ),
    "quick": Shape(
        layers=4,
        width=256,
        heads=2,
        inner=688,
        vocabulary=2008,
        tower_layers=4,
        tower_width=64,
        tower_heads=1,
        side=6,
        text=TEXT,
    ),
}

# What each column says. True: of the run that was made. Paper-style: as papers quote it.
COLUMNS = {
    "kept": "paper-style: visual tokens from the compressing layer on",
    "layer_average": "true: visual tokens that a layer sees, mean over all layers",
    "flops": "true: counted while the prompt was read, the choice included",
    "flops_formula": "true: closed form, without the choice",
    "kv_bytes": "true: keys and values in the cache after the prompt",
    "kv_bytes_formula": "true: closed form",
    "kv_bytes_paper": "paper-style: visual tokens alone, as if dropped in every layer",
    "prefill_seconds": "true: until the first logits, opening of the context and the choice included",
    "decode_seconds": "true: of each token after that",
    "peak_memory": "true: bytes at most while the prompt was read, beyond the weights",
}

Run = Iterator[Tensor]  # logits after the prompt, then after the last decoded token
Way = tuple["Case", bool]  # and whether it is done by hand


@dataclass(frozen=True)
class Case:
    """A row of the table. Without a compressor nothing is dropped."""

    compressor: Compressor | None
    keep: int

    def opened(self, model: Any) -> AbstractContextManager[Any]:
        """What is open while it runs."""
        if self.compressor is None:
            return nullcontext()
        return compress(model, self.compressor, keep=self.keep, layer=LAYER)


class Prompt:
    """A picture between a few words and a question, and the tokens of the answer."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, *, answer: int) -> None:
        g = torch.Generator().manual_seed(1)
        text = torch.randint(IMAGE + 1, shape.vocabulary, (1, shape.text + answer), generator=g).to(device)
        picture = torch.full((1, shape.visual), IMAGE, device=device)
        side = 14 * shape.side
        self.ids = torch.cat((text[:, :BEFORE], picture, text[:, BEFORE : shape.text]), 1)
        self.pixels = torch.randn(1, 3, side, side, generator=g).to(device, dtype)
        self.picture = slice(BEFORE, BEFORE + shape.visual)
        self.answer = text[:, shape.text :].split(1, 1)
        self.shape = PromptShape(shape.visual, shape.text)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """As a processor makes them."""
        return {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids), "pixel_values": self.pixels}

    def left(self, kept: Tensor | None) -> Tensor | None:
        """Positions of the text and of the kept visual tokens; None where all are kept."""
        if kept is None:
            return None
        stays = torch.ones_like(self.ids[0], dtype=torch.bool)
        stays[self.picture] = kept[0].to(stays.device)
        return stays.nonzero()[:, 0]


def make_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """A LLaVA of random weights, ready to answer."""
    torch.manual_seed(0)
    with device:
        model = LlavaForConditionalGeneration._from_config(make_config(shape), dtype=dtype, attn_implementation="sdpa")
    return model.eval()


# The two ways to answer. Each halts when the prompt is read, and again when all tokens are decoded.


def with_library(model: Any, prompt: Prompt, case: Case) -> Run:
    """Ours, or transformers alone."""
    with case.opened(model):
        said = model(**prompt.inputs, use_cache=True, logits_to_keep=1)
        name = CACHE.name_in(model.forward)
        yield said.logits[:, -1]
        for token in prompt.answer:
            said = model(input_ids=token, use_cache=True, **{name: CACHE.read(said)})
        yield said.logits[:, -1]


def by_hand(model: Any, prompt: Prompt, left: Tensor | None) -> Run:
    """The ideal."""
    logits, cache = read_prompt(model, prompt.ids, prompt.pixels, picture=prompt.picture, left=left, layer=LAYER)
    yield logits
    for number, token in enumerate(prompt.answer):
        logits = read_token(model, token, prompt.shape.length + number, cache)
    yield logits


def compare(case: Case, ours: Run, ideal: Run, full: Run, dtype: torch.dtype) -> dict[str, Any]:
    """How far the ideal's logits, after the prompt and at the end, are from ours and from those of the full prompt.

    Nothing is timed unless the first are equal but for rounding, and the second are not.
    """
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    a, b, whole = ([logits.float() for logits in run] for run in (ours, ideal, full))
    found: dict[str, Any] = {"tolerance": tolerance, "bitwise": all(map(torch.equal, a, b))}
    for number, halt in enumerate(("prefill", "decode")):
        found[halt] = {"apart": apart(a[number], b[number]), "full_apart": apart(whole[number], b[number])}
        if not found[halt]["apart"] <= tolerance:
            raise SystemExit(f"{case}: the ideal has other logits after {halt}, {found}. Times would mean nothing.")
        if case.compressor is not None and not found[halt]["full_apart"] > 10 * tolerance:
            raise SystemExit(f"{case}: dropping tokens moves no logits after {halt}, {found}. Nothing was compared.")
    return found


def formulas(model: Any, shape: PromptShape, keep: int) -> dict[str, Any]:
    """What can be said without running anything."""
    cut: Mapping[str, Any] = {"keep": keep, "layer": LAYER}
    tokens = tokens_per_layer(len(model.model.language_model.layers), shape.visual, **cut)
    whole, short = (prefill_flops(model, shape, keep=each, layer=LAYER).total for each in (shape.visual, keep))
    return {
        "kept": keep,
        "layer_average": sum(tokens) / len(tokens),
        "flops_formula": short,
        "kv_bytes_formula": kv_bytes(model, shape, **cut),
        "kv_bytes_paper": paper_kv_bytes(model, keep=keep),
        "prefill_speedup_limit": whole / short,
    }


def costs(model: Any, prompt: Prompt, case: Case) -> dict[str, Any]:
    """What does not depend on the machine's mood. What is measured has to be what the closed forms say."""
    with case.opened(model):
        counted = count_flops(model, prompt.inputs)
        cache = CACHE.read(model(**prompt.inputs, use_cache=True, logits_to_keep=1))
    measured = {"flops": counted.total, "kv_bytes": cache_bytes(cache)}
    del cache
    found = {
        "compressor": None if case.compressor is None else type(case.compressor).__name__,
        **formulas(model, prompt.shape, case.keep),
        **measured,
        "peak_memory": peak(lambda: next(with_library(model, prompt, case)), model.device),
    }
    free_choice = case.compressor is None or not case.compressor.needs
    if found["kv_bytes"] != found["kv_bytes_formula"] or (free_choice and found["flops"] != found["flops_formula"]):
        raise SystemExit(f"{case}: what was measured is not what the closed forms say: {found}")
    return found


def clock(
    ways: Mapping[Way, Callable[[], Run]], device: torch.device, timer: Callable[[], float], *, rounds: int
) -> dict[Way, dict[str, Timing]]:
    """Seconds of reading the prompt and of decoding, all ways in turn, every second round backwards."""
    seconds: dict[Way, dict[str, list[float]]] = {way: {"prefill": [], "decode": []} for way in ways}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return timer()

    for number in range(1 + rounds):
        for way in list(ways)[:: -1 if number % 2 else 1]:
            run = ways[way]()
            begun = now()
            next(run)
            read = now()
            next(run)
            done = now()
            if number:  # the first is to warm up
                seconds[way]["prefill"].append(read - begun)
                seconds[way]["decode"].append(done - read)
            del run
    return {way: {part: Timing.of(each) for part, each in parts.items()} for way, parts in seconds.items()}


@torch.no_grad()
def measure(model: Any, prompt: Prompt, timer: Callable[[], float], *, rounds: int) -> list[dict[str, Any]]:
    """The rows of the table, that of the full prompt first."""
    full = Case(None, prompt.shape.visual)
    cases = [full, *(Case(each, round(share * full.keep)) for share in SHARES for each in COMPRESSORS)]
    ways: dict[Way, Callable[[], Run]] = {}
    rows = []
    for case in cases:
        kept = None
        if case.compressor is not None:
            kept = kept_tokens(model, prompt.inputs, case.compressor, keep=case.keep, layer=LAYER)
        ways[case, False] = partial(with_library, model, prompt, case)
        ways[case, True] = partial(by_hand, model, prompt, prompt.left(kept))
        same = compare(case, ways[case, False](), ways[case, True](), ways[full, False](), model.dtype)
        rows.append({**costs(model, prompt, case), "logits_of_ideal": same})
    timings = clock(ways, model.device, timer, rounds=rounds)
    for case, row in zip(cases, rows, strict=True):
        for part, steps in (("prefill", 1), ("decode", len(prompt.answer))):
            ours, ideal, whole = (timings[way][part] for way in ((case, False), (case, True), (full, False)))
            row[f"{part}_seconds"] = {name: each / steps for name, each in asdict(ours).items()}
            row[f"{part}_seconds_ideal"] = {name: each / steps for name, each in asdict(ideal).items()}
            row[f"{part}_vs_ideal"] = ours.median / ideal.median
            row[f"{part}_speedup"] = whole.median / ours.median
    return rows


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The rows as text."""
    titles = (
        f"{'':8} {'kept*':>5} {'layer':>6} {'GFLOPs':>9} {'GFLOPs':>9} {'KV MiB':>7} {'KV MiB':>7} {'KV MiB*':>7} "
        f"{'prefill':>9} {'speed-up':>8} {'limit':>6} {'vs ideal':>8} {'decode':>8} {'vs ideal':>8} {'peak MiB':>8}",
        f"{'':8} {'':5} {'mean':>6} {'counted':>9} {'formula':>9} {'':7} {'formula':>7} {'paper':>7} "
        f"{'ms':>9} {'':8} {'':6} {'':8} {'ms/token':>8}",
    )
    yield from titles
    for row in rows:
        yield (
            f"{row['compressor'] or 'full':8} {row['kept']:5} {row['layer_average']:6.1f} "
            f"{row['flops'] / 1e9:9.2f} {row['flops_formula'] / 1e9:9.2f} "
            f"{row['kv_bytes'] / 2**20:7.2f} {row['kv_bytes_formula'] / 2**20:7.2f} "
            f"{row['kv_bytes_paper'] / 2**20:7.2f} {1e3 * row['prefill_seconds']['median']:9.2f} "
            f"{row['prefill_speedup']:8.3f} {row['prefill_speedup_limit']:6.3f} {row['prefill_vs_ideal']:8.3f} "
            f"{1e3 * row['decode_seconds']['median']:8.2f} {row['decode_vs_ideal']:8.3f} "
            f"{row['peak_memory'] / 2**20:8.1f}"
        )


def print_limits(shape: Shape) -> None:
    """The closed forms of a model in half precision."""
    model = make_model(shape, torch.device("meta"), torch.float16)
    prompt = PromptShape(shape.visual, shape.text)
    print(f"{shape}, compression from layer {LAYER} on")
    for keep in (prompt.visual, *(round(share * prompt.visual) for share in SHARES)):
        print(*(f"{name} {value:.8g}" for name, value in formulas(model, prompt, keep).items()), sep="  ")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--size", choices=SIZES, help="llava-7b on a GPU and quarter elsewhere, unless said")
    parser.add_argument("--quick", action="store_true", help="a small model, one thread, few rounds, for a look")
    parser.add_argument("--limits", action="store_true", help="only the closed forms of LLaVA-1.5-7B")
    parser.add_argument("--rounds", type=int, help="times that each way is timed; 7 unless said")
    parser.add_argument("--answer", type=int, default=8, help="tokens that are decoded")
    parser.add_argument(
        "--busy",
        action="store_true",
        help="for a machine that others use too: one thread, and the seconds that a processor spent on it, not the "
        "wall's; not for a GPU",
    )
    arguments = parser.parse_args()
    if arguments.limits:
        print_limits(SIZES["llava-7b"])
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.busy and device.type == "cuda":
        parser.error("--busy counts what the processor does, and the work is done by a GPU")
    if arguments.busy or arguments.quick:
        torch.set_num_threads(1)
    size = arguments.size or ("quick" if arguments.quick else "llava-7b" if device.type == "cuda" else "quarter")
    rounds = arguments.rounds or (2 if arguments.quick else 7)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    seconds = "of the processor" if arguments.busy else "of the wall"
    print(SIZES[size])
    print(f"{size} on {machine}, {torch.get_num_threads()} threads, {dtype}, {rounds} rounds, seconds {seconds}")
    model = make_model(SIZES[size], device, dtype)
    prompt = Prompt(SIZES[size], device, dtype, answer=arguments.answer)
    rows = measure(model, prompt, time.process_time if arguments.busy else time.perf_counter, rounds=rounds)
    print(*table(rows), sep="\n")
    print("* paper-style; all other columns are true of the run:")
    print(*(f"  {name}: {meaning}" for name, meaning in COLUMNS.items()), sep="\n")
    print(f"peak memory by {METERS[device.type]}; the ideal gives the same logits in every row")
    fewest = min(row["kept"] for row in rows)
    ratios = {row["compressor"]: row["prefill_vs_ideal"] for row in rows if row["kept"] == fewest}
    for name, ratio in ratios.items():
        print(f"prefill_vs_ideal {name:8} {ratio:.3f}   goal {GOAL} at {fewest} of {rows[0]['kept']}")
    if arguments.json:
        out = {
            "size": size,
            "shape": asdict(SIZES[size]),
            "layer": LAYER,
            "answer": arguments.answer,
            "rounds": rounds,
            "seconds": seconds,
            "dtype": str(dtype),
            "machine": {"device": machine, "threads": torch.get_num_threads()},
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "columns": COLUMNS,
            "peak_memory_meter": METERS[device.type],
            "weights_bytes": sum(weight.nbytes for weight in model.parameters()),
            "prefill_vs_ideal": ratios,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
