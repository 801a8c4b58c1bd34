"""Scenes: small pictures with something at every place, made from easy-VQA images and annotations.

A single easy-VQA image holds one shape, so a model that sees a tenth of its visual tokens still answers
everything. A scene tiles nine of them, three by three, and asks about places and about the whole: what is asked
decides which patches matter. Train scenes use the package's train images only, test scenes its test images only.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Literal

import easy_vqa
from PIL import Image

Split = Literal["train", "test"]

COLORS = ("green", "red", "gray", "teal", "black", "yellow", "brown", "blue")
SHAPES = ("circle", "rectangle", "triangle")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = (
    *("top-left", "top-center", "top-right"),
    *("middle-left", "center", "middle-right"),
    *("bottom-left", "bottom-center", "bottom-right"),
)
KINDS: Mapping[str, float] = {"color": 0.35, "shape": 0.3, "exists": 0.2, "count": 0.15}
"""Question kinds and how often each is asked."""

MOST_QUESTIONS = 20

TILE = 24
"""Side of a tile in pixels; a scene is three tiles wide and high."""


@dataclass(frozen=True)
class Tile:
    """One easy-VQA image: its number within its split, and what its annotations say about it."""

    image: int
    color: str
    shape: str


@dataclass(frozen=True)
class Question:
    """A question about a scene and its one-word answer."""

    kind: str
    text: str
    answer: str


@cache
def annotated_tiles(split: Split) -> tuple[Tile, ...]:
    """Every image of the split whose questions and answers together fix both its color and its shape.

    An image shows one shape, so "what" questions name an attribute and yes/no questions confirm or exclude some.
    About one image in nine was asked too little to know both; those are left out rather than looked at.
    """
    texts, answers, images = easy_vqa.get_train_questions() if split == "train" else easy_vqa.get_test_questions()
    possible = {image: (set(COLORS), set(SHAPES)) for image in sorted(set(images))}
    for text, answer, image in zip(texts, answers, images, strict=True):
        words = set(re.findall(r"\w+", text))
        for names in possible[image]:
            _exclude(names, words, answer)
    return tuple(
        Tile(image, *colors, *shapes) for image, (colors, shapes) in possible.items() if len(colors) == len(shapes) == 1
    )


def _exclude(names: set[str], words: set[str], answer: str) -> None:
    """Remove from the still possible `names` of an attribute what one question and its answer rule out."""
    attribute = COLORS if names & set(COLORS) else SHAPES
    named = words & set(attribute)
    if answer in attribute:
        names &= {answer}
    elif answer not in ("yes", "no"):
        names &= named or names  # "what is the blue shape?" states its color and asks for the other attribute
    elif named and (answer == "yes") != bool(words & {"no", "not"}):
        names &= named
    else:
        names -= named


@cache
def tile_pictures(split: Split) -> Mapping[int, Image.Image]:
    """The split's images by number, shrunk to `TILE` pixels."""
    paths = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    pictures = {}
    for number, path in paths.items():
        with Image.open(path) as picture:
            pictures[number] = picture.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS)
    return pictures


