"""EpicTrainer: accumulation, resuming, saving, logging."""

import json
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import BatchSampler
from transformers import LlavaForConditionalGeneration, TrainerCallback, TrainingArguments

from tests.adapters.tiny import tiny_batch, tiny_llava
from tokencurric import DART, EPIC, EpicTrainer, Random, compress, lcd, tcd
from tokencurric.curriculum import constant
from tokencurric.data import GroupedSampler, RowSizes, padding_share
from tokencurric.errors import MissingSignalError, RangeError, ShapeError, StateError

ROWS = ((3, "I", 5), (2, "I", 2, "I", 4), (6,), (4, "I", 3), (5, "I", 4), (3, "I", 9), (2, "I", 3), (7, "I", 5))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, number):
        return number


def collate(numbers):
    batch = tiny_batch([ROWS[n] for n in numbers], padding="right", answers=2, seed=sum(numbers))
    return {**batch, "row_key": torch.tensor(numbers)}


def train(folder, *, model=None, objective=None, resume=None, callbacks=(), sizes=None, kind=EpicTrainer, **arguments):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    trainer = kind(
        model=tiny_llava() if model is None else model,
        args=TrainingArguments(folder, **{**settings, **arguments}),
        objective=EPIC(Random(), tcd()) if objective is None else objective,
        sizes=sizes,
        train_dataset=Rows(),
        data_collator=collate,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(ours, others, **tolerance):
    assert ours.keys() == others.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], others[name], **tolerance)


def test_accumulation_equals_the_large_batch(tmp_path):
    # Float64 and plain gradient descent, so that the comparison is of gradients and not of Adam's signs.
    class Whole(Rows):
        def __len__(self):
            return 4

    runs = []
    for size, accumulate in ((4, 1), (1, 4), (2, 2), (2, 1)):
        model = tiny_llava(dtype=torch.float64)

        # One picture a row and the same text for a row in every batch, whatever the batch's size.
        def collate_rows(numbers):
            parts = [tiny_batch([(3 + n, "I", 4)], padding="right", answers=2, seed=n) for n in numbers]
            width = max(p["input_ids"].shape[1] for p in parts)
            fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
            batch = {
                k: torch.cat([torch.nn.functional.pad(p[k], (0, width - p[k].shape[1]), value=v) for p in parts])
                for k, v in fill.items()
            }
            batch["pixel_values"] = torch.cat([p["pixel_values"] for p in parts]).double()
            return {**batch, "row_key": torch.tensor(numbers)}

        trainer = EpicTrainer(
            model=model,
            args=TrainingArguments(
                str(tmp_path / f"{size}-{accumulate}"), max_steps=2, per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulate, optim="sgd", learning_rate=0.05, max_grad_norm=0.0,
                save_strategy="no", disable_tqdm=True, use_cpu=True, lr_scheduler_type="constant", seed=1,
                logging_steps=1,
            ),
            objective=EPIC(Random(), constant(0.7, margin=0.4), feature_weight=0.1),
            train_dataset=Whole(),
            data_collator=collate_rows,
        )  # fmt: skip
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        names = ("loss", "sft_loss", "consistency_loss", "feature_loss")
        runs.append((weights(trainer), [log[name] for log in logs for name in names]))
    assert_equal(runs[1][0], runs[0][0], rtol=1e-8, atol=1e-10)
    assert_equal(runs[2][0], runs[0][0], rtol=1e-8, atol=1e-10)
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-5)
    name = "model.language_model.layers.3.mlp.up_proj.weight"
    assert not torch.allclose(runs[3][0][name], runs[0][0][name], rtol=1e-4), "control: half the data differs"


