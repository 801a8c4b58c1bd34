"""What each of several processes does in a test of distributed training; they import it anew."""

import gc
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from unittest import mock

import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.adapters.zoo import tiny_inputs, tiny_model
from tokencurric import EPIC, Random
from tokencurric.curriculum import constant

MIXED = ((3, "I", 9), (2, "I", 2, "I", 8), (20,), (30,))  # two rows a rank: the second rank gets no picture
PICTURES = ((3, "I", 9), (2, "I", 8), (20,), (2, "I", 2, "I", 8))
CROSSED = ((3, "I", 9), (20,), (30,), (2, "I", 2, "I", 8))  # taken one by one, one rank has no picture each time
ROWS = {"text-only rank": MIXED, "pictures on both": PICTURES, "crossed": CROSSED}
GRID = ("image_grid_thw", "image_sizes")
LEARNT = (5, 7, 4, 9)  # tokens at the end of each row: ranks make logits in different numbers of chunks


@dataclass(frozen=True)
class Case:
    """A model on two ranks.

    `wrap` is "ddp" or one of SHARDINGS; `steps` micro-batches are accumulated; `around` is what else is put on the
    model: "checkpointing" (transformers' own), "wrapper" (torch's), "autocast" or "policy" (FSDP2's), both to bfloat16.
    `chunk` is how many positions' logits are made at once; `foreign` has another model teach; `ghost` may be left out.
    """

    wrap: str
    family: str = "llava"
    rows: str = "text-only rank"
    compressor: object = field(default_factory=Random)
    options: dict = field(default_factory=dict)
    steps: int = 1
    around: str = ""
    chunk: int = 3
    foreign: bool = False
    ghost: bool = True

    @property
    def dtype(self):
        """Low precision is compared in what it makes of single precision, all else in double."""
        return torch.float32 if self.around in ("autocast", "policy") else torch.float64

    def context(self):
        return torch.autocast("cpu", torch.bfloat16) if self.around == "autocast" else nullcontext()

    def objective(self, teacher="self"):
        return EPIC(self.compressor, constant(0.75, margin=0.5, layer=1), teacher=teacher, **self.options)

    def chunks(self):
        vocabulary = tiny_model(self.family).get_output_embeddings().out_features
        return mock.patch("tokencurric.losses.supervised._LOGITS_A_CHUNK", self.chunk * vocabulary)

    def ghosts(self):
        return (
            nullcontext()
            if self.ghost
            else mock.patch("tokencurric.adapters.hugging_face.ghost_features", return_value=None)
        )


# Ways to shard. A whole tower cannot be a unit: FSDP2 renames its class, by which transformers finds what to record.


def _towers_layers(model):
    base = model.model
    return base.vision_tower.encoder.layers if hasattr(base, "vision_tower") else base.visual.blocks


def in_parts(model, shard):
    """Layers of decoder and tower each, the projector, and all else with the root, norm and head among it."""
    for layer in (*_towers_layers(model), *model.get_decoder().layers):
        shard(layer)
    if hasattr(model.model, "multi_modal_projector"):
        shard(model.model.multi_modal_projector)


def as_accelerate(model, shard):
    """Embeddings apart, norm and head together, which stay whole after forward."""
    for layer in (*_towers_layers(model), *model.get_decoder().layers):
        shard(layer)
    shard(model.get_input_embeddings())
    shard([model.get_decoder().norm, model.get_output_embeddings()], reshard_after_forward=False)


def decoder_apart(model, shard):
    """The head apart, and the decoder, with its norm, around its layers."""
    in_parts(model, shard)
    for module in (model.get_input_embeddings(), model.get_output_embeddings(), model.get_decoder()):
        shard(module)


SHARDINGS = {"in parts": in_parts, "as accelerate": as_accelerate, "decoder apart": decoder_apart}


