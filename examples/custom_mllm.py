"""A multimodal model written by hand, trained with EPIC and made to answer: `python examples/custom_mllm.py`.

Nothing here comes from transformers. What tokencurric has to know about the model is the `Adapter` below: its layers,
which tokens are visual, what has an entry for each token, how a mask is handed over. With it `compress`, `EPIC` and
all compressors work as they do on transformers models.

Each of a picture's 64 patches has a colour and a texture. The model is to name the commonest of both. On few patches
that is a guess, unless layers below the cut have seen to it that the rest is not lost: which is what EPIC trains.
"""

import argparse
import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

# Run as a script, this file belongs to no package: the library is found from the folder above `examples`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tokencurric import EPIC, ModelAdapter, Random, compress, tcd

PATCHES, PATCH = 64, 24  # patches a picture, numbers a patch
KINDS = 8  # of colours, and of textures
PAD, PICTURE, ASK, END = 0, 1, 2, 3
WORDS = 4 + 2 * KINDS  # the four above, then a word for each colour and each texture

# The model


class Cache:
    """Keys and values of each layer, from call to call."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.real: Tensor | None = None  # which positions of the sequence so far are no padding

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, new ones last."""
        if layer in self.layers:
            keys, values = (torch.cat(pair, 2) for pair in zip(self.layers[layer], (keys, values), strict=True))
        self.layers[layer] = keys, values
        return keys, values

    def length(self, layer: int) -> int:
        """Tokens whose keys a layer holds."""
        return self.layers[layer][0].shape[2] if layer in self.layers else 0


class Block(nn.Module):
    """Attention with rotary positions, and two linear maps."""

    def __init__(self, number: int, width: int, heads: int) -> None:
        super().__init__()
        self.number, self.heads = number, heads
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.joint, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def queries_keys_values(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> list[Tensor]:
        """[batch heads tokens head_width] each, the first two turned to their positions."""
        batch, tokens, _ = x.shape
        joint = self.joint(self.before(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        cos, sin = turn
        turned = []
        for each in joint[:2]:
            first, second = each.chunk(2, -1)
            turned.append(each * cos + torch.cat((-second, first), -1) * sin)
        return [*turned, joint[2]]

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], sees: Bool[Tensor, "batch 1 query key"], cache: Cache | None
    ) -> Tensor:
        """The tokens, having looked at each other."""
        queries, keys, values = self.queries_keys_values(x, turn)
        if cache is not None:
            keys, values = cache.extend(self.number, keys, values)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=sees)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        added: Tensor = self.down(functional.gelu(self.up(self.between(x))))
        return x + added


