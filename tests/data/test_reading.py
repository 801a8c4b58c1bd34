"""What is read, what is refused, and what is counted."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencurric.data import MARK, ConversationFile, Problem, Turn, read_conversations
from tokencurric.data.paths import locate_image
from tokencurric.data.rows import parse_row
from tokencurric.errors import DataError, RangeError

ASK = {"from": "human", "value": "what?"}
TELL = {"from": "gpt", "value": "that"}


def row(*turns: Any, **rest: Any) -> dict[str, Any]:
    return {"id": "r", "conversations": list(turns or (ASK, TELL)), **rest}


def shows(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def test_all_shapes_of_rows_are_read(write, folder):
    path = write(
        row(id="one", shows=1),
        row(shows(f"{MARK}\nwhat?"), TELL, id=7, image="a.png", model="ignored"),
        row(shows(f"what?\n{MARK}"), TELL, image="sub/b.png"),
        row(shows(f"{MARK}{MARK} same?"), TELL, ASK, TELL, image=["a.png", "sub/b.png"]),
        row(TELL, ASK, TELL, image=None),
        {"conversations": [ASK, TELL, ASK]},
    )
    file = read_conversations(path, images=folder)
    assert [r.index for r in file.rows] == list(range(6))
    assert [r.id for r in file.rows] == ["one", "7", "r", "r", "r", "5"]
    assert [r.images for r in file.rows] == [(), ("a.png",), ("sub/b.png",), ("a.png", "sub/b.png"), (), ()]
    assert [r.answers for r in file.rows] == [1, 1, 1, 2, 2, 1]
    assert file.rows[4].turns[0] == Turn("assistant", "that")
    assert file.skipped == ()
    assert file.leading_answers_dropped == 0


def test_leading_answers_are_dropped_on_request_and_counted(write):
    path = write(row(TELL, ASK, TELL), row())
    kept, dropped = (read_conversations(path, leading_answer=how) for how in ("keep", "drop"))
    assert [len(r.turns) for r in kept.rows] == [3, 2]
    assert [len(r.turns) for r in dropped.rows] == [2, 2]
    assert (kept.leading_answers_dropped, dropped.leading_answers_dropped) == (0, 1)


BAD = {
    "a JSON object a row": [1, 2],
    "an id that is text": row(id=1.5),
    "image to be a file name": row(image=3),
    "a file name or a list": row(image=["a.png", None]),
    "a non-empty list under 'conversations'": {"id": "r"},
    "got list": {"id": "r", "conversations": []},
    "turns with 'from' and a text 'value'": row(ASK, {"from": "gpt", "value": None}),
    r"turn 1 = from 'bot'": row(ASK, {"from": "bot", "value": "x"}),
    "turns that say something": row(ASK, {"from": "gpt", "value": " \n"}),
    "text that UTF-8 can hold": row(ASK, {"from": "gpt", "value": "\ud83d"}),
    r"two user turns in a row \(turn 0 and 1": row(ASK, ASK, TELL),
    "at least one gpt turn": row(ASK),
    r"1 mark\(s\) and 0 image": row(shows(MARK), TELL),
    r"0 mark\(s\) and 1 image": row(image="a.png"),
    r"1 mark\(s\) and 2 image": row(shows(MARK), TELL, image=["a.png", "a.png"]),
    "no such file": row(shows(MARK), TELL, image="gone.png"),
    "inside the folder": row(shows(MARK), TELL, image="../secret.png"),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_row_is_refused_by_name_or_skipped_and_counted(write, folder, message):
    good = row(shows(f"{MARK}?"), TELL, image="a.png")
    path = write(good, BAD[message], good)
    with pytest.raises(DataError, match=message) as caught:
        read_conversations(path, images=folder)
    assert "in row 1 (id " in str(caught.value)
    assert 'on_error="skip"' in str(caught.value)
    file = read_conversations(path, images=folder, on_error="skip")
    assert [r.index for r in file.rows] == [0, 2]
    assert [problem.index for problem in file.skipped] == [1]
    assert file.skipped[0].reason == str(caught.value)


def test_pictures_need_a_folder(write, folder):
    path = write(row(shows(MARK), TELL, image="a.png"))
    with pytest.raises(DataError, match="an image folder for rows with pictures"):
        read_conversations(path)
    with pytest.raises(DataError, match="images to be a folder"):
        read_conversations(path, images=folder / "a.png")
    assert len(read_conversations(path, images=folder).rows) == 1


def test_lines_are_rows_and_a_broken_line_can_be_skipped(tmp_path):
    path = tmp_path / "talk.jsonl"
    text = json.dumps(row(ASK, {"from": "gpt", "value": "one\u2028line"}), ensure_ascii=False)
    path.write_text(f"\ufeff{text}\n\n{{broken\n{json.dumps(row(id='last'))}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"one JSON object a line; got broken JSON .* in row 1"):
        read_conversations(path)
    file = read_conversations(path, on_error="skip")
    assert [(r.index, r.id) for r in file.rows] == [(0, "r"), (2, "last")]
    assert file.rows[0].turns[1].text == "one\u2028line"
    assert [problem.id for problem in file.skipped] == ["1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a readable JSON file"),
        (b"[", "a readable JSON file"),
        (b'["\xff"]', "a readable JSON file"),
        (b"{}", "a JSON list of rows; got dict"),
        (b"[]", "at least one usable row; got 0 bad"),
        (b"[1]", "at least one usable row; got 1 bad.*first was refused so: .*JSON object"),
    ],
)
def test_a_file_without_rows_is_refused(tmp_path, content, message):
    path = tmp_path / "talk.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_conversations(path, on_error="skip")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("option", ["on_error", "leading_answer"])
def test_unknown_options_are_refused(write, option):
    with pytest.raises(RangeError, match=f"{option} out of"):
        read_conversations(write(row()), **{option: "ignore"})


OUTSIDE = ["../secret.png", "sub/../../secret.png", "..", "sub/..", "a\0.png"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_leave_the_folder_are_refused(folder, name):
    for follow_links in (False, True):
        with pytest.raises(DataError, match="inside the folder"):
            locate_image(folder, name, follow_links=follow_links)


def test_an_absolute_name_is_refused_even_inside(folder):
    with pytest.raises(DataError, match="An absolute name"):
        locate_image(folder, str(folder / "a.png"))
    assert locate_image(folder, "a.png") == (folder / "a.png").resolve()


@pytest.mark.parametrize("link", ["file", "folder"])
def test_links_out_of_the_folder_are_refused_unless_they_are_your_own(folder, link):
    target = folder.parent / "secret.png" if link == "file" else folder.parent
    (folder / "link").symlink_to(target)
    name = "link" if link == "file" else "link/secret.png"
    with pytest.raises(DataError, match="symbolic link leads"):
        locate_image(folder, name)
    assert locate_image(folder, name, follow_links=True).samefile(folder.parent / "secret.png")


def test_links_that_stay_inside_are_fine(folder):
    (folder / "link.png").symlink_to(folder / "a.png")
    (folder.parent / "alias").symlink_to(folder)
    assert locate_image(folder.parent / "alias", "link.png") == (folder / "a.png").resolve()


@pytest.mark.parametrize("name", ["", "sub", "gone.png", "\ud800.png", "x" * 5000])
def test_names_without_a_file_are_refused(folder, name):
    with pytest.raises(DataError, match="an existing image file"):
        locate_image(folder, name)


@given(parts=st.lists(st.sampled_from(["..", ".", "sub", "a.png", "", "/", "secret.png", "images"]), max_size=6))
def test_no_name_reaches_a_file_outside(tmp_path_factory, parts):
    root = tmp_path_factory.getbasetemp() / "walk"
    for path in (root / "images" / "sub" / "a.png", root / "images" / "a.png", root / "secret.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    name = "/".join(parts)
    try:
        found = locate_image(root / "images", name)
    except DataError:
        return
    assert os.path.commonpath([found, (root / "images").resolve()]) == str((root / "images").resolve())


@given(st.lists(st.sampled_from(["human", "gpt"]), min_size=1, max_size=5))
def test_turns_are_taken_exactly_when_they_alternate_and_answer(speakers):
    raw = row(*({"from": speaker, "value": "x"} for speaker in speakers))
    sound = "gpt" in speakers and all(a != b for a, b in pairwise(speakers))
    if sound:
        assert len(parse_row(0, raw)[0].turns) == len(speakers)
    else:
        with pytest.raises(DataError):
            parse_row(0, raw)


@given(st.lists(st.sampled_from([MARK, "a", " ", "\n", "<", "image>"]), min_size=1))
def test_parts_spell_the_turn(pieces):
    turn = Turn("user", "".join(pieces))
    parts = turn.message["content"]
    assert "".join(part.get("text", MARK) for part in parts) == turn.text
    assert sum(part["type"] == "image" for part in parts) == turn.marks
    assert all(part.get("text") != "" for part in parts)


def test_without_moves_rows_to_skipped():
    rows = tuple(parse_row(n, row(id=n))[0] for n in range(4))
    file = ConversationFile(Path("talk.json"), None, rows, skipped=(Problem(9, "9", "early"),))
    less = file.without([Problem(2, "2", "late"), Problem(0, "0", "late"), Problem(77, "77", "not in the file")])
    assert [r.index for r in less.rows] == [1, 3]
    assert [problem.index for problem in less.skipped] == [9, 0, 2]
    assert file.without([]) == file


def test_reading_needs_neither_transformers_nor_pillow(write):
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['PIL'] = None\n"
        "from tokencurric.data import ConversationDataset, preflight, read_conversations\n"
        f"file = read_conversations({str(write(row()))!r})\n"
        "print(preflight(file).rows, ConversationDataset(file)[0].id)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "r"]
