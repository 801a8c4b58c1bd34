"""The embedded data says what easy-VQA says, and the base model reads it through the ordinary classes."""

import json
from collections import Counter
from pathlib import Path
from random import Random

import easy_vqa
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from examples.scenes import data

BASE = Path(data.__file__).parent / "base"
SPLITS: tuple[data.Split, ...] = ("train", "test")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(BASE).eval()


@pytest.fixture(scope="module")
def test_rows(tmp_path_factory):
    path = data.write_scenes(tmp_path_factory.mktemp("scenes"), split="test", scenes=25, questions=4, seed=3)
    return path.parent / "images", json.loads(path.read_text())


@pytest.mark.parametrize("split", SPLITS)
def test_attributes_answer_every_question_of_the_package(split):
    questions = easy_vqa.get_train_questions() if split == "train" else easy_vqa.get_test_questions()
    known = {tile.image: tile for tile in data.annotated_tiles(split)}
    checked: Counter[bool] = Counter()
    for text, answer, image in zip(*questions, strict=True):
        tile = known.get(image)
        if tile is None:
            continue
        words = text.rstrip("?").split()
        if answer in ("yes", "no"):
            named = (set(words) & {*data.COLORS, *data.SHAPES}).pop()
            there = named in (tile.color, tile.shape)
            assert (there != bool({"no", "not"} & set(words))) == (answer == "yes"), (text, tile)
            checked[there] += 1
        else:
            assert answer in (tile.color, tile.shape), (text, tile)
    assert len(known) > 0.85 * len(set(questions[2]))
    assert min(checked[True], checked[False]) > 1000


def test_pictures_are_the_tiles_in_reading_order():
    tiles = data.draw_scene("test", Random(0))
    picture = data.draw(tiles, "test")
    pictures = data.tile_pictures("test")
    for place, tile in enumerate(tiles):
        left, top = place % 3 * data.TILE, place // 3 * data.TILE
        cut = picture.crop((left, top, left + data.TILE, top + data.TILE))
        assert cut.tobytes() == pictures[tile.image].tobytes()
    assert len({pictures[tile.image].tobytes() for tile in tiles}) > 1


def truth(text: str, tiles: tuple[data.Tile, ...]) -> str:
    """Answer a question by reading its words, independently of how it was made."""
    words = text.rstrip("?").split()
    place = next((data.PLACES.index(word) for word in words if word in data.PLACES), None)
    if place is not None:
        return tiles[place].color if words[1] == "color" else tiles[place].shape
    number = [tile.color for tile in tiles].count(next(word for word in words if word in data.COLORS))
    return ("yes" if number else "no") if words[0] == "Is" else data.NUMBERS[number]


@pytest.mark.parametrize("kind", data.KINDS)
def test_answers_are_true_and_not_guessable(kind):
    random = Random(1)
    answers: Counter[str] = Counter()
    for _ in range(2000):
        tiles = data.draw_scene("train", random)
        question = data.ask(kind, tiles, random)
        assert question.answer == truth(question.text, tiles), question
        answers[question.answer] += 1
    assert answers.most_common(1)[0][1] < 2000 * 0.56


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="one of the kinds color, shape, exists, count; got kind='size'"):
        data.ask("size", data.draw_scene("test", Random(0)), Random(0))


@pytest.mark.parametrize("count", [0, 21])
def test_more_questions_than_differ_are_refused(count):
    with pytest.raises(ValueError, match=f"from 1 to 20 questions about a scene; got count={count}"):
        data.ask_several(data.draw_scene("test", Random(0)), count, Random(0))


