"""What it costs to read attention of one layer: a forward with the tap armed beside the same forward without.

    python benchmarks/tap.py [--json FILE] [--quick] [--rounds N] [--dtype bfloat16]

The ratios to read: `tap_vs_sdpa` (the decoder's forward with the tap over that without), `tap_vs_sdpa_layer` (the same
of the tapped layer alone), `read_share` and `read_share_layer` (what the tap does besides, timed by itself, over the
forward and over the layer: the difference of two large times hides it), `weights_vs_sdpa` (the model asked for its
attention weights, as published methods do: `output_attentions=True`, for which transformers needs eager attention in
all layers), and `eager_vs_sdpa` (that attention without handing the weights out). All are run in turn on the same
hidden states, in one run; ratios are of medians. What the tap reads is checked against eager attention's weights.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Not the script's folder, where selectors.py hides the standard library's module.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.timing import machine, side_by_side
from benchmarks.training_step import QUICK, Shape, make_batch, make_model
from tokencurric.adapters.discovery import attention_of, find_parts, is_visual
from tokencurric.adapters.layout import lay_out
from tokencurric.adapters.tap import AttentionTap, Tapped

LAYER = 1  # FastV and DART read it to compress at layer 2


class Ways:
    """The decoder on random hidden states of a batch, two rows of which differ in length, in all the ways."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.parts = find_parts(make_model(shape).eval().to(dtype))
        batch = make_batch(shape)
        self.mask = batch["attention_mask"]
        self.mask[0, : shape.text // 4] = 0
        self.layout = lay_out(is_visual(batch["input_ids"], self.parts.visual_ids), self.mask)
        g = torch.Generator().manual_seed(2)
        self.hidden = torch.randn(shape.batch, self.layout.length, shape.width, generator=g).to(dtype)
        self.attention = attention_of(self.parts.layers[LAYER])
        self.seen: list[tuple[Any, ...]] = []
        self._note()

    def _note(self) -> None:
        """What the tapped layer and the tap are given in such a forward."""
        layer = self.parts.layers[LAYER]

        def note(module: Any, args: Any, kwargs: Any) -> None:
            self.arguments = (args, kwargs)

        handle = layer.register_forward_pre_hook(note, with_kwargs=True)
        original = AttentionTap.read

        def read(tap: AttentionTap, *given: Any) -> None:
            self.given = given
            original(tap, *given)

        AttentionTap.read = read  # type: ignore[method-assign]
        try:
            self.tapped()
        finally:
            AttentionTap.read = original  # type: ignore[method-assign]
            handle.remove()

    def _use(self, attention: str) -> None:
        self.parts.base.set_attn_implementation(attention)

    def plain(self, **more: Any) -> Any:
        """The forward as it is."""
        return self.parts.decoder(inputs_embeds=self.hidden, attention_mask=self.mask, use_cache=False, **more)

    def arm(self) -> AttentionTap:
        """The tap, on the layer's attention."""
        return AttentionTap(self.attention, self.layout.query, self.layout.real)

    def tapped(self) -> Tapped:
        """The forward with the tap."""
        tap = self.arm()
        self.plain()
        return self._found(tap)

    def read(self) -> Tapped:
        """What the tap does beside the forward."""
        tap = self.arm()
        tap.read(*self.given)
        return self._found(tap)

    def layer(self) -> Any:
        """The layer as it is."""
        args, kwargs = self.arguments
        return self.parts.layers[LAYER](*args, **kwargs)

    def tapped_layer(self) -> Tapped:
        """The layer with the tap."""
        tap = self.arm()
        self.layer()
        return self._found(tap)

    def eager(self, **more: Any) -> Any:
        """The forward with eager attention."""
        self._use("eager")
        try:
            return self.plain(**more)
        finally:
            self._use("sdpa")

    def weights(self) -> Tensor:
        """The row that is wanted, from all attention weights of all layers: as published methods ask for it."""
        attentions = self.eager(output_attentions=True).attentions
        row: Tensor = attentions[LAYER].mean(1)[torch.arange(len(self.hidden)), self.layout.query]
        return row

    def _found(self, tap: AttentionTap) -> Tapped:
        if tap.tapped is None:
            raise SystemExit("the tap did not fire, so the times would mean nothing")
        return tap.tapped


def measure(shape: Shape, *, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """All figures."""
    ways = Ways(shape, dtype)
    theirs = ways.weights().float() * ways.layout.real
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ways.tapped().attention, theirs, rtol=tolerance, atol=tolerance / 100)
    calls: dict[str, Callable[[], object]] = {
        name: getattr(ways, name) for name in ("plain", "tapped", "read", "eager", "weights", "layer", "tapped_layer")
    }
    times = side_by_side(calls, rounds=rounds, warm_up=2)
    seconds = {name: asdict(timing) for name, timing in times.items()}

    def ratio(above: str, below: str) -> float:
        return times[above].median / times[below].median

    return {
        "tap_vs_sdpa": ratio("tapped", "plain"),
        "tap_vs_sdpa_layer": ratio("tapped_layer", "layer"),
        "read_share": ratio("read", "plain"),
        "read_share_layer": ratio("read", "layer"),
        "eager_vs_sdpa": ratio("eager", "plain"),
        "weights_vs_sdpa": ratio("weights", "plain"),
        "seconds": seconds,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--quick", action="store_true", help="a small shape, for a look")
    parser.add_argument("--rounds", type=int, default=31, help="times that each way is timed")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    shape = QUICK if arguments.quick else Shape(layers=8, batch=2)
    with torch.no_grad():
        figures = measure(shape, rounds=arguments.rounds, dtype=getattr(torch, arguments.dtype))
    print(f"{shape}, {arguments.dtype}, {torch.get_num_threads()} threads, {arguments.rounds} rounds")
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"{name:18} {value:.4f}")
    if arguments.json:
        out = {"shape": asdict(shape), "dtype": arguments.dtype, "machine": machine(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps(out | figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
