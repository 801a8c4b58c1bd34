"""The fused kernel computes what chunks of logits compute, and is passed over where it would not."""

import os
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.adapters.tiny import RAGGED, tiny_batch, tiny_llava
from tokencurric import EPIC, ConsistencyLoss, Random
from tokencurric.curriculum import constant
from tokencurric.errors import MissingDependencyError, RangeError, UnsupportedModelError
from tokencurric.losses import Taught, fused, fused_cross_entropy, supervised_losses

FUNCTIONAL = "liger_kernel.transformers.functional"


@pytest.fixture
def kernel(monkeypatch):
    """Stands for the kernel where there is none: notes what it is given."""
    calls = []

    def cross_entropy(hidden, weight, targets, bias, *, reduction, accum_dtype):
        calls.append({"dtype": hidden.dtype, "weight": weight.dtype, "reduction": reduction, "sums": accum_dtype})
        return functional.cross_entropy(functional.linear(hidden, weight, bias).float(), targets, reduction=reduction)

    module = ModuleType(FUNCTIONAL)
    module.liger_fused_linear_cross_entropy = cross_entropy
    monkeypatch.setitem(sys.modules, FUNCTIONAL, module)
    return calls


def scene(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    head = nn.Linear(8, 11, bias=bias, dtype=dtype)
    return torch.randn(5, 8, dtype=dtype, requires_grad=True), torch.tensor([0, 10, 3, 3, 7]), head


@pytest.mark.parametrize("way", [lambda head: head, lambda head: head.forward], ids=["module", "method"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_kernel_gets_the_head_and_its_loss_has_the_gradient(kernel, bias, way):
    hidden, targets, head = scene(bias=bias)
    weights = [hidden, *head.parameters()]
    found = supervised_losses(hidden, targets, way(head), fused=True)
    expected = supervised_losses(hidden, targets, head, fused=False)
    assert kernel == [{"dtype": torch.float32, "weight": torch.float32, "reduction": "sum", "sums": torch.float32}], (
        "once, and not for fused=False"
    )
    torch.testing.assert_close(found.sft, expected.sft)
    assert (found.sft_count, int(found.consistency_count), float(found.consistency)) == (5, 0, 0.0)
    for ours, theirs in zip(
        torch.autograd.grad(found.sft, weights), torch.autograd.grad(expected.sft, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_under_autocast_the_products_are_in_its_dtype(kernel):
    hidden, targets, head = scene()
    with torch.autocast("cpu", torch.bfloat16):
        found = fused_cross_entropy(hidden, targets, head)
        expected = supervised_losses(hidden, targets, head).sft
    assert (kernel[0]["dtype"], kernel[0]["weight"]) == (torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.float32


class Scaled(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def hooked():
    head = nn.Linear(8, 11)
    head.register_forward_hook(lambda module, args, output: 2 * output)
    return head


def patched():
    head = nn.Linear(8, 11)
    forward = head.forward
    head.forward = lambda hidden: 2 * forward(hidden)
    return head


UNFIT = {
    "no module": (torch.tanh, "got builtin"),
    "another module": (nn.Sequential(nn.Linear(8, 11), nn.Tanh()), "got Sequential"),
    "another forward": (Scaled(8, 11), "the forward of Scaled"),
    "another forward's method": (Scaled(8, 11).forward, "the forward of Scaled"),
    "another method": (nn.Linear(8, 11).extra_repr, "not its forward"),
    "hooks": (hooked(), "has hooks"),
    "a forward of its own": (patched(), "the forward of Linear"),
    "float64": (nn.Linear(8, 11, dtype=torch.float64), "got torch.float64"),
    "float16": (nn.Linear(8, 11, dtype=torch.float16), "got torch.float16"),
    "elsewhere": (nn.Linear(8, 11, device="meta"), "the weight is on meta"),
}


@pytest.mark.parametrize("head", UNFIT.values(), ids=UNFIT)
def test_what_a_kernel_would_leave_out_is_refused(kernel, head):
    head, why = head
    hidden = torch.randn(5, 8, dtype=head.weight.dtype if isinstance(head, nn.Linear) else None)
    with pytest.raises(UnsupportedModelError, match=f"needs a plain linear head .*; .*{why}"):
        supervised_losses(hidden, torch.arange(5), head, fused=True)
    assert not kernel


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, FUNCTIONAL, None)
    hidden, targets, head = scene()
    with pytest.raises(MissingDependencyError, match=r"needs liger-kernel .* Install tokencurric\[fused\]"):
        fused_cross_entropy(hidden, targets, head)


@pytest.mark.parametrize("broken", ["missing", "old", "does not import"])
def test_a_library_that_is_of_no_use_is_passed_over(monkeypatch, broken):
    module = ModuleType(FUNCTIONAL)
    if broken == "old":
        module.liger_fused_linear_cross_entropy = lambda hidden, weight, targets, bias, reduction: None
    elif broken == "does not import":

        def fail(name):
            raise OSError("no driver")

        module.__getattr__ = fail
    monkeypatch.setitem(sys.modules, FUNCTIONAL, None if broken == "missing" else module)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    hidden, targets, head = scene()
    assert not fused.fits(hidden, head)
    assert supervised_losses(hidden, targets, head).sft.requires_grad


@pytest.mark.parametrize("trained", ["hidden", "head", "nothing"])
def test_gradients_where_they_are_asked_for(kernel, trained):
    hidden, targets, head = scene()
    hidden.requires_grad_(trained == "hidden")
    head.requires_grad_(trained == "head")
    loss = fused_cross_entropy(hidden, targets, head)
    assert loss.requires_grad == (trained != "nothing")
    if trained != "nothing":
        (2 * loss).backward()
        assert (hidden.grad is None, head.weight.grad is None) == (trained == "head", trained == "hidden")


def test_a_graph_may_be_gone_through_twice(kernel):
    hidden, targets, head = scene()
    loss = 0.3 * fused_cross_entropy(hidden, targets, head)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], first)


def test_a_teacher_needs_logits_of_our_own(kernel):
    hidden, targets, head = scene()
    taught = Taught(torch.randn(5, 8), head)
    with pytest.raises(RangeError, match="needs fused=None or False with taught="):
        supervised_losses(hidden, targets, head, taught=taught, loss=ConsistencyLoss(), fused=True)


def test_it_is_used_by_itself_only_where_it_fits(kernel, monkeypatch):
    hidden, targets, head = scene()
    supervised_losses(hidden, targets, head)
    assert not fused.fits(hidden, head)
    assert not kernel, "on a CPU it is not"

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert not fused.fits(hidden, torch.tanh)
    supervised_losses(hidden, targets, head)
    assert len(kernel) == 1
    supervised_losses(hidden, targets, head, fused=False)
    supervised_losses(hidden, targets, head, chunk=2)
    supervised_losses(hidden, targets, head, taught=Taught(torch.randn(5, 8), head), loss=ConsistencyLoss())
    assert len(kernel) == 1


def test_steps_without_a_teacher_take_it_and_lose_nothing(kernel):
    batch = tiny_batch(RAGGED, answers=2)
    losses = []
    for way in (True, False):
        model = tiny_llava()
        objective = EPIC(Random(), constant(0.8, margin=0.3), weight=0, fused=way)
        out = objective(model, batch, step=1, total=2)
        out.loss.backward()
        losses.append((out.loss.detach(), model.lm_head.weight.grad, model.get_input_embeddings().weight.grad))
    assert len(kernel) == 1
    torch.testing.assert_close(losses[0], losses[1])
    EPIC(Random(), constant(0.8, margin=0.3), fused=True)(tiny_llava(), batch, step=1, total=2)
    assert len(kernel) == 1, "with a teacher it is not asked for"


INTERPRETED = """
import torch
from torch import nn
from tokencurric.losses import supervised_losses

for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    for bias in (True, False):
        torch.manual_seed(0)
        head, targets = nn.Linear(16, 50, bias=bias, dtype=dtype), torch.randint(50, (7,))
        found = []
        for fused in (True, False):
            hidden = torch.randn(7, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
            head.zero_grad()
            sums = supervised_losses(hidden, targets, head.forward, fused=fused)
            (0.3 * sums.sft).backward(retain_graph=True)
            (0.7 * sums.sft).backward()
            found.append([sums.sft.detach(), hidden.grad, *(p.grad.clone() for p in head.parameters())])
        assert sums.sft > 1
        for ours, theirs in zip(*found, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        assert all(bool(each.any()) for each in found[0])

# A head trained on hidden states that are not.
head, targets = nn.Linear(16, 50), torch.randint(50, (7,))
hidden = torch.randn(7, 16)
found = [torch.autograd.grad(supervised_losses(hidden, targets, head, fused=fused).sft, head.weight)[0]
         for fused in (True, False)]
torch.testing.assert_close(*found)
assert bool(found[0].any())
with torch.no_grad():
    found = [supervised_losses(hidden, targets, head, fused=fused).sft for fused in (True, False)]
torch.testing.assert_close(*found)
print("equal")
"""


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs the extra `fused`: nox -s fused")
def test_the_kernel_itself_interpreted_on_a_cpu():
    """Triton runs its kernels on a CPU, slowly, when told so before it is imported."""
    ran = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert ran.stdout.strip() == "equal", ran.stderr
