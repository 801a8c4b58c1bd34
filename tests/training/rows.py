"""A training that takes a second, for processes that are killed and for processes that train together."""

import hashlib

import torch
from transformers import TrainingArguments

from tests.adapters.tiny import tiny_batch, tiny_llava
from tokencurric import EPIC, EpicTrainer, Random, tcd

ROWS = ((3, "I", 5), (2, "I", 2, "I", 4), (6,), (4, "I", 3), (5, "I", 4), (3, "I", 9), (2, "I", 3), (7, "I", 5))


class Rows(torch.utils.data.Dataset):
    def __init__(self, count=8):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        return number


def collate(numbers):
    """Each row as it is alone, whatever shares its batch, with one to three supervised tokens by its number."""
    parts = [tiny_batch([ROWS[n]], padding="right", answers=1 + n % 3, seed=n) for n in numbers]
    width = max(part["input_ids"].shape[1] for part in parts)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    batch = {
        name: torch.cat([torch.nn.functional.pad(p[name], (0, width - p[name].shape[1]), value=v) for p in parts])
        for name, v in fill.items()
    }
    pictures = [part["pixel_values"] for part in parts if "pixel_values" in part]
    if pictures:
        batch["pixel_values"] = torch.cat(pictures)
    return {**batch, "row_key": torch.tensor(numbers)}


def make_trainer(folder, *, model=None, objective=None, rows=8, kind=EpicTrainer, own=None, **arguments):
    """Dropout draws from the state of the process, so that a resumed run has to get that back, too.

    `own` goes to the trainer, other arguments to TrainingArguments.
    """
    settings = {
        "max_steps": 6,
        "save_steps": 2,
        "save_total_limit": 1,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    return kind(
        model=tiny_llava(depth=3, attention_dropout=0.1) if model is None else model,
        args=TrainingArguments(str(folder), **{**settings, **arguments}),
        objective=EPIC(Random(), tcd(layer=1)) if objective is None else objective,
        train_dataset=Rows(rows),
        data_collator=collate,
        **(own or {}),
    )


def digest(model):
    """A hash of all weights, bit for bit."""
    sums = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        sums.update(name.encode())
        sums.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()
