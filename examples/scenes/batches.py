"""Scenes and what is said about them as tensors: what the pre-training draws instead of files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .architecture import IMAGE_TOKENS
from .data import (
    COLORS,
    KINDS,
    PLACES,
    TILE,
    Question,
    Split,
    Tile,
    annotated_tiles,
    ask,
    ask_several,
    describe,
    tile_pictures,
)

IGNORED = -100
LINES: Mapping[str, tuple[int, ...]] = {
    "top row": (0, 1, 2),
    "middle row": (3, 4, 5),
    "bottom row": (6, 7, 8),
    "left column": (0, 3, 6),
    "middle column": (1, 4, 7),
    "right column": (2, 5, 8),
}


@dataclass(frozen=True)
class Batch:
    """Right-padded conversations: causal attention needs no mask where padding is never supervised."""

    pixels: Tensor
    ids: Tensor
    labels: Tensor


class Scenes:
    """Draws scenes of a split as tensors, if asked with tiles mirrored at random."""

    def __init__(self, split: Split) -> None:
        self.tiles = annotated_tiles(split)
        pictures = tile_pictures(split)
        rows = [torch.frombuffer(bytearray(pictures[t.image].tobytes()), dtype=torch.uint8) for t in self.tiles]
        self.pixels = torch.stack(rows).view(-1, TILE, TILE, 3).permute(0, 3, 1, 2).float() / 127.5 - 1

    def draw(self, count: int, random: Random, *, mirror: bool) -> tuple[list[list[Tile]], Tensor]:
        """`count` scenes: their tiles in reading order and their pixels [count, 3, 72, 72]."""
        chosen = [[random.randrange(len(self.tiles)) for _ in range(9)] for _ in range(count)]
        pixels = self.pixels[torch.tensor(chosen)]
        if mirror:
            flips = torch.tensor([[random.random() < 0.5 for _ in range(9)] for _ in range(count)])
            pixels = torch.where(flips[..., None, None, None], pixels.flip(-1), pixels)
        rows = pixels.view(count, 3, 3, 3, TILE, TILE).permute(0, 3, 1, 4, 2, 5)
        return [[self.tiles[i] for i in scene] for scene in chosen], rows.reshape(count, 3, 3 * TILE, 3 * TILE)


class Writer:
    """Turns conversations into token ids, exactly as the chat template and the processor do."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, remembered: the pieces are few."""
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.known[text]

    def write(self, conversations: Sequence[Sequence[Question]], pixels: Tensor) -> Batch:
        """One row a conversation, answers and end tokens supervised."""
        rows: list[list[int]] = []
        labels: list[list[int]] = []
        for conversation in conversations:
            ids: list[int] = []
            targets: list[int] = []
            for turn, question in enumerate(conversation):
                picture = "<image>" * IMAGE_TOKENS if turn == 0 else ""
                prompt = [
                    *self.encode(f"USER: {picture}"),
                    *self.encode(question.text),
                    *self.encode("ASSISTANT:"),
                ]
                answer = self.encode(f"{question.answer}</s>")
                ids += [*prompt, *answer]
                targets += [*[IGNORED] * len(prompt), *answer]
            rows.append(ids)
            labels.append(targets)
        width = -(-max(map(len, rows)) // 32) * 32  # few shapes: bfloat16 kernels are compiled for each
        padding = self.tokenizer.pad_token_id
        return Batch(
            pixels,
            torch.tensor([row + [padding] * (width - len(row)) for row in rows]),
            torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels]),
        )


def caption(tiles: Sequence[Tile], random: Random) -> list[Question]:
    """The whole picture in reading order; nothing is drawn."""
    return [describe(tiles, "picture", range(9))]


def mixture(tiles: Sequence[Tile], random: Random) -> list[Question]:
    """Captions of places and lines among questions."""
    turns = []
    for _ in range(7):
        kind = random.choice(("place", "line", *KINDS, *KINDS))
        if kind == "place":
            place = random.randrange(9)
            turns.append(describe(tiles, PLACES[place], [place]))
        elif kind == "line":
            line = random.choice(tuple(LINES))
            turns.append(describe(tiles, line, LINES[line]))
        else:
            turns.append(ask(kind, tiles, random))
    return turns


def locate(tiles: Sequence[Tile], random: Random) -> Question:
    """Ask for the places of a color: the reverse of naming the color at a place."""
    color = random.choice((random.choice(tiles).color, random.choice(COLORS)))
    found = [PLACES[place] for place, tile in enumerate(tiles) if tile.color == color]
    return Question("locate", f"Describe the {color} shapes in the picture.", " ".join(found) or "zero")


def search(tiles: Sequence[Tile], random: Random) -> list[Question]:
    """Places of colors among questions, more of those that are learned last."""
    kinds = {"color": 0.15, "shape": 0.3, "exists": 0.15, "count": 0.4}
    turns = [locate(tiles, random) for _ in range(2)] + ask_several(tiles, 6, random, kinds=kinds)
    random.shuffle(turns)  # else a question would never come first, and a single one would get a list of places
    return turns
