"""Wrong compressors, each with one mistake that somebody makes, and the check that is there to catch it.

All but a few are `Right` with one thing changed. At the end stand some that are right and look wrong.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokencurric import VisualView
from tokencurric.budget import Budget, row_budget
from tokencurric.compressors import Tags
from tokencurric.draws import hash_tensor
from tokencurric.ranking import keep_largest, keep_top, rank_keys, with_position

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
    also = frozenset({"draws_anew", "heeds_every_bit"})
    needs = frozenset()
    tags = Tags(deterministic=False, uses_position=True)

    def answer(self, view, keep, seed):
        rows = torch.arange(view.tokens.shape[0], device=view.tokens.device)
        score = hash_tensor(seed, rows[:, None], view.rank) >> 32
        return keep_largest(with_position(score), view.mask, row_budget(keep, view.mask))


class DrawsFromAStream(Right):
    """A generator seeded anew in each call: the draw hangs on the shape of the batch."""

    caught_by = "answers_each_row_alone"
    also = frozenset(
        {
            "draws_anew",
            "heeds_every_bit",
            "ignores_padding",
            "runs_without_values",
            "compiles",
            "answers_alike_in_every_mode",
        }
    )
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
    also = frozenset({"heeds_every_bit"})
    needs = frozenset()
    tags = Tags(deterministic=False, uses_position=True)

    def answer(self, view, keep, seed):
        score = hash_tensor(0, view.keys_of_rows[:, None], view.rank) >> 32
        return keep_largest(with_position(score), view.mask, row_budget(keep, view.mask))


class DrawsAlikeForAllSamples(Right):
    caught_by = "draws_anew"
    also = frozenset({"heeds_every_bit"})
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
    also = frozenset({"answers_alike_in_every_dtype", "answers_alike_in_every_mode", "runs_without_values"})
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


class TakesLongCountsOnly(Right):
    """Looks the last survivor up by the counts as they come: an index has to be int64."""

    caught_by = "takes_counts_of_every_dtype"

    def answer(self, view, keep, seed):
        keys = rank_keys(self.scores(view, seed)).masked_fill(~view.mask, torch.iinfo(torch.int64).min)
        if not isinstance(keep, Tensor) or not keys.shape[1]:
            return super().answer(view, keep, seed)
        last = keep.clamp(min=1, max=keys.shape[1])[:, None] - 1
        least = keys.sort(1, descending=True).values.gather(1, last)
        return (keys >= least) & view.mask & (keep > 0)[:, None]


class WrapsAround(Right):
    """Subtracts before it converts: below 0 a number without a sign is a large one."""

    caught_by = "takes_counts_of_every_dtype"

    def answer(self, view, keep, seed):
        count = row_budget(keep, view.mask)
        if isinstance(keep, Tensor):
            count = torch.minimum((keep - 1).long() + 1, view.counts)
        return keep_top(self.scores(view, seed), view.mask, count)


class ChoosesOtherwiseWithGradients(Right):
    caught_by = "answers_alike_in_every_mode"

    def __call__(self, view, keep, *, seed=0):
        sign = -1 if torch.is_grad_enabled() else 1
        with torch.no_grad():
            return keep_top(sign * self.scores(view, seed), view.mask, row_budget(keep, view.mask))


class ChoosesOtherwiseWithoutGradients(Right):
    """Asks about gradients only where the inputs have them, as a check of `training` does."""

    caught_by = "answers_alike_in_every_mode"
    also = frozenset({"answers_with_a_mask"})

    def __call__(self, view, keep, *, seed=0):
        live = torch.is_grad_enabled() and view.tokens.requires_grad
        with torch.no_grad():
            return keep_top((-1 if live else 1) * self.scores(view, seed), view.mask, row_budget(keep, view.mask))


class MultipliesUnderAutocast(Right):
    """A product of matrices, which autocast brings to half precision."""

    caught_by = "answers_alike_in_every_mode"
    needs = frozenset()

    def scores(self, view, seed):
        tokens = view.tokens.float()
        return (tokens @ torch.linspace(1, 2, tokens.shape[2], device=tokens.device)[:, None])[..., 0]


class ScoresInTheDefaultDtype(Right):
    caught_by = "answers_alike_in_every_mode"

    def scores(self, view, seed):
        return self.attention(view).to(torch.get_default_dtype())


class CountsInTheTokensDtype(Right):
    """Ranks by a running sum in the dtype of the tokens: in bfloat16, 256 and 1 are 256."""

    caught_by = "holds_at_real_sizes"

    def answer(self, view, keep, seed):
        order = rank_keys(self.scores(view, seed)).masked_fill(~view.mask, torch.iinfo(torch.int64).min)
        order = order.argsort(1, descending=True)
        place = torch.ones_like(view.tokens[..., 0]).cumsum(1) - 1
        kept = place < row_budget(keep, view.mask)[:, None]
        return torch.zeros_like(view.mask).scatter(1, order, kept) & view.mask


class RoundsItsCounts(Right):
    """The budget in the dtype of the tokens."""

    caught_by = "holds_at_real_sizes"

    def answer(self, view, keep, seed):
        count = row_budget(keep, view.mask).to(view.tokens.dtype).long().minimum(view.counts)
        return keep_top(self.scores(view, seed), view.mask, count)


class RanksInEightBits(Right):
    """The rank of a token's score, as uint8: the 257th is first again."""

    caught_by = "holds_at_real_sizes"
    narrow: ClassVar[torch.dtype] = torch.uint8

    def scores(self, view, seed):
        keys = rank_keys(self.attention(view)).masked_fill(~view.mask, torch.iinfo(torch.int64).min)
        return -keys.argsort(1, descending=True).argsort(1).to(self.narrow).float()


