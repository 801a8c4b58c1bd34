"""Wrong compressors, each with one mistake that somebody makes, and the check that is there to catch it.

All but a few are `Right` with one thing changed.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokencurric import VisualView
from tokencurric.budget import Budget, row_budget
from tokencurric.compressors import Tags
from tokencurric.draws import hash_tensor
from tokencurric.ranking import keep_largest, keep_top, with_position

ALL = frozenset({"*"})  # a mistake so large that any check may see it


@dataclass(frozen=True)
class Right:
    """Keeps what is attended to most: no mistake."""

    caught_by: ClassVar[str] = ""
    also: ClassVar[frozenset[str]] = frozenset()  # checks that see the same mistake, unavoidably
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    tags: ClassVar[Tags] = Tags()

    @torch.no_grad()
    def __call__(self, view: VisualView, keep: Budget, *, seed: int = 0) -> Tensor:
        return self.answer(view, keep, seed)

    def answer(self, view: VisualView, keep: Budget, seed: int) -> Tensor:
        return keep_top(self.scores(view, seed), view.mask, row_budget(keep, view.mask))

    def scores(self, view: VisualView, seed: int) -> Tensor:
        return self.attention(view)

    def attention(self, view: VisualView) -> Tensor:
        return view.signal("attention", who=type(self).__name__).float()


class OneTooFew(Right):
    caught_by = "keeps_the_budget"

    def answer(self, view, keep, seed):
        count = row_budget(keep, view.mask)
        short = torch.where(count < view.counts, (count - 1).clamp(min=0), count)
        return keep_top(self.scores(view, seed), view.mask, short)


class KeepsAtLeastOne(Right):
    caught_by = "keeps_the_budget"

    def answer(self, view, keep, seed):
        count = row_budget(keep, view.mask).clamp(min=1).minimum(view.counts)
        return keep_top(self.scores(view, seed), view.mask, count)


class TiesComeAlong(Right):
    """Everything that scores as high as the last survivor survives too."""

    caught_by = "keeps_the_budget"

    def answer(self, view, keep, seed):
        kept = super().answer(view, keep, seed)
        scores = self.scores(view, seed)
        least = scores.masked_fill(~kept, torch.inf).amin(1, keepdim=True) if scores.shape[1] else scores
        return kept | ((scores >= least) & view.mask & kept.any(1, keepdim=True))


class KeepsPadding(Right):
    caught_by = "keeps_tokens_only"

    def answer(self, view, keep, seed):
        return super().answer(view, keep, seed) | ~view.mask


class RoundsItsBudget(Right):
    """An even number of tokens, also where all may stay."""

    caught_by = "keeps_all_when_allowed"
    tags = Tags(exact=False)

    def answer(self, view, keep, seed):
        count = row_budget(keep, view.mask)
        return keep_top(self.scores(view, seed), view.mask, count - count % 2)


class OneBudgetForAll(Right):
    """The first row's count, for every row."""

    caught_by = "takes_a_budget_a_row"
    tags = Tags(exact=False)
    also = frozenset({"answers_each_row_alone"})

    def answer(self, view, keep, seed):
        first = keep[:1].expand_as(keep) if isinstance(keep, Tensor) else keep
        return super().answer(view, first, seed)


class ChangesItsMind(Right):
    """The most attended for even budgets, the least attended for odd ones."""

    caught_by = "nests"

    def answer(self, view, keep, seed):
        count = row_budget(keep, view.mask)
        scores = self.scores(view, seed)
        return keep_top(torch.where(count[:, None] % 2 == 1, -scores, scores), view.mask, count)


class AveragesOverTheBatch(Right):
    """How far from the mean of the batch, where it should be that of the row."""

    caught_by = "answers_each_row_alone"
    also = frozenset({"follows_a_permutation"})  # two tokens are equally far from their mean, but for rounding

    def scores(self, view, seed):
        attention = self.attention(view)
        good = view.mask & attention.isfinite()
        mean = torch.where(good, attention, 0.0).sum() / good.sum()
        return (attention - mean).abs()


class CountsRows(Right):
    """Draws by the row's place in the batch, where it should be by the sample."""

    caught_by = "answers_each_row_alone"
    also = frozenset({"draws_anew"})
    needs = frozenset()
    tags = Tags(deterministic=False, uses_position=True)

    def answer(self, view, keep, seed):
        rows = torch.arange(view.tokens.shape[0], device=view.tokens.device)
        score = hash_tensor(seed, rows[:, None], view.rank) >> 32
        return keep_largest(with_position(score), view.mask, row_budget(keep, view.mask))