def shard(model, case):
    settings = {}
    if case.around == "policy":
        settings["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16)

    def apply(module, **more):
        fully_shard(module, **settings, **more)

    SHARDINGS[case.wrap](model, apply)
    apply(model)
    return model


def model_to_train(case, seed=0):
    """As LLaVA is trained: the vision tower stays as it is."""
    model = tiny_model(case.family, dtype=case.dtype, seed=seed).train()
    for name, weight in model.named_parameters():
        if ("vision_tower" in name or "visual." in name) and "merger" not in name:
            weight.requires_grad = False
    if case.around == "checkpointing":
        model.activation_checkpointing_enable()
    if case.around == "wrapper":
        layers = model.get_decoder().layers
        for number, layer in enumerate(layers):
            layers[number] = checkpoint_wrapper(layer, preserve_rng_state=False)
    return model


def teacher_of(case):
    return model_to_train(case, seed=5) if case.foreign else "self"


def whole_batch(case):
    rows = ROWS[case.rows]
    inputs = tiny_inputs(case.family, rows, padding="right")
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(case.dtype)
    ids = inputs["input_ids"]
    first = inputs["attention_mask"].sum(1, keepdim=True) - torch.tensor(LEARNT)[:, None]
    inputs["labels"] = torch.where((torch.arange(ids.shape[1]) >= first) & (ids > 0), ids, -100)
    return inputs | {"row_key": torch.arange(len(rows))}


def items(inputs):
    return int((inputs["labels"][:, 1:] != -100).sum())


def part(inputs, case, start, stop):
    """Some rows, with their pictures."""
    counts = [row.count("I") for row in ROWS[case.rows]]
    first, own = sum(counts[:start]), sum(counts[start:stop])
    taken = {}
    for name, value in inputs.items():
        if name.startswith("pixel_values") or name in GRID:
            each = len(value) // sum(counts)
            if own:
                taken[name] = value[first * each : (first + own) * each]
        else:
            taken[name] = value[start:stop]
    return taken


def backward(model, case, objective, inputs, num_items):
    with case.context():
        out = objective(model, inputs, step=0, total=1, num_items=num_items)
    out.loss.backward()
    return out.loss.detach()


def on_one(case, start=0, stop=4):
    """Loss and gradients of some rows in this process."""
    model, inputs = model_to_train(case), part(whole_batch(case), case, start, stop)
    with case.chunks():
        loss = backward(model, case, case.objective(teacher_of(case)), inputs, items(inputs))
    return loss, gradients(model)


def gradients(model, factor=1):
    """By name, whole, on every rank."""
    found = {}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            grad = weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad
            found[name.replace("_checkpoint_wrapped_module.", "")] = factor * grad
    return found


def work(rank, folder, cases):
    """One rank: case after case; rank 0 saves what it finds."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    limit = timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=limit)
    for number, case in enumerate(cases):
        loss, found = train(rank, case)
        if rank == 0:
            torch.save((loss, found), f"{folder}/{number}.pt")
        # Nobody may leave while the other still reads from it; and what holds the group (DDP) must be gone before the
        # group is, or the group ends with the interpreter's lock held and its threads, which want the lock, never join.
        gc.collect()
        distributed.barrier()
    distributed.destroy_process_group()


def train(rank, case):
    """Loss and gradients of all rows, after two steps, of which the second fails if the first left a gradient out."""
    model, teacher, inputs = model_to_train(case), teacher_of(case), whole_batch(case)
    if case.wrap == "ddp":
        model = DistributedDataParallel(model)
    else:
        shard(model, case)
        if isinstance(teacher, nn.Module):
            shard(teacher, case)
    objective, total = case.objective(teacher), items(inputs)
    size = 2 // case.steps
    for _ in range(2):
        model.zero_grad()
        loss = torch.zeros(())
        for step in range(case.steps):
            start = 2 * rank + step * size
            own = part(inputs, case, start, start + size)
            with waiting(model, step + 1 < case.steps), case.chunks(), case.ghosts():
                loss = loss + backward(model, case, objective, own, total)
    distributed.all_reduce(loss)
    # DDP and FSDP2 take the mean over ranks, of losses that are each divided by the whole batch's tokens.
    return loss, gradients(getattr(model, "module", model), factor=2)


def waiting(model, holds):
    """Gradients are not exchanged yet."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync() if holds else nullcontext()
    model.set_requires_gradient_sync(not holds)
    return nullcontext()
