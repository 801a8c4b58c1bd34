"""Rows as other tools write them: what is read, what is named, what is refused. Nothing is dropped in silence."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.tiny import build_processor, picture
from tokencurric.data import (
    MARK,
    VICUNA_V1,
    ConversationCollator,
    ConversationDataset,
    EmbeddedImage,
    PromptCollator,
    Turn,
    preflight,
    read_conversations,
)
from tokencurric.data.formats import MEANINGFUL, MEANINGFUL_IN_TURNS, RefusedRow, read_raw
from tokencurric.errors import DataError, RangeError

ASKED, TOLD = Turn("user", f"{MARK}What is it?"), Turn("assistant", "A cat.")
CHAT = [{"role": "user", "content": f"{MARK}What is it?"}, {"role": "assistant", "content": "A cat."}]
LLAVA = [{"from": "human", "value": f"{MARK}What is it?"}, {"from": "gpt", "value": "A cat."}]
TEXT = {"type": "text", "text": "What is it?"}
SAID = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}


def png(shade: int = 10) -> bytes:
    file = io.BytesIO()
    picture(shade).save(file, "PNG")
    return file.getvalue()


def parts(*given: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(given)}, SAID], **rest}


URI = "data:image/png;base64," + base64.b64encode(png()).decode()

# The same row, in the words of each tool.
SAME = {
    "LLaVA": {"id": "x", "image": "a.png", "conversations": LLAVA},
    "ShareGPT, a list of images": {"conversations": LLAVA, "images": ["a.png"]},
    "LLaMA-Factory": {"messages": CHAT, "images": ["a.png"]},
    "LLaMA-Factory, columns that are not used": {
        "conversations": LLAVA,
        "images": ["a.png"],
        "tools": "[]",
        "system": "",
        "videos": [],
    },
    "ms-swift": {"messages": [*CHAT], "images": [{"path": "a.png", "bytes": None}]},
    "ms-swift, pairs": {
        "conversation": [{"human": f"{MARK}What is it?", "assistant": "A cat."}],
        "images": ["a.png"],
        "tools": None,
    },
    "ms-swift, loss": {
        "messages": [CHAT[0], {**CHAT[1], "loss": True}],
        "images": ["a.png"],
    },
    "Hugging Face, the next image": parts({"type": "image"}, TEXT, images=["a.png"]),
    "Hugging Face, a table's nulls": parts(
        {"type": "image", "text": None, "index": 0},
        {**TEXT, "index": None},
        images=[{"path": "a.png", "bytes": None}],
    ),
    "Hugging Face, an image in its part": parts({"type": "image", "path": "a.png"}, TEXT),
    "Hugging Face, url": parts({"type": "image", "url": "a.png"}, TEXT),
    "Qwen-VL": parts({"image": "a.png"}, {"text": "What is it?"}),
    "OpenAI": parts({"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}}, TEXT),
    "both pairs of names": {
        "conversations": [{**turn, "role": None, "content": None} for turn in LLAVA],
        "image": "a.png",
        "messages": None,
    },
}


@pytest.mark.parametrize("form", SAME)
def test_every_form_reads_as_the_same_row(write, folder, form):
    (row,) = (file := read_conversations(write(SAME[form]), images=folder)).rows
    assert (row.turns, row.images) == ((ASKED, TOLD), ("a.png",))
    assert not file.unread


def test_forms_may_be_mixed_in_a_file(write, folder):
    file = read_conversations(write(*SAME.values()), images=folder)
    assert len({(row.turns, row.images) for row in file.rows}) == 1
    assert len(file.rows) == len(SAME)


EMBEDDED = {
    "data URL": parts({"type": "image_url", "image_url": {"url": URI}}, TEXT),
    "data URL among images": {"messages": CHAT, "images": [URI]},
}


@pytest.mark.parametrize("form", EMBEDDED)
def test_images_may_be_inside_the_row(write, form):
    data = ConversationDataset(read_conversations(write(EMBEDDED[form])))
    assert data[0].images[0].getpixel((0, 0)) == picture(10).getpixel((0, 0))
    assert len(str(data.file.rows[0].images[0])) < 50, "errors do not print the bytes"


@pytest.mark.parametrize("broken", ["data:image/png;base64,@@", "data:image/png,abc"])
def test_broken_data_urls_are_refused(write, broken):
    with pytest.raises(DataError, match=r"data: URLs that can be decoded; .* in row 0"):
        read_conversations(write({"messages": CHAT, "images": [broken]}))


def test_bytes_of_tables_are_images():
    for found in (png(), {"bytes": png(), "path": "a.png"}):
        read = read_raw({"messages": CHAT, "images": [found]})
        assert isinstance(read.images[0], EmbeddedImage)
        assert read.images[0].content == png()


def test_parts_may_name_images_by_number():
    row = parts({"type": "image", "index": 1}, TEXT, {"type": "image", "index": 0}, images=["a.png", "b.png"])
    assert read_raw(row).images == ("b.png", "a.png")
    row["messages"][0]["content"][0] = {"type": "image"}
    for bad in (row, parts({"type": "image", "index": 1}, images=["a.png", "b.png"])):
        with pytest.raises(RefusedRow) as caught:
            read_raw(bad)
        assert "index names an image" in caught.value.needs


def test_system_turns_are_read(write):
    words = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    rows = [
        {"conversations": words, "system": "Be brief."},
        {"conversations": [{"from": "system", "value": "Be brief."}, *words]},
        {"messages": [{"role": "system", "content": "Be brief."}, {"from": "user", "value": "Hi"}, words[1]]},
        {"conversations": [{"from": "system", "value": "Be brief."}, *words], "system": "Be brief."},
        {"conversations": words},
    ]
    file = read_conversations(write(*rows))
    assert {row.turns[0] for row in file.rows[:4]} == {Turn("system", "Be brief.")}
    assert preflight(file).systems == 4
    assert "4 rows with a system turn" in str(preflight(file))
    data, processor = ConversationDataset(file), build_processor()
    collate, ask = (make(processor, template=VICUNA_V1) for make in (ConversationCollator, PromptCollator))
    texts = [processor.tokenizer.decode(collate([data[n]])["input_ids"][0]) for n in (0, 4)]
    assert texts[0] == "<s>Be brief. USER: Hi ASSISTANT: Hello</s>"
    assert texts[1].startswith("<s>A chat between")
    assert processor.tokenizer.decode(ask([data[0]]).inputs["input_ids"][0]) == "<s>Be brief. USER: Hi ASSISTANT:"
    assert (collate([data[0]])["labels"] != -100).sum() == (collate([data[4]])["labels"] != -100).sum()


def test_a_system_turn_that_the_template_leaves_out_is_an_error(write):
    row = {"messages": [{"role": "system", "content": "Be brief."}, *CHAT[1:]]}
    sample = ConversationDataset(read_conversations(write(row)))[0]
    deaf = VICUNA_V1.replace("say(messages[0]['content'])", "''")
    strict = VICUNA_V1.replace("say(messages[0]['content'])", "raise_exception('no system role')")
    for template, message in (
        (deaf, "must render system turns; it leaves out that of row 0"),
        (strict, "refuses row 0"),
    ):
        with pytest.raises(DataError, match=message):
            ConversationCollator(build_processor(), template=template)([sample])


def test_a_first_answer_after_a_system_turn_can_be_dropped(write, folder):
    turns = [{"from": "gpt", "value": f"{MARK} unasked"}, *LLAVA]
    row = {"conversations": turns, "system": "Be brief.", "images": ["sub/b.png", "a.png"]}
    file = read_conversations(write(row), images=folder, leading_answer="drop")
    assert [turn.role for turn in file.rows[0].turns] == ["system", "user", "assistant"]
    assert file.rows[0].images == ("a.png",)
    assert file.leading_answers_dropped == 1
    kept = ConversationDataset(read_conversations(write(row), images=folder))[0]
    assert PromptCollator(build_processor(), template=VICUNA_V1, answer="first")([kept]).references == ("A cat.",)


MEANT = {
    "video": "a.mp4",
    "videos": ["a.mp4"],
    "tools": '[{"name": "search"}]',
    "objects": {"ref": ["a dog"], "bbox": [[1, 2, 3, 4]]},
    "rejected": {"from": "gpt", "value": "no"},
    "rejected_response": "no",
    "label": False,
    "weight": 0.5,
    "history": [["a", "b"]],
}


@pytest.mark.parametrize("key", MEANT)
def test_keys_that_carry_meaning_are_refused_unless_named(write, key):
    plain = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert key in MEANINGFUL
    path = write(plain, {**plain, key: MEANT[key]})
    with pytest.raises(DataError, match=rf"are not read; got '{key}' = .* in row 1 .*ignore=\[\"{key}\"\]"):
        read_conversations(path)
    assert [p.index for p in read_conversations(path, on_error="skip").skipped] == [1]
    file = read_conversations(path, ignore=[key])
    assert (len(file.rows), file.unread) == (2, {key: 1})
    assert f"keys not read: {key} (1 rows)" in str(preflight(file))


@pytest.mark.parametrize(
    ("key", "value"), [("loss", False), ("weight", 0), ("tool_calls", [{"id": 1}]), ("reasoning_content", "hm")]
)
def test_keys_of_turns_that_carry_meaning_are_refused_unless_named(write, key, value):
    path = write({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x", key: value}]})
    assert key in MEANINGFUL_IN_TURNS
    with pytest.raises(DataError, match=rf"turns without keys .* got '{key}' = .* in turn 1"):
        read_conversations(path)
    assert read_conversations(path, ignore=[key]).unread == {f"messages[].{key}": 1}


def test_other_keys_are_counted(write):
    words = [{"from": "human", "value": "Hi", "lang": "en"}, {"from": "gpt", "value": "Hello", "lang": "en"}]
    rows = [
        {"conversations": words, "source": "a", "model": "m"},
        {"conversations": words, "source": "b", "model": None},
    ]
    file = read_conversations(write(*rows))
    assert file.unread == {"source": 2, "model": 1, "conversations[].lang": 2}
    report = str(preflight(file.without([])))
    assert "keys not read: conversations[].lang (2 rows), source (2 rows), model (1 rows)" in report
    with pytest.raises(RangeError, match="ignore must be a list"):
        read_conversations(write(*rows), ignore="source")


REFUSED = {
    "parts of a turn that are text or images": parts({"type": "video", "video": "a.mp4"}),
    "parts of text without <image>": parts({"type": "image", "path": "a.png"}, {"type": "text", "text": f"a {MARK}"}),
    "turns under one key": {"messages": CHAT, "conversations": LLAVA},
    "images under one key": {"messages": CHAT, "image": "a.png", "images": ["a.png"]},
    "a system turn in the first place": {"messages": [*CHAT, {"role": "system", "content": "x"}], "images": ["a.png"]},
    "one system turn": {"messages": [{"role": "system", "content": "x"}, *CHAT], "images": ["a.png"], "system": "y"},
    "system to be text": {"messages": CHAT, "images": ["a.png"], "system": ["x"]},
    "turn 0 = from 'tool'": {"messages": [{"role": "tool", "content": "x"}, *CHAT], "images": ["a.png"]},
    "got keys .*'instruction'": {"id": "x", "text": "x", "instruction": ""},
    r"2 mark\(s\) and 1 image": parts({"type": "image"}, {"type": "image"}, images=["a.png"]),
    "image to be a file name": {"messages": CHAT, "images": [{"bytes": None, "path": None}]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(write, folder, message):
    path = write({"id": "good", **SAME["LLaMA-Factory"]}, {"id": "bad"} | REFUSED[message])
    with pytest.raises(DataError, match=message) as caught:
        read_conversations(path, images=folder)
    assert f"in row 1 (id {REFUSED[message].get('id', 'bad')!r}) of {path}" in str(caught.value)
    assert [row.id for row in read_conversations(path, images=folder, on_error="skip").rows] == ["good"]


plain_text = st.text("ab <>", min_size=1, max_size=6).filter(str.strip)


@given(st.lists(plain_text, min_size=1, max_size=4), st.booleans(), st.booleans(), st.none() | plain_text)
def test_speakers_and_keys_are_only_names(texts, first, hugging_face, system):
    names = [("human", "user"), ("gpt", "assistant")][:: 1 if first else -1]
    said = [(names[n % 2][hugging_face], text) for n, text in enumerate(texts)]
    who, what = ("role", "content") if hugging_face else ("from", "value")
    raw = {("messages" if hugging_face else "conversations"): [{who: a, what: b} for a, b in said], "system": system}
    found = read_raw(raw).turns
    assert [text for _, text in found] == [*([system] if system else []), *texts]
    roles = ["user", "assistant"][:: 1 if first else -1]
    assert [role for role, _ in found[bool(system) :]] == [roles[n % 2] for n in range(len(texts))]


def test_absolute_names_and_addresses_are_refused_unless_allowed(write, folder):
    absolute = write({"messages": CHAT, "images": [str(folder / "a.png")]}, name="absolute.json")
    for images in (None, folder):
        with pytest.raises(DataError, match="in row 0"):
            read_conversations(absolute, images=images)
        data = ConversationDataset(read_conversations(absolute, images=images, allow_absolute=True))
        assert data[0].images[0].size == (16, 16)
    gone = write({"messages": CHAT, "images": ["/no/such.png"]}, name="gone.json")
    with pytest.raises(DataError, match="There is no such file"):
        read_conversations(gone, allow_absolute=True)
    climbing = write({"messages": CHAT, "images": ["../secret.png"]}, name="climbing.json")
    with pytest.raises(DataError, match=r"'\.\.' would read files outside"):
        read_conversations(climbing, images=folder, allow_absolute=True)

    address = "https://example.org/a.png"
    for found in (address, "file:///etc/passwd", "HTTP://x/y"):
        path = write({"messages": CHAT, "images": [found]}, name="url.json")
        for images in (None, folder):
            with pytest.raises(DataError, match=r"It is an address, and nothing is fetched.*open_url="):
                read_conversations(path, images=images, allow_absolute=True)
    asked = []
    path = write({"messages": CHAT, "images": [address]}, name="url.json")

    def fetch(url: str) -> bytes:
        asked.append(url)
        return png()

    data = ConversationDataset(read_conversations(path, open_url=fetch))
    assert not asked, "reading fetches nothing"
    assert data[0].images[0].size == (16, 16) and asked == [address]

    def fails(url: str) -> bytes:
        raise TimeoutError("too slow")

    with pytest.raises(DataError, match=r"in row 0 .*must return bytes; it raised TimeoutError"):
        ConversationDataset(read_conversations(path, open_url=fails))[0]


def test_well_formed_rows_of_llava_are_read_as_ever(write, folder):
    """A control: new forms change nothing for old ones."""
    raw = {"id": 7, "image": "a.png", "conversations": LLAVA}
    path = write(raw)
    (row,) = read_conversations(path, images=folder).rows
    assert (row.index, row.id, row.images, row.turns) == (0, "7", ("a.png",), (ASKED, TOLD))
    assert json.loads(Path(path).read_text()) == [raw]
