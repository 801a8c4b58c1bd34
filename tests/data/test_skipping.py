"""Bad rows end nothing that they need not: they are named, or others stand in for them, whenever and wherever met."""

import json
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from tests.data.kinds import qwen
from tests.data.tiny import build_processor, picture
from tokencurric.data import (
    MARK,
    VICUNA_V1,
    Conversation,
    ConversationCollator,
    ConversationDataset,
    ConversationFile,
    PromptCollator,
    Turn,
    measure_rows,
    preflight,
)
from tokencurric.data.left_out import read_left_out, write_left_out
from tokencurric.errors import DataError, RangeError, UnsupportedModelError


def rows_of(folder: Path, kinds: str) -> ConversationFile:
    """A row per letter: an image, a text, a missing image, a file that is none, a thin image, an answer too long."""
    rows = []
    for number, kind in enumerate(kinds):
        name, answer = f"{number}.png", "x"
        if kind == "i":
            picture(number).save(folder / name)
        elif kind == "b":
            (folder / name).write_text("no image")
        elif kind == "q":
            Image.new("RGB", (300, 1)).save(folder / name)
        elif kind == "l":
            picture(number).save(folder / name)
            answer = "y" * 500
        images = () if kind == "t" else (name,)
        turns = (Turn("user", f"{MARK * len(images)}what?"), Turn("assistant", answer))
        rows.append(Conversation(number, f"id-{number}", images, turns))
    return ConversationFile(folder / "talk.json", folder, tuple(rows))


PLAIN = build_processor()


def test_a_row_that_the_processor_refuses_is_named(tmp_path):
    """A thin image ends Qwen's processor with an error that names nothing."""
    processor = qwen()
    file = rows_of(tmp_path, "iqi")
    data, collate = ConversationDataset(file), ConversationCollator(processor)
    with pytest.raises(ValueError, match="aspect ratio"):
        processor(images=[data[1].images[0]], text=["<|image_pad|>"])
    with pytest.raises(DataError, match=r"refuses row 1 \(id 'id-1'\) of .*talk\.json: ValueError: .*aspect ratio"):
        collate([data[0], data[1], data[2]])
    with pytest.raises(DataError, match=r"refuses row 1 "):
        PromptCollator(processor)([data[0], data[1]])
    assert len(collate([data[0], data[2]])["row_key"]) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_preflight_runs_the_processor(tmp_path, workers):
    file = rows_of(tmp_path, "iqtmb")
    collate = ConversationCollator(qwen())
    assert [problem.index for problem in preflight(file, open_images=True).problems] == [3, 4]
    report = preflight(file, collate=collate, workers=workers)
    assert [problem.index for problem in report.problems] == [1, 3, 4]
    assert report.opened and report.collated
    assert "refuses row 1 (id 'id-1')" in str(report)
    assert preflight(file.without(report.problems), collate=collate).problems == ()


def test_preflight_finds_rows_that_are_too_long_or_have_no_answer(tmp_path):
    file = rows_of(tmp_path, "ilt")
    collate = ConversationCollator(PLAIN, template=VICUNA_V1, max_length=200)
    assert [problem.index for problem in preflight(file, collate=collate).problems] == [1]
    assert (
        preflight(file, collate=lambda samples: 1 / 0)
        .problems[2]
        .reason.endswith("ZeroDivisionError: division by zero")
    )


def test_preflight_counts_rows_that_spell_control_tokens(tmp_path):
    turns = (Turn("user", "what is </s>?"), Turn("assistant", "x"))
    file = rows_of(tmp_path, "ii")
    file = ConversationFile(file.path, file.images, (*file.rows, Conversation(2, "c", (), turns)))
    assert preflight(file).spelled is None
    report = preflight(file, collate=ConversationCollator(PLAIN, template=VICUNA_V1))
    assert report.spelled == 1 and report.problems == ()
    assert "1 rows spell control tokens" in str(report)


