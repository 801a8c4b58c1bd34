"""Divergences against their formulas, and both losses from hidden states against logits made all at once.

The laws that all divergences obey are tested in tests/testing.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tokencurric import ConsistencyLoss, Selection
from tokencurric.errors import RangeError, ShapeError
from tokencurric.losses import Taught, forward_kl, jensen_shannon, reverse_kl, supervised, supervised_losses
from tokencurric.losses.divergences import _floor
from tokencurric.losses.features import feature_distance
from tokencurric.testing.strategies import LogitsCase, logits


def probabilities(values: Tensor, temperature: float) -> list[float]:
    weights = [math.exp((x - max(values.tolist())) / temperature) for x in values.tolist()]
    return [weight / sum(weights) for weight in weights]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@given(logits(kinds=("normal", "masked", "flat")))
def test_divergences_are_their_formulas(case: LogitsCase):
    student, teacher = case.tensors(torch.float64)
    for i in range(case.positions):
        q, p = (probabilities(x[i], case.temperature) for x in (student, teacher))
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        expected = {forward_kl: kl(p, q), reverse_kl: kl(q, p), jensen_shannon: (kl(p, m) + kl(q, m)) / 2}
        for divergence, value in expected.items():
            found = divergence(student, teacher, temperature=case.temperature)[i]
            assert float(found) == pytest.approx(case.temperature**2 * value, abs=1e-9)


def test_the_three_divergences_differ():
    student, teacher = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 0.0, 0.5]])
    assert len({round(float(d(student, teacher)), 4) for d in (forward_kl, reverse_kl, jensen_shannon)}) == 3


def test_rounding_below_zero_is_no_divergence_but_has_its_gradient():
    raw = torch.tensor([-1e-9, -0.5, 0.0, 2.0], requires_grad=True)
    mended = _floor(raw)
    assert mended.tolist() == [0.0, 0.0, 0.0, 2.0]
    assert torch.autograd.grad(mended.sum(), raw)[0].tolist() == [1.0] * 4


@given(logits())
def test_jensen_shannon_is_symmetric_and_bounded(case: LogitsCase):
    student, teacher = case.tensors(torch.float64)
    here, there = jensen_shannon(student, teacher), jensen_shannon(teacher, student)
    torch.testing.assert_close(here, there)
    assert bool((here <= math.log(2) + 1e-9).all())


@given(logits(kinds=("normal",)), st.randoms(use_true_random=False))
def test_positions_may_lie_on_several_axes(case: LogitsCase, random):
    student, teacher = (torch.stack((x, x.flip(0))) for x in case.tensors(torch.float64))
    mask = torch.tensor([[random.random() < 0.5 for _ in range(case.positions)] for _ in range(2)])
    loss = ConsistencyLoss(temperature=2.0)
    for counted in (None, mask.view(2, case.positions)):
        flat = None if counted is None else counted.flatten()
        total, count = loss.sum(student, teacher, counted)
        expected, number = loss.sum(student.flatten(0, 1), teacher.flatten(0, 1), flat)
        torch.testing.assert_close(total, expected)
        assert int(count) == int(number)
    assert int(loss.sum(student, teacher)[1]) == 2 * case.positions


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature: float):
    x = torch.zeros(1, 2)
    for divergence in (forward_kl, reverse_kl, jensen_shannon):
        with pytest.raises(RangeError, match="A divergence needs a temperature > 0; got temperature="):
            divergence(x, x, temperature=temperature)
    with pytest.raises(RangeError, match="ConsistencyLoss needs a temperature > 0; got temperature="):
        ConsistencyLoss(temperature)


@pytest.mark.usefixtures("unchecked")
def test_logits_of_two_shapes_are_refused():
    with pytest.raises(ShapeError, match=r"A divergence needs student and teacher logits of one shape; got \(1, 2\)"):
        forward_kl(torch.zeros(1, 2), torch.zeros(1, 3))


@pytest.mark.usefixtures("unchecked")
def test_a_mask_with_a_vocabulary_axis_is_refused():
    with pytest.raises(ShapeError, match=r"ConsistencyLoss needs a mask of shape \(1,\); got \(1, 2\)"):
        ConsistencyLoss()(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))


def test_the_module_says_how_it_is_set():
    assert (
        repr(ConsistencyLoss(2.0, divergence=reverse_kl)) == "ConsistencyLoss(temperature=2.0, divergence=reverse_kl)"
    )


def test_the_module_uses_its_temperature_and_divergence():
    student, teacher = LogitsCase(positions=3, vocab=4).tensors()
    for divergence in (forward_kl, jensen_shannon):
        found = ConsistencyLoss(2.0, divergence=divergence)(student, teacher)
        assert float(found) == pytest.approx(float(divergence(student, teacher, temperature=2.0).mean()))


DIM, VOCAB = 5, 7


class Scene:
    """Hidden states of a student and a teacher, their heads, and targets, in float64."""

    def __init__(self, positions: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.hidden = torch.randn(positions, DIM, dtype=torch.float64, requires_grad=True)
        self.taught_hidden = torch.randn(positions, DIM, dtype=torch.float64, requires_grad=True)
        self.targets = torch.randint(0, VOCAB, (positions,))
        self.head = nn.Linear(DIM, VOCAB, dtype=torch.float64)
        self.teacher_head = nn.Linear(DIM, VOCAB, dtype=torch.float64)
        self.counts = torch.rand(positions) < 0.6

    def taught(self, counts: bool) -> Taught:
        return Taught(hidden=self.taught_hidden, head=self.teacher_head, counts=self.counts if counts else None)

    def gradients(self, value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, (self.hidden, self.head.weight, self.head.bias))


@given(st.integers(1, 6), st.integers(0, 99), st.integers(1, 7), st.booleans(), st.sampled_from([1.0, 2.0]))
def test_losses_in_chunks_equal_losses_at_once(positions: int, seed: int, chunk: int, counts: bool, temperature: float):
    scene = Scene(positions, seed)
    loss = ConsistencyLoss(temperature)
    found = supervised_losses(
        scene.hidden, scene.targets, scene.head, taught=scene.taught(counts), loss=loss, chunk=chunk
    )
    student, teacher = scene.head(scene.hidden), scene.teacher_head(scene.taught_hidden)
    sft = functional.cross_entropy(student, scene.targets, reduction="sum")
    compared = scene.counts if counts else torch.ones_like(scene.counts)
    kept, _ = loss.sum(student, teacher, compared)

    torch.testing.assert_close(found.sft, sft)
    torch.testing.assert_close(found.consistency, kept)
    assert (found.sft_count, int(found.consistency_count)) == (positions, int(compared.sum()))
    wanted = scene.gradients(0.3 * sft + 0.7 * kept)
    for a, b in zip(scene.gradients(0.3 * found.sft + 0.7 * found.consistency), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_each_loss_has_a_gradient_of_its_own():
    scene = Scene(4, 0)
    found = supervised_losses(
        scene.hidden, scene.targets, scene.head, taught=scene.taught(False), loss=ConsistencyLoss()
    )
    sft = torch.autograd.grad(found.sft, scene.hidden, retain_graph=True)[0]
    consistency = torch.autograd.grad(found.consistency, scene.hidden)[0]
    assert not torch.allclose(sft, consistency)
    assert bool(consistency.any())


@pytest.mark.parametrize("chunk", [None, 2])
def test_the_teacher_gets_no_gradient(chunk: int | None):
    scene = Scene(5, 1)
    found = supervised_losses(
        scene.hidden, scene.targets, scene.head, taught=scene.taught(True), loss=ConsistencyLoss(), chunk=chunk
    )
    (found.sft + found.consistency).backward()
    assert scene.taught_hidden.grad is None
    assert scene.teacher_head.weight.grad is None
    assert bool(scene.head.weight.grad.any())


@pytest.mark.parametrize("chunk", [None, 1])
def test_what_the_teacher_says_where_it_does_not_count_changes_nothing(chunk: int | None):
    scene = Scene(3, 2)
    scene.counts = torch.tensor([True, False, True])
    results = []
    for bad in (0.0, float("nan")):
        scene.taught_hidden = scene.taught_hidden.detach().clone()
        scene.taught_hidden[1] = bad
        found = supervised_losses(
            scene.hidden, scene.targets, scene.head, taught=scene.taught(True), loss=ConsistencyLoss(), chunk=chunk
        )
        results.append((found.consistency, *scene.gradients(found.consistency)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_teacher_there_is_cross_entropy_alone():
    scene = Scene(4, 3)
    found = supervised_losses(scene.hidden, scene.targets, scene.head)
    torch.testing.assert_close(
        found.sft, functional.cross_entropy(scene.head(scene.hidden), scene.targets, reduction="sum")
    )
    assert (float(found.consistency), int(found.consistency_count)) == (0.0, 0)


def test_no_position_gives_zero_with_a_live_gradient():
    scene = Scene(0, 4)
    found = supervised_losses(
        scene.hidden, scene.targets, scene.head, taught=scene.taught(False), loss=ConsistencyLoss()
    )
    assert (float(found.sft.detach()), float(found.consistency), found.sft_count, int(found.consistency_count)) == (
        0.0,
        0.0,
        0,
        0,
    )
    (found.sft + found.consistency).backward()
    assert scene.hidden.grad is not None


def test_half_precision_logits_are_summed_in_float32():
    hidden = torch.randn(64, DIM, dtype=torch.bfloat16, requires_grad=True)
    head = nn.Linear(DIM, VOCAB, dtype=torch.bfloat16)
    targets = torch.zeros(64, dtype=torch.int64)
    found = supervised_losses(hidden, targets, head)
    assert found.sft.dtype == torch.float32
    torch.testing.assert_close(found.sft, functional.cross_entropy(head(hidden).float(), targets, reduction="sum"))


def test_logits_are_never_all_there():
    seen: list[int] = []
    scene = Scene(10, 5)

    def head(rows: Tensor) -> Tensor:
        seen.append(rows.shape[0])
        return scene.head(rows)

    supervised_losses(scene.hidden, scene.targets, head, chunk=3).sft.backward()
    assert max(seen) == 3
    assert sum(seen) == 20  # once forward, once again in the backward pass
    seen.clear()
    with torch.no_grad():
        supervised_losses(scene.hidden, scene.targets, head, chunk=3)
    assert sum(seen) == 10


def test_the_chunk_is_chosen_by_the_vocabulary():
    seen: list[int] = []

    def head(rows: Tensor) -> Tensor:
        seen.append(rows.shape[0])
        return rows[:, :1].expand(-1, 2**20)

    supervised_losses(torch.randn(17, 2), torch.zeros(17, dtype=torch.int64), head)
    assert max(seen) == 8


@pytest.mark.usefixtures("unchecked")
def test_hidden_states_without_a_target_are_refused():
    scene = Scene(3, 6)
    with pytest.raises(ShapeError, match=r"supervised_losses needs one hidden state a target; got 2 targets, 3 hidden"):
        supervised_losses(scene.hidden, scene.targets[:2], scene.head)
    short = Taught(hidden=scene.taught_hidden[:2], head=scene.teacher_head)
    with pytest.raises(
        ShapeError, match="needs one hidden state a target; got 3 targets, 3 hidden states and 2 taught"
    ):
        supervised_losses(scene.hidden, scene.targets, scene.head, taught=short, loss=ConsistencyLoss())


def test_a_chunk_of_nothing_is_refused():
    scene = Scene(3, 7)
    with pytest.raises(RangeError, match="supervised_losses needs chunk >= 1; got chunk=0"):
        supervised_losses(scene.hidden, scene.targets, scene.head, chunk=0)


def test_a_divergence_may_be_infinite_but_is_never_nan():
    student, teacher = torch.tensor([[-torch.inf, 0.0]]), torch.zeros(1, 2)
    assert forward_kl(student, teacher).tolist() == [torch.inf]
    assert forward_kl(teacher, student).tolist() == [pytest.approx(math.log(2))]


def test_the_distance_of_features_is_that_of_a_loop_over_what_both_keep():
    torch.manual_seed(0)
    kept = torch.rand(3, 6) < 0.6
    taught = kept & (torch.rand(3, 6) < 0.8) | (torch.rand(3, 6) < 0.3)
    few, many = Selection.from_mask(kept), Selection.from_mask(taught)
    full = {i: torch.randn(2, 3, 6, 4) for i in (2, 3)}
    student = {i: few.gather(x[0]).requires_grad_() for i, x in full.items()}
    teacher = {i: many.gather(x[1]).requires_grad_() for i, x in full.items()}
    weight = torch.tensor([1, 0, 3])

    expected = 0.0
    for row in range(3):
        both = (kept & taught)[row].nonzero().flatten().tolist()
        gaps = [(x[0, row, p] - x[1, row, p]).square().mean() for x in full.values() for p in both]
        expected += float(weight[row]) * float(sum(gaps)) / max(1, len(gaps))

    found = feature_distance(student, few, teacher, many, weight)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert all(x.grad is not None for x in student.values())
    assert all(x.grad is None for x in teacher.values())


def test_padding_is_no_position_of_the_features():
    torch.manual_seed(0)
    everything = Selection.from_mask(torch.ones(2, 5, dtype=torch.bool))
    real = torch.tensor([[True] * 5, [False, False, True, True, True]])
    ours, theirs, weight = {2: torch.randn(2, 5, 4)}, {2: torch.randn(2, 5, 4)}, torch.tensor([1.0, 3.0])
    found = float(feature_distance(ours, everything, theirs, everything, weight, real))
    gaps = (ours[2] - theirs[2]).square().mean(-1)
    assert found == pytest.approx(float(gaps[0].mean() + 3 * gaps[1, 2:].mean()), rel=1e-5)
    assert found != pytest.approx(float(feature_distance(ours, everything, theirs, everything, weight)), rel=1e-2)


def test_one_common_position_and_one_layer_are_not_averaged_away():
    one = Selection.from_mask(torch.tensor([[True]]))
    found = feature_distance(
        {3: torch.zeros(1, 1, 2)}, one, {3: torch.tensor([[[1.0, 3.0]]])}, one, torch.tensor([2.0])
    )
    assert float(found) == 2 * (1 + 9) / 2
    assert float(feature_distance({}, one, {}, one, torch.tensor([2.0]))) == 0.0


class CountingHead(nn.Module):
    """A head that is no plain layer: its vocabulary shows in what it returns."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, 4, generator=torch.Generator().manual_seed(1)))
        self.rows: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.rows.append(len(hidden))
        return hidden @ self.weight.T


