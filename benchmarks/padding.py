"""How much of a batch is padding, in random order and in orders by length, beside the least that any order leaves.

    python benchmarks/padding.py [--json FILE] [--rows N]

Nothing is timed: positions are counted. `padding` is the share of positions that hold no token, at full length and
with 64 of 576 visual tokens kept (in the same order, which knows full lengths only); `mixed` is the share of batches
that hold rows with pictures and text-only rows. The orders: `random`; `length` and `length+kind`, `GroupedSampler`
without and with rows of the two kinds apart, for 8 ranks; `sorted`, all rows by length: the least possible at full
length, and no way to train. `bound` is what pools of sorted rows can leave at most: (batch − 1)·(longest − shortest)
positions each.

The lengths are an ASSUMPTION: parts of about as many rows as LLaVA-1.5's mixture has (arXiv:2310.03744; 665,000
rows, 40,000 of them text-only), each with log-normal text lengths around a round guess of ours, cut at 2,048 tokens.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

# Not the script's folder, where selectors.py hides the standard library's module.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from tokencurric.data import GroupedSampler, RowSizes, padding_share

VISUAL, KEPT, LONGEST, RANKS = 576, 64, 2048, 8


@dataclass(frozen=True)
class Part:
    """Rows of one origin: thousands of them, the median of their text tokens, and the spread of its logarithm."""

    name: str
    thousands: int
    text: int
    spread: float
    pictures: int = 1


MIXTURE = (
    Part("conversation", 58, 350, 0.3),
    Part("detailed description", 23, 170, 0.3),
    Part("complex reasoning", 77, 200, 0.3),
    Part("ShareGPT", 40, 1000, 0.9, pictures=0),
    Part("VQAv2", 83, 130, 0.3),
    Part("GQA", 72, 180, 0.4),
    Part("OKVQA", 9, 70, 0.2),
    Part("OCRVQA", 80, 170, 0.3),
    Part("A-OKVQA", 66, 110, 0.3),
    Part("TextCaps", 22, 80, 0.2),
    Part("RefCOCO", 48, 300, 0.4),
    Part("Visual Genome", 86, 350, 0.4),
)


def draw(rows: int) -> tuple[RowSizes, Tensor]:
    """Sizes of about so many rows, and their lengths once the student has lost visual tokens."""
    g = torch.Generator().manual_seed(0)
    total, tokens, pictures = sum(part.thousands for part in MIXTURE), [], []
    for part in MIXTURE:
        count = round(rows * part.thousands / total)
        text = torch.randn(count, generator=g).mul(part.spread).exp().mul(part.text).long()
        tokens.append((text + VISUAL * part.pictures).clamp(max=LONGEST))
        pictures.append(torch.full((count,), part.pictures))
    full, shown = torch.cat(tokens), torch.cat(pictures)
    sizes = RowSizes(tuple(full.tolist()), tuple(shown.tolist()))
    return sizes, full - (VISUAL - KEPT) * shown


def orders(sizes: RowSizes, batch: int) -> dict[str, Tensor]:
    """Ways to order the rows."""
    tokens, one_kind = torch.tensor(sizes.tokens), RowSizes(sizes.tokens, (1,) * len(sizes))
    return {
        "random": torch.randperm(len(sizes), generator=torch.Generator().manual_seed(1)),
        "length": GroupedSampler(one_kind, batch, together=RANKS).order(),
        "length+kind": GroupedSampler(sizes, batch, together=RANKS).order(),
        "sorted": tokens.argsort(stable=True),
    }


def bound(sizes: RowSizes, batch: int, *, pool: int = 50) -> float:
    """The share of padding that `length+kind` cannot exceed, but for one batch."""
    padding, tokens, text_only = 0, torch.tensor(sizes.tokens), torch.tensor(sizes.text_only)
    for kind in (False, True):
        lengths = tokens[text_only == kind]
        pools = -(-len(lengths) // (pool * RANKS * batch))
        padding += pools * (batch - 1) * int(lengths.max() - lengths.min())
    return padding / (padding + int(tokens.sum()))


def measure(rows: int, batches: tuple[int, ...]) -> dict[str, dict[str, dict[str, float]]]:
    """All figures: batch, order, what."""
    sizes, short = draw(rows)
    full, text_only = torch.tensor(sizes.tokens), torch.tensor(sizes.text_only)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for batch in batches:
        row: dict[str, dict[str, float]] = {}
        for name, order in orders(sizes, batch).items():
            parts = text_only[order].split(batch)
            row[name] = {
                "padding": padding_share(full[order], batch),
                "kept_padding": padding_share(short[order], batch),
                "mixed": sum(bool(part.any() and not part.all()) for part in parts) / len(parts),
            }
        row["bound"] = {"padding": bound(sizes, batch)}
        figures[str(batch)] = row
    return figures


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--rows", type=int, default=665_000, help="of the data set")
    arguments = parser.parse_args()
    figures = measure(arguments.rows, (2, 4, 8, 16, 32))
    print(f"{arguments.rows} rows, {RANKS} ranks; padding at full length, with {KEPT} of {VISUAL} kept, mixed batches")
    for batch, row in figures.items():
        for name, found in row.items():
            rest = f"{found['kept_padding']:8.2%} {found['mixed']:8.2%}" if "mixed" in found else ""
            print(f"batch {batch:>2} {name:12} {found['padding']:8.2%} {rest}")
    if arguments.json:
        assumed = {"mixture": [asdict(part) for part in MIXTURE], "visual": VISUAL, "kept": KEPT, "ranks": RANKS}
        out = {"rows": arguments.rows, "assumed": assumed, "padding": figures}
        arguments.json.write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