def test_a_processor_that_fails_for_no_single_row_is_not_blamed_on_one(tmp_path):
    class Picky(type(PLAIN)):
        def __call__(self, *args, text=(), **options):
            if len(text) > 1:
                raise RuntimeError("only one at a time")
            return super().__call__(*args, text=text, **options)

    picky = Picky(PLAIN.image_processor, PLAIN.tokenizer, patch_size=8)
    data = ConversationDataset(rows_of(tmp_path, "tt"))
    with pytest.raises(RuntimeError, match="only one") as caught:
        ConversationCollator(picky, template=VICUNA_V1)([data[0], data[1]])
    assert "row 0 (id 'id-0')" in caught.value.__notes__[0]


def reference(kinds: str, position: int, bad: str) -> int:
    """The next good row of the same kind, by trying."""
    text = kinds[position] == "t"
    order = [*range(position, len(kinds)), *range(position)]
    return next(n for n in order if (kinds[n] == "t") == text and kinds[n] not in bad)


@given(kinds=st.text("itmb", min_size=1, max_size=9), order=st.randoms())
def test_stand_ins_follow_from_the_data_alone(tmp_path_factory, kinds, order):
    file = rows_of(tmp_path_factory.mktemp("rows"), kinds)
    data = ConversationDataset(file, on_error="skip")
    positions = list(range(len(kinds)))
    order.shuffle(positions)
    for position in positions:
        if kinds[position] in "mb" and "i" not in kinds:
            with pytest.raises(DataError, match=rf"row {position} of .* can stand in"):
                data[position]
            continue
        found = data[position].row_key
        assert found == reference(kinds, position, "mb")
        assert ConversationDataset(file, on_error="skip")[position].row_key == found, "also if asked first"
    assert data.left_out == tuple(n for n, kind in enumerate(kinds) if kind in "mb")
    assert len(data) == len(kinds)


@given(kinds=st.text("itmbl", min_size=2, max_size=7), batch=st.integers(1, 3))
def test_batches_are_whole_and_of_the_same_kinds(tmp_path_factory, kinds, batch):
    """Also where the collator is the one that refuses."""
    file = rows_of(tmp_path_factory.mktemp("rows"), kinds)
    if "i" not in kinds and set(kinds) & set("mbl"):
        return
    data = ConversationDataset(file, on_error="skip")
    collate = ConversationCollator(PLAIN, template=VICUNA_V1, max_length=200, stand_in=data.stand_in)
    found = [key for each in DataLoader(data, batch, collate_fn=collate) for key in each["row_key"].tolist()]
    assert found == [reference(kinds, n, "mbl") for n in range(len(kinds))]
    assert set(data.left_out) == {n for n, kind in enumerate(kinds) if kind in "mbl"}


def test_without_skipping_the_first_bad_row_ends_it(tmp_path):
    file = rows_of(tmp_path, "iml")
    data = ConversationDataset(file)
    with pytest.raises(DataError, match=r"image='1\.png' in row 1 \(id 'id-1'\) of .*talk\.json"):
        data[1]
    assert data.left_out == ()
    collate = ConversationCollator(PLAIN, template=VICUNA_V1, max_length=200)
    with pytest.raises(DataError, match=r"max_length=200 tokens; got .* in row 2 \(id 'id-2'\) of .*talk\.json"):
        collate([data[0], data[2]])
    with pytest.raises(DataError, match="max_length=200"):
        ConversationCollator(PLAIN, template=VICUNA_V1, max_length=200, stand_in=data.stand_in)([data[2]])


def test_rows_left_out_are_counted_logged_and_recorded_once_by_all_processes(tmp_path, caplog):
    file = rows_of(tmp_path, "imitbl")
    record = tmp_path / "skipped.jsonl"

    def run(workers: int) -> ConversationDataset:
        data = ConversationDataset(file, on_error="skip", record=record)
        collate = ConversationCollator(PLAIN, template=VICUNA_V1, max_length=200, stand_in=data.stand_in)
        loader = DataLoader(data, 2, collate_fn=collate, num_workers=workers)
        keys = [key for _ in range(2) for each in loader for key in each["row_key"].tolist()]
        assert keys == [0, 2, 2, 3, 0, 0] * 2
        return data

    with caplog.at_level(logging.WARNING, logger="tokencurric"):
        assert run(0).left_out == (1, 4, 5)
    told = [entry.getMessage() for entry in caplog.records]
    assert [message.split(" row(s)")[0] for message in told] == ["1", "2", "3"]
    assert "row 1 (id 'id-1'): ConversationDataset needs pictures that open" in told[0]
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [(line["row"], line["id"], Path(line["file"]).name) for line in lines] == [
        (1, "id-1", "talk.json"),
        (4, "id-4", "talk.json"),
        (5, "id-5", "talk.json"),
    ]
    # A run that goes on counts on from the record, and one with workers counts in all of them.
    caplog.clear()
    assert run(2).left_out == (1, 4, 5)
    assert not caplog.records and len(record.read_text().splitlines()) == 3
    record.unlink()
    assert run(2).left_out == (1, 4, 5)
    assert sorted({json.loads(line)["row"] for line in record.read_text().splitlines()}) == [1, 4, 5]