class DrawsFromAStream(Right):
    """A generator seeded anew in each call: the draw hangs on the shape of the batch."""

    caught_by = "answers_each_row_alone"
    also = frozenset({"draws_anew", "ignores_padding", "runs_without_values", "compiles"})
    needs = frozenset()
    tags = Tags(deterministic=False, uses_position=True)

    def scores(self, view, seed):
        return torch.rand(view.mask.shape, generator=torch.Generator().manual_seed(seed))


class AveragesOverPadding(Right):
    caught_by = "ignores_padding"

    def scores(self, view, seed):
        attention = self.attention(view)
        mean = attention.nan_to_num(0.0).mean(1, keepdim=True)
        return (attention - mean).abs()


class ReadsPaddedText(Right):
    """Compares with the mean of the prompt, its padding included."""

    caught_by = "ignores_padding"
    needs = frozenset({"text_tokens"})

    def scores(self, view, seed):
        text = view.signal("text_tokens", who="ReadsPaddedText").float().nan_to_num(0.0)
        query = text.sum(1) / max(text.shape[1], 1) + 1.0
        tokens = view.tokens.float()
        return (tokens - query[:, None]).square().sum(-1)


class CountsColumns(Right):
    """Draws by the column in the padded layout, where it should be by the token's number in its row."""

    caught_by = "ignores_padding"
    needs = frozenset()
    tags = Tags(deterministic=False, uses_position=True)

    def answer(self, view, keep, seed):
        column = torch.arange(view.tokens.shape[1], device=view.tokens.device)
        score = hash_tensor(seed, view.keys_of_rows[:, None], column) >> 32
        return keep_largest(with_position(score), view.mask, row_budget(keep, view.mask))


class PrefersTheStart(Right):
    caught_by = "follows_a_permutation"

    def scores(self, view, seed):
        return self.attention(view) - 0.1 * view.rank


class ScoresInHalfPrecision(Right):
    """Scores that differ by more than rounding in float32 become ties."""

    caught_by = "follows_a_permutation"

    def scores(self, view, seed):
        return self.attention(view).bfloat16()


class LastOfEqualsWins(Right):
    caught_by = "breaks_ties_by_position"

    def answer(self, view, keep, seed):
        count = row_budget(keep, view.mask)
        return keep_top(self.scores(view, seed).flip(1), view.mask.flip(1), count).flip(1)


class LetsNanWin(Right):
    caught_by = "ranks_nan_last"

    def scores(self, view, seed):
        return self.attention(view).nan_to_num(nan=torch.inf)


class OneNanSpoilsAll(Right):
    caught_by = "ranks_nan_last"

    def scores(self, view, seed):
        attention = self.attention(view)
        return attention / attention.masked_fill(~view.mask, 0.0).sum(1, keepdim=True)


class DrawsFromTheProcess(Right):
    """Adds noise from the process' generator."""

    caught_by = "repeats_itself"
    also = ALL

    def scores(self, view, seed):
        return torch.rand_like(self.attention(view))


class SeedsTheProcess(Right):
    """A fixed draw, at the price of everybody else's."""

    caught_by = "leaves_the_process_alone"

    def scores(self, view, seed):
        torch.manual_seed(seed)
        return self.attention(view)


class SwitchesGradOff(Right):
    caught_by = "leaves_the_process_alone"
    also = frozenset({"replays_under_checkpointing", "compiles"})

    def __call__(self, view, keep, *, seed=0):
        torch.set_grad_enabled(False)
        return self.answer(view, keep, seed)


class ClaimsToIgnoreItsSeed(Right):
    caught_by = "ignores_the_seed"
    needs = frozenset()
    tags = Tags(uses_position=True)

    def answer(self, view, keep, seed):
        score = hash_tensor(seed, view.keys_of_rows[:, None], view.rank) >> 32
        return keep_largest(with_position(score), view.mask, row_budget(keep, view.mask))


class IgnoresItsSeed(Right):
    caught_by = "draws_anew"
    needs = frozenset()
    tags = Tags(deterministic=False, uses_position=True)

    def answer(self, view, keep, seed):
        score = hash_tensor(0, view.keys_of_rows[:, None], view.rank) >> 32
        return keep_largest(with_position(score), view.mask, row_budget(keep, view.mask))


class DrawsAlikeForAllSamples(Right):
    caught_by = "draws_anew"
    needs = frozenset()
    tags = Tags(deterministic=False, uses_position=True)

    def answer(self, view, keep, seed):
        return keep_largest(with_position(hash_tensor(seed, view.rank) >> 32), view.mask, row_budget(keep, view.mask))