class RanksInSevenBits(RanksInEightBits):
    """The same as int8: the 129th is before the first."""

    narrow = torch.int8


class TakesSignedSeeds(Right):
    """Makes a tensor of its seed: half of the seeds that a training passes are too large for that."""

    caught_by = "takes_every_seed"
    also = frozenset({"heeds_every_bit"})
    needs = frozenset()
    tags = Tags(deterministic=False, uses_position=True)

    def answer(self, view, keep, seed):
        seeds = torch.full((), seed, dtype=torch.int64, device=view.tokens.device)
        score = hash_tensor(0, seeds, view.keys_of_rows[:, None], view.rank) >> 32
        return keep_largest(with_position(score), view.mask, row_budget(keep, view.mask))


class RefusesLargeSeeds(Right):
    """Has no use for its seed, and makes a generator of NumPy's old kind from it."""

    caught_by = "takes_every_seed"
    also = frozenset({"ignores_the_seed"})

    def scores(self, view, seed):
        if seed >= 2**32:
            raise ValueError("Seed must be between 0 and 2**32 - 1")
        return self.attention(view)


class HeedsPart(Right):
    """Draws by what `seeds` and `keys` make of its seed and of the rows' keys: all of them. No mistake."""

    needs = frozenset()
    tags = Tags(deterministic=False, uses_position=True)

    def seeds(self, seed):
        return seed

    def keys(self, keys):
        return keys

    def answer(self, view, keep, seed):
        score = hash_tensor(self.seeds(seed), self.keys(view.keys_of_rows)[:, None], view.rank) >> 32
        return keep_largest(with_position(score), view.mask, row_budget(keep, view.mask))


class HeedsOneBitOfTheKey(HeedsPart):
    caught_by = "heeds_every_bit"

    def keys(self, keys):
        return keys & 1


class HeedsAByteOfTheKey(HeedsPart):
    caught_by = "heeds_every_bit"

    def keys(self, keys):
        return keys.to(torch.uint8).long()