def test_a_record_of_rows_that_are_gone_does_no_harm(tmp_path):
    file = rows_of(tmp_path, "ii")
    record = tmp_path / "skipped.jsonl"
    write_left_out(record, file, [*preflight(rows_of(tmp_path, "iim"), open_images=True).problems])
    assert ConversationDataset(file, on_error="skip", record=record).left_out == ()


def test_a_record_may_be_torn_by_a_kill(tmp_path):
    file = rows_of(tmp_path, "mimi")
    record = tmp_path / "skipped.jsonl"
    problems = preflight(file, open_images=True).problems
    write_left_out(record, file, problems)
    whole = record.read_bytes()
    for cut in range(len(whole)):
        record.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        assert len(read_left_out(record, file)) in (lines, lines + 1)  # a line may lack no more than its end
        write_left_out(record, file, problems[1:])
        assert 2 in read_left_out(record, file)


def test_a_collator_that_refuses_everything_gives_up(tmp_path):
    file = rows_of(tmp_path, "ii")
    data = ConversationDataset(file, on_error="skip")
    collate = ConversationCollator(PLAIN, template=VICUNA_V1, max_length=3, stand_in=data.stand_in)
    with pytest.raises(DataError, match="cannot be collated, though each stood in"):
        collate([data[0]])
    (tmp_path / "many").mkdir()
    many = ConversationDataset(rows_of(tmp_path / "many", "m" * 300 + "i"), on_error="skip")
    with pytest.raises(DataError, match=r"row 0 of .* none of 100 others"):
        many[0]
    assert many[250].row_key == 300


def test_errors_of_the_model_are_no_bad_rows(tmp_path):
    class Silent(type(PLAIN)):
        def __call__(self, *args, **kwargs):
            out = super().__call__(*args, **kwargs)
            out.pop("text_replacement_offsets")
            return out

    data = ConversationDataset(rows_of(tmp_path, "ii"), on_error="skip")
    silent = Silent(PLAIN.image_processor, PLAIN.tokenizer, patch_size=8)
    with pytest.raises(UnsupportedModelError):
        ConversationCollator(silent, template=VICUNA_V1, stand_in=data.stand_in)([data[0]])
    assert data.left_out == ()


def test_sizes_come_from_the_first_row_that_opens(tmp_path):
    collate = ConversationCollator(PLAIN, template=VICUNA_V1)
    assert (
        measure_rows(rows_of(tmp_path, "mbit"), collate).tokens[2:]
        == measure_rows(rows_of(tmp_path, "iiit"), collate).tokens[2:]
    )


@pytest.mark.usefixtures("unchecked")
def test_unknown_options_are_refused(tmp_path):
    with pytest.raises(RangeError, match="on_error must be"):
        ConversationDataset(rows_of(tmp_path, "i"), on_error="ignore")


def test_good_rows_are_what_they_are_without_skipping(tmp_path):
    """A control: options for bad rows change nothing for good ones."""
    file = rows_of(tmp_path, "iti")
    plain = ConversationCollator(PLAIN, template=VICUNA_V1)([ConversationDataset(file)[n] for n in range(3)])
    data = ConversationDataset(file, on_error="skip")
    ours = ConversationCollator(PLAIN, template=VICUNA_V1, stand_in=data.stand_in)([data[n] for n in range(3)])
    assert plain.keys() == ours.keys()
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