def draw(tiles: Sequence[Tile], split: Split) -> Image.Image:
    """The picture of a scene: nine tiles in reading order."""
    picture = Image.new("RGB", (3 * TILE, 3 * TILE))
    for place, tile in enumerate(tiles):
        picture.paste(tile_pictures(split)[tile.image], (place % 3 * TILE, place // 3 * TILE))
    return picture


def ask(kind: str, tiles: Sequence[Tile], random: Random) -> Question:
    """Draw a question of a kind about a scene.

    Answers are kept from being guessable: places are uniform, "exists" is yes half of the time, and "count" asks
    mostly for a color that is there.
    """
    place = random.randrange(9)
    if kind == "color":
        return Question(kind, f"What color is the {PLACES[place]} shape?", tiles[place].color)
    if kind == "shape":
        return Question(kind, f"What shape is at the {PLACES[place]}?", tiles[place].shape)
    numbers = {color: sum(tile.color == color for tile in tiles) for color in COLORS}
    if kind == "exists":
        there = random.random() < 0.5
        fitting = [color for color, number in numbers.items() if (number > 0) == there]
        color = random.choice(fitting or COLORS)  # nothing is missing where all eight colors are
        return Question(kind, f"Is there a {color} shape in the picture?", "yes" if numbers[color] else "no")
    if kind == "count":
        color = random.choice((tiles[place].color, tiles[place].color, random.choice(COLORS)))
        return Question(kind, f"How many {color} shapes are in the picture?", NUMBERS[numbers[color]])
    raise ValueError(f"ask needs one of the kinds {', '.join(KINDS)}; got kind={kind!r}.")


def describe(tiles: Sequence[Tile], where: str, places: Sequence[int]) -> Question:
    """Ask for the color and shape of every tile at the places."""
    answer = " ".join(f"{tiles[place].color} {tiles[place].shape}" for place in places)
    return Question("describe", f"Describe the {where}.", answer)


def draw_scene(split: Split, random: Random) -> tuple[Tile, ...]:
    """Nine tiles of the split in reading order."""
    return tuple(random.choice(annotated_tiles(split)) for _ in range(9))


def ask_several(
    tiles: Sequence[Tile], count: int, random: Random, *, kinds: Mapping[str, float] = KINDS
) -> list[Question]:
    """Draw `count` different questions about a scene, their kinds in the proportions given."""
    if not 1 <= count <= MOST_QUESTIONS:
        raise ValueError(
            f"ask_several needs from 1 to {MOST_QUESTIONS} questions about a scene; got count={count}. "
            "There are few more that differ. Ask fewer, about more scenes."
        )
    questions: dict[str, Question] = {}
    while len(questions) < count:
        (kind,) = random.choices(tuple(kinds), weights=tuple(kinds.values()))
        question = ask(kind, tiles, random)
        questions.setdefault(question.text, question)
    return list(questions.values())


def write_scenes(
    folder: Path | str,
    *,
    split: Split = "train",
    scenes: int,
    questions: int,
    seed: int = 0,
    kinds: Mapping[str, float] = KINDS,
    described: bool = False,
) -> Path:
    """Write scenes as PNG files and their questions as LLaVA conversations.

    Train rows hold one conversation of `questions` turns a scene, test rows one question each, so there are
    `scenes * questions` of them. Beside LLaVA's keys a row has "kind" (a list, one for each question) and "tiles"
    (image number, color and shape in reading order).

    Args:
        folder: where to write; "images/" and "<split>.json" are made in it.
        split: which of easy-VQA's images to use.
        scenes: how many pictures.
        questions: how many different questions about each.
        seed: the same seed writes the same files.
        kinds: how often each kind of question is asked.
        described: whether a train conversation ends with one more turn, which describes all tiles in reading order.
            It comes last, as the questions could be answered from it without the picture.

    Returns:
        The path of the JSON file; its "image" entries are relative to `folder / "images"`.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(scenes):
        random = Random(f"{split} {seed} {number}")
        tiles = draw_scene(split, random)
        image = f"{split}-{number:05d}.png"
        draw(tiles, split).save(folder / "images" / image)
        asked = ask_several(tiles, questions, random, kinds=kinds)
        description = [describe(tiles, "picture", range(9))] if described else []
        conversations = [asked + description] if split == "train" else [[question] for question in asked]
        rows += [
            {
                "id": f"{split}-{number:05d}-{part}",
                "image": image,
                "conversations": _turns(conversation),
                "kind": [question.kind for question in conversation],
                "tiles": [asdict(tile) for tile in tiles],
            }
            for part, conversation in enumerate(conversations)
        ]
    path = folder / f"{split}.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def _turns(conversation: Sequence[Question]) -> list[dict[str, str]]:
    turns = []
    for turn, question in enumerate(conversation):
        turns.append({"from": "human", "value": ("<image>\n" if turn == 0 else "") + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return turns