def test_the_same_seed_writes_the_same_files(tmp_path):
    def written(folder: str, seed: int) -> dict[str, bytes]:
        data.write_scenes(tmp_path / folder, split="train", scenes=3, questions=5, seed=seed)
        return {str(p.relative_to(tmp_path / folder)): p.read_bytes() for p in sorted((tmp_path / folder).rglob("*.*"))}

    first = written("first", 0)
    assert first == written("again", 0)
    assert first != written("other", 1)
    rows = json.loads(first["train.json"])
    assert [len(row["conversations"]) for row in rows] == [10, 10, 10]
    assert all([turn["value"].count("<image>") for turn in row["conversations"]] == [1] + [0] * 9 for row in rows)


def test_a_description_names_all_tiles_in_the_last_turn(tmp_path):
    path = data.write_scenes(tmp_path, split="train", scenes=2, questions=3, described=True)
    for row in json.loads(path.read_text()):
        assert row["kind"][-1] == "describe"
        assert row["conversations"][-2]["value"] == "Describe the picture."
        names = [name for tile in row["tiles"] for name in (tile["color"], tile["shape"])]
        assert row["conversations"][-1]["value"].split() == names
        assert not any("Describe" in turn["value"] for turn in row["conversations"][:-2])


def test_test_rows_hold_one_question_each(test_rows):
    images, rows = test_rows
    assert len(rows) == 100
    assert len({row["id"] for row in rows}) == 100
    assert all(len(row["conversations"]) == 2 and len(row["kind"]) == 1 and len(row["tiles"]) == 9 for row in rows)
    assert all((images / row["image"]).exists() for row in rows)


def test_every_word_has_a_token_and_the_picture_144(processor):
    for split in SPLITS:
        random = Random(2)
        for _ in range(200):
            for question in data.ask_several(data.draw_scene(split, random), 5, random):
                ids = processor.tokenizer(f"{question.text} {question.answer}")["input_ids"]
                assert processor.tokenizer.unk_token_id not in ids
    assert processor.tokenizer("penguin")["input_ids"] == [processor.tokenizer.unk_token_id]
    conversation = [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert text == "USER: What?<image>\n ASSISTANT:"
    ids = processor(text=text, images=Image.new("RGB", (72, 72)))["input_ids"][0]
    assert ids.count(processor.image_token_id) == 144


def test_template_marks_answers_and_end_tokens_as_generated(processor):
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "Is there a circle in the top row?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": "What color is the center shape?"},
        {"role": "assistant", "content": "red"},
    ]
    out = processor.tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    tokens = processor.tokenizer.convert_ids_to_tokens(out["input_ids"])
    marked = [token for token, mark in zip(tokens, out["assistant_masks"], strict=True) if mark]
    assert marked == ["yes", "</s>", "red", "</s>"]
    assert tokens[-4:] == ["?", "ASSISTANT:", "red", "</s>"]


def test_base_answers_in_left_padded_batches(model, processor, test_rows):
    images, rows = test_rows
    questions = [row["conversations"][0]["value"].removeprefix("<image>\n") for row in rows]
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in questions
    ]
    pictures = []
    for row in rows:
        with Image.open(images / row["image"]) as picture:
            pictures.append(picture.convert("RGB"))
    inputs = processor(text=prompts, images=pictures, padding=True, return_tensors="pt")
    assert (inputs["attention_mask"][:, 0] == 0).any()
    width = inputs["input_ids"].shape[1]
    answers = [row["conversations"][1]["value"] for row in rows]

    def share(pixels):
        with torch.no_grad():
            ids = model.generate(**{**inputs, "pixel_values": pixels}, max_new_tokens=4, do_sample=False)
        given = processor.batch_decode(ids[:, width:], skip_special_tokens=True)
        return sum(one == other for one, other in zip(given, answers, strict=True)) / len(answers)

    assert share(inputs["pixel_values"]) > 0.85
    assert share(inputs["pixel_values"].flip(0)) < 0.6


def test_base_is_a_small_real_llava(model):
    assert isinstance(model, LlavaForConditionalGeneration)
    assert model.config.image_seq_length == 144
    assert len(model.model.language_model.layers) >= 6
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 8e6
