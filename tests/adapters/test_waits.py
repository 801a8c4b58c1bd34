"""How often the host waits for what the device has computed."""

import inspect
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tokencurric
from tests.adapters.tiny import RAGGED, tiny_batch, tiny_llava
from tokencurric import DART, EPIC, FastV, Random, Uniform, compress
from tokencurric._transfer import on_device
from tokencurric.adapters.layout import lay_out
from tokencurric.adapters.record import Record, Request
from tokencurric.curriculum import constant
from tokencurric.errors import RangeError
from tokencurric.losses import jensen_shannon
from tokencurric.token_budget import Cut, Ratio

HOME = Path(tokencurric.__file__).parent

# On a GPU these look at numbers, to say how large their result is, or to return them.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "_unique2", "unique_dim",
    "unique_consecutive", "repeat_interleave",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Counts reads of tensors by the function of the library that is behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter()

    def note(self) -> None:
        for frame in inspect.stack()[1:]:
            path = Path(frame.filename)
            if frame.function in ("note", "noted", "__torch_dispatch__"):
                continue
            if HOME in path.parents:
                self.seen[frame.function] += 1
                return
            if "transformers" in path.parts:
                return  # the model's own

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        told = name == "repeat_interleave" and (kwargs or {}).get("output_size") is not None
        if (name in WAITING and not told) or by_mask:
            self.note()
        return function(*args, **(kwargs or {}))


@contextmanager
def waits(monkeypatch):
    mode, tolist = Waits(), torch.Tensor.tolist

    def noted(tensor):
        mode.note()
        return tolist(tensor)

    with monkeypatch.context() as patch, mode:
        patch.setattr(torch.Tensor, "tolist", noted)
        yield mode.seen


# Budgets are on the host. Whether a mask keeps what it has to, and a loss is finite, is read on a CPU only; elsewhere
# the device asserts it, or sends it while the host goes on.
NO_WAIT = {"_counts", "check_budget", "_check", "watch"}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("feature_weight", [0, 0.1])
@pytest.mark.parametrize("divergence", [None, jensen_shannon], ids=["forward", "jensen_shannon"])
@pytest.mark.parametrize("compressor", [DART(), FastV(), Random(), Uniform()], ids=lambda c: type(c).__name__)
def test_a_step_reads_from_the_device_once(monkeypatch, compressor, divergence, feature_weight):
    model = tiny_llava().train()
    batch = {**tiny_batch(RAGGED, answers=2), "row_key": torch.arange(3)}
    loss = None if divergence is None else tokencurric.ConsistencyLoss(divergence=divergence)
    objective = EPIC(compressor, constant(0.8, margin=0.3), loss=loss, feature_weight=feature_weight)
    objective.attach(model)
    with waits(monkeypatch) as seen:
        objective(model, batch, step=1, total=2, num_items=torch.tensor(6)).loss.backward()
    assert {name: count for name, count in seen.items() if name not in NO_WAIT} == {"lay_out": 1}


@pytest.mark.usefixtures("unchecked")
def test_a_prompt_reads_from_the_device_once(monkeypatch):
    model, batch = tiny_llava(), tiny_batch(RAGGED)
    with compress(model, DART(), ratio=[0.5, 0.8], layer=[2, 4]), waits(monkeypatch) as seen, torch.no_grad():
        model(**batch)
    assert {name: count for name, count in seen.items() if name not in NO_WAIT} == {"lay_out": 1}


@pytest.mark.usefixtures("unchecked")
def test_control_a_read_is_seen(monkeypatch):
    class Reading(Random):
        def __call__(self, view, keep, *, seed=0):
            assert int(view.tokens.shape[0] * view.mask.sum())
            return super().__call__(view, keep, seed=seed)

    monkeypatch.setattr(sys.modules[__name__], "HOME", Path(__file__).parent)
    objective = EPIC(Reading(), constant(0.8, margin=0.3))
    with waits(monkeypatch) as seen:
        objective(tiny_llava(), tiny_batch(RAGGED, answers=2), step=1, total=2)
    assert seen["__call__"] >= 2, "once a side"


def test_a_wrong_count_waits_for_nothing_on_a_device():
    """On `meta`, where nothing can be read, the check of a mask has to go through all the same."""
    elsewhere = torch.ones(1, 4, dtype=torch.bool, device="meta")
    layout = lay_out(torch.ones(1, 4, dtype=torch.bool))
    record = Record(Request(Random(), (Cut(1, Ratio(0.5)),)), layout, torch.arange(1))
    record._check(elsewhere, elsewhere, [2])
    with pytest.raises(RangeError, match="needs to keep exactly"):
        record._check(torch.zeros(1, 4, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool), [2])


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_the_host_go_from_pinned_memory(monkeypatch):
    copies = []

    class Pinned:
        def to(self, device, *, non_blocking):
            copies.append((device.type, non_blocking))

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: Pinned())
    on_device((3, 4), torch.device("cuda"))
    assert copies == [("cuda", True)]
    there = on_device((3, 4), torch.device("meta"))
    assert there.device.type == "meta", "and elsewhere as any tensor does"
    assert copies == [("cuda", True)]


def test_numbers_of_the_host_keep_their_kind():
    cpu = torch.device("cpu")
    assert on_device((True, False), cpu).dtype == torch.bool
    assert on_device((), cpu).dtype == on_device((1,), cpu).dtype == torch.int64
    given = torch.tensor([1, 2], dtype=torch.int32)
    assert on_device(given, cpu) is given
