"""What each of several processes does in a test of distributed training; they import it anew."""

import gc
from datetime import timedelta

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tests.adapters.zoo import tiny_inputs, tiny_model
from tokencurric import EPIC, Random
from tokencurric.curriculum import constant

MIXED = ((3, "I", 9), (2, "I", 2, "I", 8), (20,), (30,))  # two rows a rank: the second rank gets no picture
PICTURES = ((3, "I", 9), (2, "I", 8), (20,), (2, "I", 2, "I", 8))
ROWS = {"text-only rank": MIXED, "pictures on both": PICTURES}
GRID = ("image_grid_thw", "image_sizes")


def model_to_train(family):
    """As LLaVA is trained: the vision tower stays as it is."""
    model = tiny_model(family, dtype=torch.float64)
    for name, weight in model.named_parameters():
        if ("vision_tower" in name or "visual." in name) and "merger" not in name:
            weight.requires_grad = False
    return model


def whole_batch(family, rows):
    inputs = tiny_inputs(family, rows, padding="right")
    ids = inputs["input_ids"]
    last = inputs["attention_mask"].sum(1, keepdim=True) - 5
    inputs["labels"] = torch.where((torch.arange(ids.shape[1]) >= last) & (ids > 0), ids, -100)
    return inputs | {"row_key": torch.arange(len(rows))}


def share(inputs, rows, rank):
    """The two rows of `rank`, with their pictures."""
    counts = [row.count("I") for row in rows]
    first, own = sum(counts[: 2 * rank]), sum(counts[2 * rank : 2 * rank + 2])
    part = {}
    for name, value in inputs.items():
        if name.startswith("pixel_values") or name in GRID:
            each = len(value) // sum(counts)
            if own:
                part[name] = value[first * each : (first + own) * each]
        else:
            part[name] = value[2 * rank : 2 * rank + 2]
    return part


def gradients(model, objective, inputs, num_items):
    out = objective(model, inputs, step=0, total=1, num_items=num_items)
    out.loss.backward()
    return out


def epic():
    return EPIC(Random(), constant(0.75, margin=0.5, layer=1))


def work(rank, folder, family, case):
    """One rank: two steps, of which the second fails if the first left a gradient out; rank 0 saves its gradients."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    limit = timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=limit)
    train(rank, folder, family, case)
    # Nobody may leave while the other still reads from it; and what holds the group (DDP) must be gone before the
    # group is, or the group ends with the interpreter's lock held and its threads, which want the lock, never join.
    gc.collect()
    distributed.barrier()
    distributed.destroy_process_group()


def train(rank, folder, family, case):
    inputs = whole_batch(family, ROWS[case])
    num_items = int((inputs["labels"][:, 1:] != -100).sum())
    own, model, objective = share(inputs, ROWS[case], rank), model_to_train(family), epic()
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        wrapped.zero_grad()
        gradients(wrapped, objective, own, num_items)
    if rank == 0:
        # DDP takes the mean over ranks, of losses that are each divided by the whole batch's tokens.
        grads = {name: 2 * each.grad for name, each in model.named_parameters() if each.grad is not None}
        torch.save(grads, f"{folder}/gradients.pt")