@dataclass(frozen=True)
class RemembersScores(Right):
    """A cache that takes one shape for one question."""

    caught_by = "forgets"
    also = ALL
    cache: dict[Any, Tensor] = field(default_factory=dict)

    def scores(self, view, seed):
        return self.cache.setdefault(view.mask.shape, self.attention(view).clone())


@dataclass(frozen=True)
class WarmsUp(Right):
    """Keeps the least attended in its second and later calls."""

    caught_by = "repeats_itself"
    also = ALL
    calls: list[int] = field(default_factory=list)

    def scores(self, view, seed):
        self.calls.append(1)
        return self.attention(view) * (1 if len(self.calls) == 1 else -1)


class WritesToItsInput(Right):
    caught_by = "leaves_its_inputs_alone"
    also = frozenset({"compiles", "answers_alike_in_every_layout"})

    def scores(self, view, seed):
        attention = view.signal("attention", who="WritesToItsInput")
        return attention.masked_fill_(~view.mask, -1.0).float()


class LeavesAGraph(Right):
    caught_by = "saves_nothing_for_backward"

    def __call__(self, view, keep, *, seed=0):
        return self.answer(view, keep, seed)

    def scores(self, view, seed):
        return self.attention(view) ** 2


class AnswersInFloat(Right):
    caught_by = "answers_with_a_mask"

    def answer(self, view, keep, seed):
        return super().answer(view, keep, seed).float()


class TakesFloat32Only(Right):
    caught_by = "answers_with_a_mask"
    also = frozenset({"answers_alike_in_every_dtype", "runs_without_values"})
    needs = frozenset()

    def scores(self, view, seed):
        return view.tokens @ torch.ones(view.tokens.shape[2], device=view.tokens.device)


class NeedsAToken(Right):
    """Fails where a batch has no visual token at all."""

    caught_by = "answers_with_a_mask"
    also = ALL

    def scores(self, view, seed):
        attention = self.attention(view)
        return attention - attention.amin(1, keepdim=True).nan_to_num(0.0) * 0


class MultipliesInHalfPrecision(Right):
    """Norms in the dtype of the input."""

    caught_by = "answers_alike_in_every_dtype"
    needs = frozenset()

    def scores(self, view, seed):
        return view.tokens.square().sum(-1)


class ReadsMemory(Right):
    """Takes every tensor for a contiguous one."""

    caught_by = "answers_alike_in_every_layout"
    also = frozenset({"answers_with_a_mask"})

    def scores(self, view, seed):
        attention = view.signal("attention", who="ReadsMemory")
        rows, columns = attention.shape
        return attention.as_strided((rows, columns), (columns, 1)).float()


@dataclass(frozen=True)
class HoldsALambda(Right):
    caught_by = "survives_copy_and_pickle"
    change: Any = field(default_factory=lambda: lambda x: x)

    def scores(self, view, seed):
        return self.change(self.attention(view))


class PeeksAtWhatItDidNotDeclare(Right):
    caught_by = "reads_what_it_declares"

    def scores(self, view, seed):
        attention = self.attention(view)
        return attention if view.cls_attention is None else attention + view.cls_attention.float()


class DeclaresTooMuch(Right):
    caught_by = "refuses_without_a_signal"
    needs = frozenset({"attention", "keys"})


class MakesDo(Right):
    """Answers by something else when its signal is missing."""

    caught_by = "refuses_without_a_signal"

    def scores(self, view, seed):
        return view.tokens.float().norm(dim=-1) if view.attention is None else self.attention(view)


class WaitsForTheDevice(Right):
    caught_by = "runs_without_values"

    def scores(self, view, seed):
        return self.attention(view) + (1.0 if int(view.counts.max()) > 100 else 0.0)


class LoopsOverRows(Right):
    caught_by = "runs_rows_together"

    def scores(self, view, seed):
        return torch.stack([row * 2 + 1 for row in self.attention(view)])


class ComparesAllPairs(Right):
    caught_by = "grows_no_faster_than_its_input"

    def scores(self, view, seed):
        attention = self.attention(view)
        return (
            (attention[:, :, None] - attention.masked_fill(~view.mask, -1.0).nan_to_num(0.0)[:, None])
            .sign()
            .clamp(min=0)
            .sum(-1)
        )


class ChangesWhenCompiled(Right):
    caught_by = "compiles"

    def scores(self, view, seed):
        return self.attention(view) * (-1 if torch.compiler.is_compiling() else 1)


GALLERY = [
    kind for kind in list(vars().values()) if isinstance(kind, type) and issubclass(kind, Right) and kind is not Right
]
