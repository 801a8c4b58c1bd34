"""Make the base model of the example from nothing: `python examples/scenes/pretrain.py --output DIR`.

Four stages, because questions alone teach a decoder this small nothing:

1. tower: it learns to name the color and shape of the nine tiles through a throw-away head;
2. captions: the decoder learns to read all tiles out in reading order;
3. mixture: places get their meaning from captions of single tiles, rows and columns, among questions;
4. search: "is there" and "how many" come from naming the places of a color; the rate goes to zero.

No visual token is ever dropped. Set OMP_WAIT_POLICY=PASSIVE on a machine that does something else as well.
"""

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

# Run as a script, this file belongs to no package: its neighbours are found from the folder above `examples`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.scenes.architecture import TOWER_WIDTH, build_model, build_processor, build_tokenizer
from examples.scenes.batches import IGNORED, Batch, Scenes, Writer, caption, mixture, search
from examples.scenes.data import COLORS, KINDS, SHAPES, Question, Tile, ask_several

BATCH = 32
RATE = 2e-3
WARMUP = 50
SAVE_EVERY = 200


class TileNamer(nn.Module):
    """Throw-away head: color and shape of each tile from the mean of its sixteen patch features."""

    def __init__(self, tower: nn.Module, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.name = nn.Linear(width, len(COLORS) + len(SHAPES))

    def forward(self, pixels: Tensor, tiles: Sequence[Sequence[Tile]]) -> Tensor:
        """Mean cross-entropy of color plus that of shape."""
        patches = self.tower(pixels).last_hidden_state[:, 1:]
        side = math.isqrt(patches.shape[1]) // 3
        pooled = patches.view(len(pixels), 3, side, 3, side, -1).mean(dim=(2, 4)).flatten(0, 2)
        color, shape = self.name(pooled).float().split((len(COLORS), len(SHAPES)), dim=-1)
        flat = [tile for scene in tiles for tile in scene]
        colors = torch.tensor([COLORS.index(tile.color) for tile in flat])
        shapes = torch.tensor([SHAPES.index(tile.shape) for tile in flat])
        return nn.functional.cross_entropy(color, colors) + nn.functional.cross_entropy(shape, shapes)


def language_loss(model: LlavaForConditionalGeneration, batch: Batch) -> Tensor:
    """Mean cross-entropy of the supervised tokens."""
    logits = model(input_ids=batch.ids, pixel_values=batch.pixels, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def optimizers(module: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, heads, norms and biases."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        (matrices if ".layers." in name and parameter.ndim == 2 else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def fit(
    module: nn.Module,
    loss: Callable[[], Tensor],
    *,
    name: str,
    steps: int,
    decay: bool,
    save: Callable[[], None] | None = None,
) -> None:
    """Minimise a loss that draws its own batches, forward passes in bfloat16.

    The rate rises for `WARMUP` steps, then stays, or falls to zero along a cosine. `save` runs every `SAVE_EVERY`
    steps and at the end.
    """
    used = optimizers(module)
    begun, total = time.time(), 0.0
    module.train()
    for step in range(steps):
        rate = RATE * min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps) if decay else 1.0)
        for optimizer in used:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in used:
            optimizer.step()
            optimizer.zero_grad()
        total += value.item()
        if (step + 1) % 100 == 0:
            print(f"{name} {step + 1}/{steps}: loss {total / 100:.4f}, {time.time() - begun:.0f} s", flush=True)
            total = 0.0
        if save is not None and ((step + 1) % SAVE_EVERY == 0 or step + 1 == steps):
            save()
            module.train()


@torch.no_grad()
def accuracy(
    model: LlavaForConditionalGeneration, writer: Writer, *, scenes: int, seed: int, blind: bool = False
) -> dict[str, float]:
    """Share of test questions whose greedy answer, end token included, is right: by kind and over all.

    Blind replaces every picture by a gray one.
    """
    model.train(False)
    random = Random(f"test {seed}")
    source = Scenes("test")
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for _ in range(scenes // 50):
        tiles, pixels = source.draw(50, random, mirror=False)
        asked = [question for scene in tiles for question in ask_several(scene, 4, random)]
        batch = writer.write([[question] for question in asked], pixels.repeat_interleave(4, dim=0) * (not blind))
        predicted = model(input_ids=batch.ids, pixel_values=batch.pixels, use_cache=False).logits.argmax(-1)
        targets = batch.labels[:, 1:]
        hits = ((predicted[:, :-1] == targets) | (targets == IGNORED)).all(dim=1).tolist()
        total.update(question.kind for question in asked)
        right.update(question.kind for question, hit in zip(asked, hits, strict=True) if hit)
    return {kind: right[kind] / total[kind] for kind in KINDS} | {"all": right.total() / total.total()}


def main() -> None:
    """Run the stages, saving the model on the way and at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to save the model in")
    parser.add_argument("--steps", type=int, nargs=4, default=(700, 400, 1200, 1000), help="steps of the four stages")
    parser.add_argument(
        "--start", type=Path, help="a saved model to go on from, with 0 for the stages it has behind it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    model = build_model(tokenizer, seed=options.seed)
    if options.start is not None:
        model.load_state_dict(LlavaForConditionalGeneration.from_pretrained(options.start).state_dict())
    model.set_attn_implementation("eager")  # in bfloat16 on a CPU the fastest for sequences this short
    writer, source, random = Writer(tokenizer), Scenes("train"), Random(f"train {options.seed}")
    namer = TileNamer(model.model.vision_tower, TOWER_WIDTH)

    def named() -> Tensor:
        tiles, pixels = source.draw(BATCH, random, mirror=True)
        loss: Tensor = namer(pixels, tiles)
        return loss

    def talk(about: Callable[[Sequence[Tile], Random], list[Question]]) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            tiles, pixels = source.draw(BATCH, random, mirror=True)
            return language_loss(model, writer.write([about(scene, random) for scene in tiles], pixels))

        return loss

    def save() -> None:
        model.set_attn_implementation("sdpa")
        model.save_pretrained(options.output)
        processor.save_pretrained(options.output)
        for blind in (False, True):
            shares = accuracy(model, writer, scenes=300, seed=options.seed, blind=blind)
            print(
                "test", "blind" if blind else "", {kind: round(share, 3) for kind, share in shares.items()}, flush=True
            )
        model.set_attn_implementation("eager")

    tower, captions, mixed, searched = options.steps
    fit(namer, named, name="tower", steps=tower, decay=True)
    fit(model, talk(caption), name="captions", steps=captions, decay=False, save=save)
    fit(model, talk(mixture), name="mixture", steps=mixed, decay=False, save=save)
    fit(model, talk(search), name="search", steps=searched, decay=True, save=save)


if __name__ == "__main__":
    main()
