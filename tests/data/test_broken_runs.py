"""Training on data with a bad row: a clear error with nothing earlier lost, or the same run with and without a stop."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments

from tests.data.tiny import picture
from tokencurric import EPIC, EpicTrainer, Random, tcd
from tokencurric.data import (
    MARK,
    ConversationCollator,
    ConversationDataset,
    GroupedSampler,
    measure_rows,
    read_conversations,
)
from tokencurric.errors import DataError

BASE = Path(__file__).parents[2] / "examples" / "scenes" / "base"
ROWS, STEPS, BATCH = 8, 4, 2


@pytest.fixture
def data(tmp_path):
    """A file of eight rows with their images."""
    rows = []
    for number in range(ROWS):
        picture(30 * number, (48, 48)).save(tmp_path / f"{number}.png")
        turns = [
            {"from": "human", "value": f"{MARK}\nwhat color?"},
            {"from": "gpt", "value": ("red", "blue")[number % 2]},
        ]
        rows.append({"id": number, "image": f"{number}.png", "conversations": turns})
    (tmp_path / "talk.json").write_text(json.dumps(rows))
    return read_conversations(tmp_path / "talk.json", images=tmp_path)


def run(file, folder, *, on_error="raise", resume=None, record=None, stop=STEPS):
    """Weights after training; rows that were left out."""
    processor = AutoProcessor.from_pretrained(BASE)
    rows = ConversationDataset(file, on_error=on_error, record=record)
    collate = ConversationCollator(processor, square="pad", stand_in=rows.stand_in if on_error == "skip" else None)
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        save_steps=1,
        learning_rate=1e-3,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        seed=3,
    )
    trainer = EpicTrainer(
        model=AutoModelForImageTextToText.from_pretrained(BASE),
        args=arguments,
        objective=EPIC(Random(), tcd()),
        sizes=measure_rows(file, collate),
        train_dataset=rows,
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=resume)
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}, rows.left_out


def last_row(file) -> int:
    """A row of the last batch."""
    collate = ConversationCollator(AutoProcessor.from_pretrained(BASE), square="pad")
    return list(GroupedSampler(measure_rows(file, collate), BATCH, seed=3))[-1]


def same(ours, others) -> bool:
    return all(torch.equal(ours[name], others[name]) for name in ours)


def test_a_missing_image_in_the_last_batch_costs_nothing_earlier(data, tmp_path):
    whole, _ = run(data, tmp_path / "whole")
    last = last_row(data)
    image = tmp_path / f"{last}.png"
    content = image.read_bytes()
    image.unlink()
    with pytest.raises(DataError, match=rf"image='{last}\.png' in row {last} \(id '{last}'\) of .*talk\.json"):
        run(data, tmp_path / "broken")
    kept = sorted(path.name for path in (tmp_path / "broken").glob("checkpoint-*"))
    # Trainer's data loader reads one batch ahead, so the error comes one step early.
    assert kept == [f"checkpoint-{step}" for step in range(1, STEPS - 1)]
    image.write_bytes(content)
    mended, _ = run(data, tmp_path / "broken", resume=str(tmp_path / "broken" / kept[-1]))
    assert same(whole, mended)
    # Or the run goes on without the row.
    image.unlink()
    without, left_out = run(data, tmp_path / "broken", on_error="skip", resume=str(tmp_path / "broken" / kept[-1]))
    assert left_out == (last,)
    assert not same(whole, without), "a control"


def test_rows_are_skipped_alike_before_and_after_a_stop(data, tmp_path):
    (tmp_path / "2.png").write_text("no image")
    (tmp_path / "5.png").unlink()
    record = tmp_path / "skipped.jsonl"
    whole, left_out = run(data, tmp_path / "whole", on_error="skip")
    assert left_out == (2, 5)
    for step in range(1, STEPS):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed, _ = run(data, tmp_path / "resumed", on_error="skip", resume=checkpoint, record=record)
        assert same(whole, resumed)
    assert {json.loads(line)["row"] for line in record.read_text().splitlines()} <= {2, 5}
