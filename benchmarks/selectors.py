"""Compressors beside a per-sample loop, beside one decoder layer, and beside the bytes that have to be read.

    python benchmarks/selectors.py [--json FILE] [--quick]

Prints, and writes as JSON, for each compressor: `vs_loop` (its time over the loop's), `selector_share` (its time over
one decoder layer's forward at the same batch, length and width) and `vs_bandwidth` (its time over that of reading its
inputs once at the speed measured in the same run).
"""

import sys
from pathlib import Path

# The script's folder would come first, where this file hides the standard library's `selectors`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from collections.abc import Callable

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import tokencurric.compressors
from benchmarks.peers import LOOPS
from benchmarks.shapes import LLAVA_7B, SMALL, Shape, view_of
from benchmarks.timing import machine, side_by_side
from tokencurric import Compressor, VisualView

KEEP = 1 / 9  # of the visual tokens: 64 of 576


def compressors() -> dict[str, Compressor]:
    """Every exported compressor that can be made without arguments: a new one gets its row by itself."""
    found = vars(tokencurric.compressors).values()
    kinds = [kind for kind in found if isinstance(kind, type) and hasattr(kind, "needs") and hasattr(kind, "tags")]
    return {kind.__name__: kind() for kind in kinds if not getattr(kind, "_is_protocol", False)}


def bytes_read(compressor: Compressor, view: VisualView) -> int:
    """Bytes of the signals that the compressor declares: the least it has to move."""
    return sum(getattr(view, name).nbytes for name in compressor.needs if getattr(view, name) is not None)


def one_layer(shape: Shape) -> Callable[[], object]:
    """The forward of one Llama decoder layer at the same batch, length and width."""
    config = LlamaConfig(
        hidden_size=shape.dim,
        intermediate_size=int(shape.dim * 2.6875),  # 11008 at 4096
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        num_hidden_layers=1,
    )
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0).eval()
    hidden = torch.randn(shape.batch, shape.visual, shape.dim)
    rotary = LlamaRotaryEmbedding(config)(hidden, torch.arange(shape.visual)[None])
    return lambda: layer(hidden, position_embeddings=rotary)


def measure(shape: Shape, *, rounds: int) -> dict[str, dict[str, float]]:
    """All figures at one shape."""
    view, keep = view_of(shape), round(shape.visual * KEEP)
    big = torch.randn(2**24 if shape.batch > 8 else 2**20)
    layer = side_by_side({"layer": one_layer(shape)}, rounds=2, warm_up=0)["layer"].median
    figures: dict[str, dict[str, float]] = {}
    for name, compressor in compressors().items():
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda c=compressor: c(view, keep),
            "read": lambda: torch.linalg.vector_norm(big),
        }
        if name in LOOPS:
            loop = LOOPS[name]
            ways["loop"] = lambda loop=loop: loop(view, keep)
            if (
                compressor.tags.deterministic
                and name != "Uniform"
                and not torch.equal(compressor(view, keep), loop(view, keep))
            ):
                raise SystemExit(f"{name}: the loop keeps other tokens, so the comparison would mean nothing")
        times = side_by_side(ways, rounds=rounds)
        bandwidth = big.nbytes / times["read"].median
        row = {
            "seconds": times["ours"].median,
            "smallest": times["ours"].smallest,
            "largest": times["ours"].largest,
            "selector_share": times["ours"].median / layer,
            "bytes": float(bytes_read(compressor, view)),
            "read_gb_s": bandwidth / 1e9,
        }
        if bytes_read(compressor, view):
            row["vs_bandwidth"] = times["ours"].median * bandwidth / bytes_read(compressor, view)
        if "loop" in times:
            row["loop_seconds"] = times["loop"].median
            row["vs_loop"] = times["ours"].median / times["loop"].median
        figures[name] = row
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--quick", action="store_true", help="a small shape, for a look")
    arguments = parser.parse_args()
    shape = SMALL if arguments.quick else LLAVA_7B
    with torch.no_grad():
        figures = measure(shape, rounds=3 if not arguments.quick else 5)
    print(f"{shape}, keep {round(shape.visual * KEEP)}, float32, {torch.get_num_threads()} threads")
    print(f"{'':10} {'ms':>9} {'min-max':>17} {'vs loop':>8} {'of a layer':>11} {'vs reading once':>16}")
    for name, row in figures.items():
        spread = f"{row['smallest'] * 1e3:.2f}-{row['largest'] * 1e3:.2f}"
        loop = f"{row['vs_loop']:.3f}" if "vs_loop" in row else "-"
        bound = f"{row['vs_bandwidth']:.2f}" if "vs_bandwidth" in row else "-"
        print(f"{name:10} {row['seconds'] * 1e3:9.2f} {spread:>17} {loop:>8} {row['selector_share']:11.5f} {bound:>16}")
    if arguments.json:
        out = {"shape": vars(shape), "machine": machine(), "torch": torch.__version__, "selectors": figures}
        if "DART" in figures:
            out["dart_vs_loop"] = figures["DART"]["vs_loop"]
        arguments.json.write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