def test_a_resumed_run_equals_the_uninterrupted(tmp_path):
    whole = train(str(tmp_path / "whole"), objective=EPIC(DART(), lcd()), max_steps=6)

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    folder = str(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        train(
            folder, objective=EPIC(DART(), lcd()), max_steps=6, save_strategy="steps", save_steps=3, callbacks=[Kill()]
        )
    resumed = train(folder, objective=EPIC(DART(), lcd()), max_steps=6, resume=f"{folder}/checkpoint-3")
    assert_equal(weights(resumed), weights(whole), rtol=0, atol=0)
    keys = ("student_ratio", "layer", "margin", "sft_loss", "consistency_loss")
    last = [{k: log[k] for k in keys} for log in whole.state.log_history if "sft_loss" in log][3:]
    again = [{k: log[k] for k in keys} for log in resumed.state.log_history if "sft_loss" in log][3:]
    assert last == again and len({log["student_ratio"] for log in last}) == 3
    other = train(str(tmp_path / "other"), objective=EPIC(DART(), lcd()), max_steps=6, seed=8)
    name = "model.language_model.layers.3.mlp.up_proj.weight"
    assert not torch.equal(weights(other)[name], weights(whole)[name]), "control"
    with pytest.raises(StateError, match="objective it began with"):
        train(folder, objective=EPIC(DART(), tcd()), max_steps=6, resume=f"{folder}/checkpoint-3")


SIZES = RowSizes(
    *zip(*((sum(16 if part == "I" else part for part in row), row.count("I")) for row in ROWS), strict=True)
)


class Batches(EpicTrainer):
    """Notes which rows share a batch."""

    seen: ClassVar[list[tuple[int, ...]]] = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen.append(tuple(inputs["row_key"].tolist()))
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_rows_of_like_length_share_a_batch(tmp_path):
    def batches(folder, **arguments):
        Batches.seen = []
        trainer = train(str(tmp_path / folder), **{"kind": Batches, "max_steps": -1, "num_train_epochs": 3} | arguments)
        return Batches.seen, [log["padding"] for log in trainer.state.log_history if "padding" in log]

    seen, padding = batches("whole", sizes=SIZES)
    expected = GroupedSampler(SIZES, 2, seed=7)
    for epoch in range(3):
        expected.set_epoch(epoch)
        assert seen[4 * epoch : 4 * epoch + 4] == [tuple(each) for each in BatchSampler(expected, 2, False)]
    assert len(set(seen)) > 4, "control: epochs differ"
    assert padding == pytest.approx([padding_share([SIZES.tokens[row] for row in each], 2) for each in seen])
    assert batches("random")[0] != seen

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batches("killed", sizes=SIZES, save_strategy="steps", save_steps=5, callbacks=[Kill()])
    again, _ = batches("killed", sizes=SIZES, resume=str(tmp_path / "killed" / "checkpoint-5"))
    assert again == seen[5:], "resumed within an epoch that is not the first"
    assert batches("accumulated", sizes=SIZES, gradient_accumulation_steps=2)[0][:4] == [
        tuple(each) for each in BatchSampler(GroupedSampler(SIZES, 2, together=2, seed=7), 2, False)
    ]


def test_the_saved_model_is_a_plain_checkpoint(tmp_path):
    trainer = train(str(tmp_path / "run"))
    trainer.save_model(str(tmp_path / "saved"))
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert_equal(plain.state_dict(), weights(trainer), rtol=0, atol=0)
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"model.safetensors", "config.json", "tokencurric.json"} <= files
    recipe = json.loads((tmp_path / "saved" / "tokencurric.json").read_text())
    assert recipe["compressor"] == {"type": "Random"}
    assert recipe["curriculum"]["high"] == {"type": "Linear", "start": 0.05, "end": 0.9}
    with torch.no_grad():
        plain(**tiny_batch())  # transformers puts hooks of its own on at the first call
    module_hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules()]
    assert sum(module_hooks) == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in plain.modules()), (
        "training leaves no hooks"
    )


def test_the_recipe_is_plain_json(tmp_path):
    trainer = train(str(tmp_path / "run"), objective=EPIC(Random(), tcd("code")), max_steps=1)
    trainer.save_model(str(tmp_path / "saved"))
    text = (tmp_path / "saved" / "tokencurric.json").read_text()

    def refuse(word):
        raise ValueError(word)

    assert json.loads(text, parse_constant=refuse)["curriculum"]["margin"]["high"] == 0.3