class HeedsTheSignOfTheKey(HeedsPart):
    """All keys from the data are small, those of prompts are not: they meet at the end of the range."""

    caught_by = "heeds_every_bit"

    def keys(self, keys):
        return keys.clamp(-(2**20), 2**20)


class HeedsAByteOfTheSeed(HeedsPart):
    caught_by = "heeds_every_bit"

    def seeds(self, seed):
        return seed % 256


class ClipsItsSeed(HeedsPart):
    caught_by = "heeds_every_bit"

    def seeds(self, seed):
        return min(seed, 2**31 - 1)


@dataclass(frozen=True)
class Tires(Right):
    """Right for 500 calls."""

    caught_by = "never_tires"
    calls: list[int] = field(default_factory=lambda: [0])

    def scores(self, view, seed):
        self.calls[0] += 1
        return self.attention(view) * (1 if self.calls[0] <= 500 else -1)


def _tiring():
    calls = [0]

    def sign():
        calls[0] += 1
        return 1 if calls[0] % 900 else -1

    return sign


class TiresWhereNobodyLooks(Right):
    """Wrong in every 900th call; the count is no attribute."""

    caught_by = "never_tires"
    also = ALL  # whichever check makes the 900th call
    sign = staticmethod(_tiring())

    def scores(self, view, seed):
        return self.attention(view) * type(self).sign()


@dataclass(frozen=True)
class CountsItsCalls(Right):
    """Will be wrong after a million calls."""

    caught_by = "never_tires"
    calls: list[int] = field(default_factory=list)

    def scores(self, view, seed):
        self.calls.append(len(self.calls))
        return self.attention(view) * (1 if len(self.calls) <= 10**6 else -1)


class KeepsTheFirst(Right):
    """Whatever they are, and does not claim to use the order."""

    caught_by = "follows_a_permutation"
    needs = frozenset()

    def scores(self, view, seed):
        return torch.zeros_like(view.tokens[..., 0])


@dataclass(frozen=True)
class LikesThePrompt(Right):
    """Keeps what is most similar to the mean of the prompt; without prompt text, all tokens tie. No mistake."""

    needs: ClassVar[frozenset[str]] = frozenset({"text_tokens"})

    def scores(self, view, seed):
        text = view.signal("text_tokens", who="LikesThePrompt").float()
        if view.text_valid is not None:
            text = text.masked_fill(~view.text_valid[..., None], 0.0)
        tokens = view.tokens.float()
        return (tokens * text.sum(1)[:, None]).sum(-1) / tokens.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)


class StartsAnywhere(Right):
    """Evenly spread from a start that is drawn: few different answers. No mistake."""

    needs = frozenset()
    tags = Tags(deterministic=False, uses_position=True, nested=False)

    def answer(self, view, keep, seed):
        count, most = row_budget(keep, view.mask)[:, None], view.counts[:, None].clamp(min=1)
        start = (hash_tensor(seed, view.keys_of_rows[:, None]) & 2**32 - 1) % most
        place = (view.rank.clamp(min=0) + start) % most * count
        return (place % most < count) & view.mask


@dataclass(frozen=True)
class StoresWhatItNeeds(Right):
    """Ranks by a table that it makes once for each number of columns, and stores its last answer. No mistake."""

    tables: dict[Any, Tensor] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)

    def scores(self, view, seed):
        table = self.tables.setdefault((view.mask.shape[1], view.mask.device), torch.ones(view.mask.shape[1]))
        return self.attention(view) * table.to(view.mask.device)

    def answer(self, view, keep, seed):
        self.last["mask"] = super().answer(view, keep, seed)
        return self.last["mask"].clone()


RIGHT = [Right, HeedsPart, LikesThePrompt, StartsAnywhere, StoresWhatItNeeds]
GALLERY = [
    kind for kind in vars().copy().values() if isinstance(kind, type) and issubclass(kind, Right) and kind not in RIGHT
]
