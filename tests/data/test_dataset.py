"""Opening pictures, looking ahead, and squares."""

import pickle
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokencurric.data import (
    MARK,
    Conversation,
    ConversationDataset,
    ConversationFile,
    Sample,
    Turn,
    preflight,
    read_conversations,
)
from tokencurric.data.pictures import open_picture, pad_to_square
from tokencurric.errors import DataError


def file_of(folder: Path, *names: tuple[str, ...]) -> ConversationFile:
    rows = tuple(
        Conversation(index, f"id-{index}", images, (Turn("user", MARK * len(images) + "?"), Turn("assistant", "x")))
        for index, images in enumerate(names)
    )
    return ConversationFile(Path("talk.json"), folder, rows)


def test_items_are_samples_keyed_by_their_row(folder):
    file = file_of(folder, (), ("a.png",), ("a.png", "sub/b.png"))
    data = ConversationDataset(replace(file, rows=file.rows[1:]))
    assert len(data) == 2
    assert [sample.row_key for sample in (data[0], data[1])] == [1, 2]
    assert [image.size for image in data[1].images] == [(16, 16), (32, 16)]
    assert {image.mode for image in data[1].images} == {"RGB"}
    assert data[0].messages[0] == {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    assert pickle.loads(pickle.dumps(data))[0].turns == data[0].turns
    with pytest.raises(IndexError):
        data[2]


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
def test_every_kind_of_picture_opens_as_rgb(tmp_path, mode):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new("RGB", (3, 2), (9, 9, 9)).convert(mode).save(path)
    assert open_picture(path).mode == "RGB"


def spoil(folder: Path) -> ConversationFile:
    """Rows 1 and 3 have pictures that do not open: one cut short, one that is none."""
    whole = folder / "a.png"
    Image.effect_noise((64, 64), 50).save(folder / "noise.png")
    (folder / "cut.png").write_bytes((folder / "noise.png").read_bytes()[:600])
    (folder / "text.png").write_text("no picture")
    assert whole.exists()
    return file_of(folder, ("a.png",), ("cut.png",), (), ("a.png", "text.png"), ("a.png",))


def test_a_picture_that_does_not_open_is_named_with_its_row(folder):
    data = ConversationDataset(spoil(folder))
    assert data[0].row_key == 0
    for index, name in ((1, "cut.png"), (3, "text.png")):
        named = rf"image='{name}' in row {index} \(id 'id-{index}'\).*open_picture needs"
        with pytest.raises(DataError, match=named):
            data[index]


def test_preflight_counts_and_finds_what_would_stop_a_run(folder):
    file = spoil(folder)
    quick, whole = preflight(file), preflight(file, open_images=True)
    assert astuple(whole)[:6] == (5, 1, 10, 5, 5, 3)
    assert quick.problems == ()
    assert [problem.index for problem in whole.problems] == [1, 3]
    assert "2 rows with problems" in str(whole)
    assert "row 3 (id 'id-3'): ConversationDataset needs pictures that open" in str(whole)
    rest = file.without(whole.problems)
    assert preflight(rest, open_images=True).problems == ()
    assert [row.index for row in rest.rows] == [0, 2, 4]
    assert preflight(rest).skipped == whole.problems


def test_pictures_without_a_folder_are_refused(folder):
    file = replace(file_of(folder, ("a.png",)), images=None)
    with pytest.raises(DataError, match=r"image='a.png' in row 0 .*an image folder; got images=None"):
        ConversationDataset(file)[0]


def test_a_path_is_checked_again_when_it_is_opened(write, folder):
    turns = [{"from": "human", "value": MARK}, {"from": "gpt", "value": "x"}]
    path = write({"conversations": turns, "image": "a.png"})
    data = ConversationDataset(read_conversations(path, images=folder))
    assert data[0].images[0].size == (16, 16)
    (folder / "a.png").unlink()
    (folder / "a.png").symlink_to(folder.parent / "secret.png")
    with pytest.raises(DataError, match="symbolic link"):
        data[0]


def test_samples_refuse_what_cannot_be_collated():
    with pytest.raises(DataError, match=r"at least one turn; got turns=\(\) in row 3 \(id 'c'\)"):
        Sample(3, "c", (), ())
    with pytest.raises(DataError, match=r"got 1 mark\(s\) and 0 picture\(s\) in row 3 \(id 'c'\)"):
        Sample(3, "c", (Turn("user", MARK),), ())


@given(st.integers(1, 12), st.integers(1, 12))
def test_a_square_holds_the_whole_picture_in_its_middle(width, height):
    inner = Image.effect_noise((width, height), 90).convert("RGB")
    square = pad_to_square(inner, (0.5, 0.25, 1.0))
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    assert square.size == (side, side)
    assert square.crop((left, top, left + width, top + height)).tobytes() == inner.tobytes()
    around = [
        square.getpixel((x, y))
        for x in range(side)
        for y in range(side)
        if not (left <= x < left + width and top <= y < top + height)
    ]
    assert len(around) == side * side - width * height
    assert set(around) <= {(127, 63, 255)}