def test_weights_of_several_types_come_back_as_they_were(tmp_path):
    model = tiny_llava()
    model.model.vision_tower.to(torch.bfloat16)
    trainer = EpicTrainer(
        model=model, args=TrainingArguments(str(tmp_path / "run"), use_cpu=True), objective=EPIC(Random(), tcd())
    )
    before = weights(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert trainer._restore(str(tmp_path / "saved"), model)
    assert_equal(weights(trainer), before, rtol=0, atol=0)


def test_lora_saves_the_adapter_and_a_merged_copy(tmp_path):
    model = get_peft_model(tiny_llava(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = {k: v.clone() for k, v in model.get_base_model().state_dict().items() if "base_layer" in k}
    trainer = train(str(tmp_path / "run"), model=model)
    trainer.save_model(str(tmp_path / "adapter"))
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert names and all("lora" in name for name in names)
    assert all(torch.equal(before[k], v) for k, v in model.get_base_model().state_dict().items() if "base_layer" in k)
    trainer.save_merged(tmp_path / "merged")
    assert (tmp_path / "merged" / "tokencurric.json").exists()
    batch = tiny_batch(ROWS[:2])
    model.eval()
    with torch.no_grad():
        adapted = model(**batch).logits
        merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()(**batch).logits
        reloaded = PeftModel.from_pretrained(tiny_llava(), tmp_path / "adapter").eval()(**batch).logits
        bare = tiny_llava()(**batch).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reloaded, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - bare).abs().max() > 1e-2, "control: training moved the adapter"
    with pytest.raises(StateError, match="needs a PEFT model"):
        train(str(tmp_path / "plain"), max_steps=1).save_merged(tmp_path / "never")


@pytest.mark.parametrize("how", [{"bf16": True}, {"gradient_checkpointing": True}], ids=["bf16", "checkpointing"])
def test_trains_with(tmp_path, how):
    trainer = train(str(tmp_path), objective=EPIC(DART(), lcd()), **how)
    losses = [log["sft_loss"] for log in trainer.state.log_history if "sft_loss" in log]
    assert len(losses) == 4 and all(torch.isfinite(torch.tensor(losses)))
    exact = train(str(tmp_path), objective=EPIC(DART(), lcd()))
    others = [log["sft_loss"] for log in exact.state.log_history if "sft_loss" in log]
    tolerance = 0.1 if "bf16" in how else 1e-5
    assert losses == pytest.approx(others, rel=tolerance)
    assert (losses != others) or "bf16" not in how, "control: bf16 was really on"


def test_what_is_logged(tmp_path):
    trainer = train(str(tmp_path), objective=EPIC(Random(), constant(0.75, margin=0.25)), logging_steps=2, max_steps=4)
    logs = [log for log in trainer.state.log_history if "sft_loss" in log]
    assert [log["step"] for log in logs] == [2, 4]
    for log in logs:
        assert log["student_ratio"] == 0.75 and log["teacher_ratio"] == 0.5
        assert log["layer"] == 2 and log["margin"] == 0.25
        assert log["student_tokens"] == log["visual_tokens"] / 4
        assert log["teacher_tokens"] == log["visual_tokens"] / 2
        assert log["supervised_tokens"] == 8
        assert 0 < log["padding"] < 1 and 0 < log["student_padding"] < 1 and log["padding"] != log["student_padding"]
        assert log["consistency_loss"] > 0
    hooks = sum(len(m._forward_hooks) for m in trainer.model.modules())
    evaluated = trainer.evaluate(Rows())
    assert sum(len(m._forward_hooks) for m in trainer.model.modules()) == hooks
    batch = collate(list(range(len(ROWS))))
    batch.pop("row_key")
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).loss.item()
        with compress(trainer.model, Random(), ratio=0.75):
            compressed = trainer.model(**batch).loss.item()
    assert evaluated["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert compressed != pytest.approx(expected, rel=1e-3), "control"


def test_errors(tmp_path):
    with pytest.raises(RangeError, match="label_smoothing_factor=0"):
        train(str(tmp_path), label_smoothing_factor=0.1)
    with pytest.raises(RangeError, match="compute_metrics=None"):
        EpicTrainer(
            model=tiny_llava(),
            args=TrainingArguments(str(tmp_path), use_cpu=True),
            objective=EPIC(Random(), tcd()),
            compute_metrics=lambda p: {},
        )
    with pytest.raises(StateError, match="cannot predict"):
        train(str(tmp_path), max_steps=1).predict(Rows())
    with pytest.raises(MissingSignalError, match="layer=0"):  # before the first step, though only the last is at 0
        train(str(tmp_path), objective=EPIC(DART(), lcd(last=0)), max_steps=20)
    with pytest.raises(RangeError, match="train_sampling_strategy='random' with sizes"):
        train(str(tmp_path), sizes=SIZES, train_sampling_strategy="sequential")
    with pytest.raises(ShapeError, match="got 1 sizes for 8 rows"):
        train(str(tmp_path), sizes=RowSizes((3,), (0,)))
    with pytest.raises(RangeError, match="compute_loss_func=None"):
        EpicTrainer(
            model=tiny_llava(),
            args=TrainingArguments(str(tmp_path), use_cpu=True),
            objective=EPIC(Random(), tcd()),
            compute_loss_func=lambda *a, **k: None,
        )