@pytest.mark.parametrize(
    ("chunk", "forward", "backward"),
    [(None, [1, 5], []), (5, [5], []), (6, [5], []), (2, [2, 2, 1], [1, 2, 2])],
)
def test_logits_are_made_twice_only_where_that_saves_memory(chunk: int | None, forward: list[int], backward: list[int]):
    head, hidden = CountingHead(11), torch.randn(5, 4, requires_grad=True)
    sums = supervised_losses(hidden, torch.arange(5), head, chunk=chunk)
    assert head.rows == forward
    sums.sft.backward()
    assert head.rows == forward + backward
    head.rows.clear()
    with torch.no_grad():
        supervised_losses(hidden, torch.arange(5), head, chunk=chunk)
    assert head.rows == forward


@pytest.mark.parametrize("way", [lambda head: head, lambda head: head.forward], ids=["module", "method"])
def test_a_head_that_drops_draws_the_same_in_backward(way):
    class Dropping(CountingHead):
        def __init__(self) -> None:
            super().__init__(11)
            self.drop, self.said = nn.Dropout(0.5), []

        def forward(self, hidden: Tensor) -> Tensor:
            logits = super().forward(self.drop(hidden))
            self.said.append(logits.detach())
            return logits

    torch.manual_seed(3)
    head = Dropping()
    sums = supervised_losses(torch.randn(4, 4, requires_grad=True), torch.arange(4), way(head), chunk=2)
    sums.sft.backward()
    first, second, again, before = head.said
    assert torch.equal(again, second)
    assert torch.equal(before, first)
    head.said.clear()
    supervised_losses(torch.ones(4, 4, requires_grad=True), torch.arange(4), way(head), chunk=2)
    assert not torch.equal(*head.said), "control: it does drop"


def test_a_huge_vocabulary_goes_position_by_position(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervised, "_LOGITS_A_CHUNK", 10)
    head = CountingHead(11)
    supervised_losses(torch.randn(3, 4), torch.arange(3), head)
    assert head.rows == [1, 1, 1, 1]


def test_a_row_without_a_common_position_adds_nothing():
    here = Selection.from_mask(torch.tensor([[True, False]]))
    there = Selection.from_mask(torch.tensor([[False, True]]))
    one = {0: torch.ones(1, 1, 2)}
    assert float(feature_distance(one, here, {0: torch.zeros(1, 1, 2)}, there, torch.ones(1))) == 0.0


@pytest.mark.usefixtures("unchecked")
def test_features_of_other_layers_or_widths_are_not_compared():
    everything = Selection.from_mask(torch.ones(1, 2, dtype=torch.bool))
    student = {0: torch.zeros(1, 2, 3)}
    for teacher in ({1: torch.zeros(1, 2, 3)}, {0: torch.zeros(1, 2, 4)}):
        with pytest.raises(ShapeError, match="The feature loss needs a teacher with the student's layers and width"):
            feature_distance(student, everything, teacher, everything, torch.ones(1))
