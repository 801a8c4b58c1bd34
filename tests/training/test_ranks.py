"""EpicTrainer on two processes: the loss of evaluation, and checkpoints that both take part in."""

import pytest
import torch

from tests.training.launch import train_on_two
from tests.training.rows import ROWS, Rows, collate, make_trainer
from tokencurric.checkpoints import numbered
from tokencurric.defects import defect
from tokencurric.errors import DataError


def by_hand(model, rows):
    """Sums of cross-entropy and counts of supervised tokens, row by row, from the model's own logits."""
    found = []
    for number in range(rows):
        batch = collate([number])
        labels = batch.pop("labels")[:, 1:]
        batch.pop("row_key")
        with torch.no_grad():
            logits = model.eval()(**batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum")
        found.append((loss.item(), int((labels != -100).sum())))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_loss_of_evaluation_is_of_tokens(tmp_path, size):
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=size)
    evaluated = trainer.evaluate(Rows())["eval_loss"]
    found = by_hand(trainer.model, len(ROWS))
    assert evaluated == pytest.approx(sum(loss for loss, _ in found) / sum(count for _, count in found), rel=1e-5)
    by_row = sum(loss / count for loss, count in found) / len(found)
    assert evaluated != pytest.approx(by_row, rel=1e-3), "control: the mean over rows is another"
    assert trainer.state.log_history[-1]["eval_loss"] == evaluated


def test_without_supervised_tokens_there_is_no_loss(tmp_path):
    trainer = make_trainer(tmp_path)

    def silent(numbers):
        batch = collate(numbers)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    trainer.data_collator = silent
    with pytest.raises(DataError, match="Evaluation needs supervised tokens; got none in 8 rows"):
        trainer.evaluate(Rows())


@pytest.mark.xdist_group("ranks")
def test_two_ranks_train_evaluate_and_resume(tmp_path):
    arguments = {"max_steps": 4, "save_steps": 3, "save_total_limit": 2}
    first, second = train_on_two(tmp_path, evaluate=[8, 7, 5, 1], arguments=arguments)
    assert "error" not in first, first
    assert first["world"] == second["world"] == 2
    assert first["weights"] == second["weights"]
    assert first["evaluated"] == second["evaluated"]

    run = tmp_path / "run"
    trainer = make_trainer(tmp_path / "alone")
    trainer._restore(str(run / "checkpoint-4"), trainer.model)
    found = by_hand(trainer.model, len(ROWS))
    for rows, evaluated in first["evaluated"].items():
        expected = [sum(column[: int(rows)]) for column in zip(*found, strict=True)]
        assert evaluated == pytest.approx(expected[0] / expected[1], rel=1e-5), rows
    padded = [sum(column) + column[0] for column in zip(*found[:7], strict=True)]
    assert first["evaluated"]["7"] != pytest.approx(padded[0] / padded[1], rel=1e-3), "control: a row counted twice"

    assert list(numbered(run)) == [3, 4]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (run / "checkpoint-4").iterdir()}
    states = run / "checkpoint-4" / "rng_state_1.pth"
    states.write_bytes(states.read_bytes()[:100])
    assert defect(states.parent).startswith("rng_state_1.pth has 100 bytes")
    again = train_on_two(tmp_path, resume=True, arguments=arguments)[1]
    assert again["resumed"] == "checkpoint-3"
    assert again["weights"] == first["weights"]
    assert list(numbered(run)) == [3, 4] and defect(states.parent) is None