class HandwrittenMLLM(nn.Module):
    """Words and patches of pictures in one sequence."""

    speeds: Tensor

    def __init__(self, width: int = 64, depth: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH, width)
        self.words = nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList(Block(number, width, heads) for number in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, WORDS, bias=False)
        self.register_buffer("speeds", 100.0 ** -torch.linspace(0, 1, width // heads // 2), persistent=False)

    def forward(
        self,
        ids: Int[Tensor, "batch tokens"],
        pictures: Float[Tensor, "picture patches numbers"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch tokens words"]:
        """Logits of the word after each token. `ids` hold PICTURE for each patch, and PAD before shorter rows."""
        x = self.words(ids)
        if pictures is not None:
            x = x.masked_scatter((ids == PICTURE)[..., None], self.patches(pictures))
        real = ids != PAD
        if cache is not None:
            real = cache.real = real if cache.real is None else torch.cat((cache.real, real), 1)
        key = torch.arange(real.shape[1], device=ids.device)
        position = key[-ids.shape[1] :]
        angle = (position[:, None] * self.speeds).repeat(1, 2)[None, None]  # [1 1 tokens head_width]
        sees = (key <= position[:, None]) & real[:, None, None, :]
        sees = sees | (key == position[:, None])  # padding sees itself, so that its softmax is not empty
        for block in self.blocks:
            x = block(x, (angle.cos(), angle.sin()), sees, cache)
        logits: Tensor = self.head(self.norm(x))
        return logits


@torch.no_grad()
def answer(model: HandwrittenMLLM, ids: Tensor, pictures: Tensor, words: int) -> Int[Tensor, "batch words"]:
    """The `words` likeliest words, one after the other."""
    cache, said = Cache(), []
    logits = model(ids, pictures, cache=cache)
    for _ in range(words):
        said.append(logits[:, -1].argmax(-1))
        logits = model(said[-1][:, None], cache=cache)
    return torch.stack(said, 1)


# What tokencurric has to know about it


class Adapter(ModelAdapter):
    """The parts of a `HandwrittenMLLM`."""

    aligned: ClassVar[Mapping[str, int]] = {"turn": -2}  # cosines and sines have an entry for each token

    def __init__(self, model: HandwrittenMLLM) -> None:
        self.model, self.layers, self.norm, self.head = model, model.blocks, model.norm, model.head

    def visual_mask(self, inputs: Mapping[str, Any]) -> Bool[Tensor, "batch seq"]:
        """Placeholders of patches."""
        mask: Tensor = inputs["ids"] == PICTURE
        return mask

    def padding_mask(self, inputs: Mapping[str, Any]) -> Bool[Tensor, "batch seq"]:
        """All that is no padding."""
        mask: Tensor = inputs["ids"] != PAD
        return mask

    def token_ids(self, inputs: Mapping[str, Any]) -> Int[Tensor, "batch seq"]:
        """For compressors that draw."""
        ids: Tensor = inputs["ids"]
        return ids

    def mask_arguments(
        self, sees: Bool[Tensor, "batch 1 query key"], hidden: Tensor, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """Blocks take the mask as it is."""
        return {"sees": sees}

    def query_and_keys(self, layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """For compressors that rank tokens by attention or keys."""
        queries, keys, _ = layer.queries_keys_values(hidden, arguments["turn"])
        return queries, keys

    def cache(self, inputs: Mapping[str, Any]) -> Cache | None:
        """So that answers after a compressed prompt know what the cache holds."""
        return inputs.get("cache")

    def cached(self, cache: Cache, layer: int) -> int:
        """Its length."""
        return cache.length(layer)


# Pictures, training, answers


def batch_of(size: int, seed: int) -> dict[str, Tensor]:
    """Rows of a picture, a question and an answer; every second row has one more word in front, so lengths differ."""
    generator = torch.Generator().manual_seed(seed)
    pictures, said = torch.randn(size, PATCHES, PATCH, generator=generator), []
    for first in (0, KINDS):
        commonest = torch.randint(KINDS, (size, 1), generator=generator)
        any_of_them = torch.randint(KINDS, (size, PATCHES), generator=generator)
        shown = torch.where(torch.rand(size, PATCHES, generator=generator) < 0.2, commonest, any_of_them)
        pictures[..., first : first + KINDS] += 3.0 * functional.one_hot(shown, KINDS)
        said.append(4 + first + commonest)
    front = torch.where(torch.arange(size) % 2 == 0, PAD, ASK)[:, None]
    ids = torch.cat((front, torch.full((size, PATCHES), PICTURE), torch.full((size, 1), ASK)), 1)
    answers = torch.cat((*said, torch.full_like(said[0], END)), 1)
    labels = torch.cat((torch.full_like(ids, -100), answers), 1)
    return {"ids": torch.cat((ids, answers), 1), "pictures": pictures, "labels": labels}


def train(model: HandwrittenMLLM, objective: EPIC, steps: int, *, compressed: bool, seed: int = 0) -> None:
    """Minimise the objective, or, uncompressed, the plain cross-entropy."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        batch = batch_of(32, seed=seed * 1_000_003 + step)
        out = objective(model, batch, step, steps) if compressed else objective.uncompressed(model, batch)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    objective.detach()


def right_answers(model: HandwrittenMLLM, keep: int, questions: int) -> float:
    """Share of pictures whose colour and texture are both named right on `keep` visual tokens."""
    batch = batch_of(questions, seed=2**31)
    words = batch["labels"][:, -3:]
    with compress(model, Random(), keep=keep, layer=2, adapter=Adapter, row_key=torch.arange(questions)):
        said = answer(model, batch["ids"][:, :-3], batch["pictures"], 2)
    return float((said == words[:, :2]).all(1).float().mean())


def main() -> None:
    """Train plainly, go on with EPIC and, for comparison, without; ask both on fewer and fewer tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    parser.add_argument("--questions", type=int, default=400)
    chosen = parser.parse_args()
    budgets = [PATCHES, 16, 8, 4, 2, 1]
    print("right answers, visual tokens kept:" + "".join(f"{keep:>8}" for keep in budgets))
    torch.manual_seed(0)
    base = HandwrittenMLLM()
    train(base, EPIC(Random(), tcd(), adapter=Adapter), chosen.steps, compressed=False)
    for name in ("base", "plain", "epic"):
        model = copy.deepcopy(base)
        if name != "base":
            objective = EPIC(Random(), tcd(), adapter=Adapter)
            train(model, objective, chosen.steps, compressed=name == "epic", seed=1)
        shares = [right_answers(model, keep, chosen.questions) for keep in budgets]
        print(f"{name:<34}" + "".join(f"{share:>8.1%}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
