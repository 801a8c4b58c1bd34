"""Small multimodal models in the styles that people write them in, their adapters, and a reference for all of them.

They differ in who calls the decoder, in what keeps keys and values, in what a layer returns and in what a mask looks
like. The numbers are made in one place, `Block.mix`, so one reference holds for all: each row alone, without padding
and without a cache, gathered by hand.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokencurric import ModelAdapter

PAD, IMAGE, WORDS, PATCHES, PATCH = 0, 1, 30, 12, 8
WIDTH, HEADS, DEPTH = 32, 2, 4


class Block(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = number
        self.before, self.between = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.joint, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def queries_keys_values(self, x, turn):
        joint = self.joint(self.before(x)).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        cos, sin = turn
        turned = []
        for each in joint[:2]:
            first, second = each.chunk(2, -1)
            turned.append(each * cos + torch.cat((-second, first), -1) * sin)
        return [*turned, joint[2]]

    def mix(self, x, turn, sees, past=None):
        """Output and all keys and values; `sees` None is causal by place, for a prompt, or everything, for a token."""
        queries, keys, values = self.queries_keys_values(x, turn)
        if past is not None:
            keys, values = torch.cat((past[0], keys), 2), torch.cat((past[1], values), 2)
        causal = sees is None and past is None
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=sees, is_causal=causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.between(x)))), (keys, values)


class Words(nn.Module):
    """Embeddings, positions and masks that the styles share."""

    block: ClassVar[Any] = Block

    def __init__(self):
        super().__init__()
        self.patches, self.words = nn.Linear(PATCH, WIDTH), nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(self.block(number) for number in range(DEPTH))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def embed(self, ids, images=None):
        x = self.words(ids)
        return x if images is None else x.masked_scatter((ids == IMAGE)[..., None], self.patches(images))


def turn_of(position, dtype=torch.float64):
    """Cosines and sines [batch 1 tokens head_width] of positions [batch tokens]."""
    speeds = 100.0 ** -torch.linspace(0, 1, WIDTH // HEADS // 2, dtype=dtype)
    angle = (position[..., None] * speeds).repeat(1, 1, 2)[:, None]
    return angle.cos(), angle.sin()


def causal(real, new):
    """[batch 1 new keys]: which of all positions `real` [batch keys] the last `new` see."""
    key = torch.arange(real.shape[1])
    query = key[-new:, None]
    return ((key <= query) & real[:, None, None, :]) | (key == query)


class Whole(ModelAdapter):
    """What adapters of the styles share."""

    aligned: ClassVar = {"turn": -2}

    def __init__(self, model):
        self.model, self.layers, self.norm, self.head = model, model.blocks, model.norm, model.head

    def visual_mask(self, inputs):
        return inputs["ids"] == IMAGE

    def padding_mask(self, inputs):
        return inputs["ids"] != PAD

    def token_ids(self, inputs):
        return inputs["ids"]

    def mask_arguments(self, sees, hidden, arguments):
        return {"sees": sees}

    def query_and_keys(self, layer, hidden, arguments):
        return layer.queries_keys_values(hidden, arguments["turn"])[:2]


def held(entry):
    return 0 if entry is None else entry[0].shape[2]


# A decoder that `generate` calls by itself; a list of dicts; masks over keys; a head that only training calls


class KeyMaskBlock(Block):
    def forward(self, x, cos, sin, attention_mask=None, kv=None):
        keys = x.shape[1] + (0 if kv is None else kv["key"].shape[2])
        sees = torch.ones(x.shape[1], keys, dtype=torch.bool).tril() if kv is None else torch.ones(1, keys).bool()
        if attention_mask is not None:
            own = torch.eye(x.shape[1], keys, dtype=torch.bool) if kv is None else torch.zeros(1, keys).bool()
            sees = (sees & attention_mask[:, None, None, :keys].bool()) | own
        x, (key, value) = self.mix(x, (cos, sin), sees, None if kv is None else (kv["key"], kv["value"]))
        return x, {"key": key, "value": value}


class Decoder(Words):
    block = KeyMaskBlock

    def forward(self, x, attention_mask=None, kv_cache=None, start=0):
        cos, sin = turn_of(torch.arange(start, start + x.shape[1])[None].expand(len(x), -1))
        kv_cache = [None] * DEPTH if kv_cache is None else kv_cache
        for number, block in enumerate(self.blocks):
            x, kv_cache[number] = block(x, cos, sin, attention_mask, kv_cache[number])
        return self.norm(x), kv_cache


class DirectDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = Decoder()

    def forward(self, ids, images=None, attention_mask=None, targets=None):
        out, _ = self.decoder(self.decoder.embed(ids, images), attention_mask)
        loss = None
        if targets is not None:
            out = self.decoder.head(out)
            loss = functional.cross_entropy(out.reshape(-1, out.shape[-1]), targets.reshape(-1), ignore_index=-100)
        return out, loss

    @torch.no_grad()
    def drive(self, ids, images, more):
        """Logits after the prompt and after each of the words `more` [batch words], [1 + words batch vocabulary]."""
        mask = (ids != PAD).long()
        out, cache = self.decoder(self.decoder.embed(ids, images), mask)
        found = [self.decoder.head(out[:, -1])]
        for word in more.unbind(1):
            start, mask = mask.shape[1], torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
            out, cache = self.decoder(self.decoder.embed(word[:, None]), mask, cache, start)
            found.append(self.decoder.head(out[:, -1]))
        return torch.stack(found)


class DirectAdapter(Whole):
    aligned: ClassVar = {"cos": -2, "sin": -2}

    def __init__(self, model):
        super().__init__(model.decoder)
        self.model, self.decoder = model, model.decoder

    def padding_mask(self, inputs):
        return inputs["attention_mask"].bool()

    def token_ids(self, inputs):
        return inputs.get("ids")

    def mask_arguments(self, sees, hidden, arguments):
        return {"attention_mask": sees[:, 0, -1]}  # the last query sees every token, and layers are causal themselves

    def query_and_keys(self, layer, hidden, arguments):
        return layer.queries_keys_values(hidden, (arguments["cos"], arguments["sin"]))[:2]

    def cache(self, inputs):
        return inputs.get("kv_cache")

    def returned_cache(self, output):
        return output[1]

    def cached(self, cache, layer):
        return 0 if cache[layer] is None else cache[layer]["key"].shape[2]

    def training_inputs(self, inputs):
        return {**inputs, "targets": torch.zeros(1, 1, dtype=torch.long)}


# Layers that return keys and values; a tuple of pairs, made anew in each step


class PairBlock(Block):
    def forward(self, x, turn, sees, past=None):
        return self.mix(x, turn, sees, past)


class Pairs(Words):
    block = PairBlock

    def forward(self, ids, images=None, past=None, real=None):
        real = ids != PAD if real is None else real
        turn = turn_of(torch.arange(real.shape[1] - ids.shape[1], real.shape[1])[None])
        x, sees, presents = self.embed(ids, images), causal(real, ids.shape[1]), ()
        for number, block in enumerate(self.blocks):
            x, present = block(x, turn, sees, past=None if past is None else past[number])
            presents += (present,)
        return self.head(self.norm(x)), presents

    @torch.no_grad()
    def drive(self, ids, images, more):
        logits, past = self(ids, images)
        found, real = [logits[:, -1]], ids != PAD
        for word in more.unbind(1):
            real = torch.cat((real, real.new_ones(len(real), 1)), 1)
            logits, past = self(word[:, None], past=past, real=real)
            found.append(logits[:, -1])
        return torch.stack(found)


class PairsAdapter(Whole):
    def cache(self, inputs):
        return inputs.get("past")

    def returned_cache(self, output):
        return output[1]

    def cached(self, cache, layer):
        return held(cache[layer])


# A cache object that the forward makes itself, without room for another attribute


class Slots:
    __slots__ = ("entries", "real")

    def __init__(self):
        self.entries, self.real = [None] * DEPTH, None


class InsideBlock(Block):
    def forward(self, x, turn, sees, cache):
        past = None if cache is None else cache.entries[self.number]
        x, entry = self.mix(x, turn, sees, past)
        if cache is not None:
            cache.entries[self.number] = entry
        return x


@dataclass
class Answered:
    logits: Tensor
    cache: Any


class Inside(Words):
    block = InsideBlock
    made: ClassVar[Any] = Slots

    def forward(self, ids, images=None, cache=None, use_cache=True):
        if cache is None and use_cache:
            cache = self.made()
        real = ids != PAD
        if cache is not None:
            real = cache.real = real if cache.real is None else torch.cat((cache.real, real), 1)
        turn = turn_of(torch.arange(real.shape[1] - ids.shape[1], real.shape[1])[None])
        x, sees = self.embed(ids, images), causal(real, ids.shape[1])
        for block in self.blocks:
            x = block(x, turn, sees, cache)
        return Answered(self.head(self.norm(x)), cache)

    @torch.no_grad()
    def drive(self, ids, images, more):
        out = self(ids, images)
        found = [out.logits[:, -1]]
        for word in more.unbind(1):
            out = self(word[:, None], cache=out.cache)
            found.append(out.logits[:, -1])
        return torch.stack(found)


class InsideAdapter(Whole):
    def cache(self, inputs):
        return inputs.get("cache")

    def returned_cache(self, output):
        return output.cache

    def cached(self, cache, layer):
        return held(cache.entries[layer])


# A plain dict that layers write to


class DictBlock(Block):
    def forward(self, x, turn, sees, cache):
        x, cache[self.number] = self.mix(x, turn, sees, cache.get(self.number))
        return x


class Dicts(Words):
    block = DictBlock

    def forward(self, ids, images=None, cache=None):
        cache = {} if cache is None else cache
        cache["real"] = torch.cat((cache["real"], ids != PAD), 1) if "real" in cache else ids != PAD
        turn = turn_of(torch.arange(cache["real"].shape[1] - ids.shape[1], cache["real"].shape[1])[None])
        x, sees = self.embed(ids, images), causal(cache["real"], ids.shape[1])
        for block in self.blocks:
            x = block(x, turn, sees, cache)
        return self.head(self.norm(x))

    @torch.no_grad()
    def drive(self, ids, images, more):
        cache = {}
        found = [self(ids, images, cache)[:, -1]]
        found += [self(word[:, None], cache=cache)[:, -1] for word in more.unbind(1)]
        return torch.stack(found)


class DictsAdapter(Whole):
    caches = ("cache",)

    def cache(self, inputs):
        return inputs.get("cache")

    def cached(self, cache, layer):
        return held(cache.get(layer))


# Keys and values that stay in the model between its calls


class Stateful(Words):
    block = PairBlock

    def __init__(self):
        super().__init__()
        self.entries = None

    def forward(self, ids, images=None, *, real, fresh):
        if fresh:
            self.entries = [None] * DEPTH
        turn = turn_of(torch.arange(real.shape[1] - ids.shape[1], real.shape[1])[None])
        x, sees = self.embed(ids, images), causal(real, ids.shape[1])
        for number, block in enumerate(self.blocks):
            x, self.entries[number] = block(x, turn, sees, past=self.entries[number])
        return self.head(self.norm(x))

    @torch.no_grad()
    def drive(self, ids, images, more):
        real = ids != PAD
        found = [self(ids, images, real=real, fresh=True)[:, -1]]
        for word in more.unbind(1):
            real = torch.cat((real, real.new_ones(len(real), 1)), 1)
            found.append(self(word[:, None], real=real, fresh=False)[:, -1])
        return torch.stack(found)


class StatefulAdapter(Whole):
    def cache(self, inputs):
        return None if inputs["fresh"] else self.model.entries

    def returned_cache(self, output):
        return self.model.entries

    def cached(self, cache, layer):
        return held(cache[layer])


# Keys and values that attention modules keep to themselves


class KeepingBlock(Block):
    def __init__(self, number):
        super().__init__(number)
        self.entry = None

    def forward(self, x, turn, sees, fresh):
        x, self.entry = self.mix(x, turn, sees, None if fresh else self.entry)
        return x


class WritingBlock(Block):
    """Writes to tensors that are made once, as long as the longest sequence."""

    def __init__(self, number):
        super().__init__(number)
        self.register_buffer("kept", torch.zeros(2, 3, HEADS, 64, WIDTH // HEADS), persistent=False)
        self.count = 0

    def forward(self, x, turn, sees, fresh):
        self.count = 0 if fresh else self.count
        past = None if fresh else self.kept[:, : len(x), :, : self.count].unbind()
        x, entry = self.mix(x, turn, sees, past)
        self.count = entry[0].shape[2]
        self.kept[:, : len(x), :, : self.count] = torch.stack(entry)
        return x


class Keeping(Stateful):
    block = KeepingBlock

    def forward(self, ids, images=None, *, real, fresh):
        turn = turn_of(torch.arange(real.shape[1] - ids.shape[1], real.shape[1])[None])
        x, sees = self.embed(ids, images), causal(real, ids.shape[1])
        for block in self.blocks:
            x = block(x, turn, sees, fresh)
        return self.head(self.norm(x))


class Writing(Keeping):
    block = WritingBlock


# One mask [tokens keys] for all rows


class SquareBlock(Block):
    def forward(self, x, turn, sees, cache):
        past = None if cache is None else cache.entries[self.number]
        x, entry = self.mix(x, turn, sees[None, None], past)
        if cache is not None:
            cache.entries[self.number] = entry
        return x


class Square(Inside):
    block = SquareBlock

    def forward(self, ids, images=None, cache=None, use_cache=True):
        if cache is None and use_cache:
            cache = Slots()
        start = 0 if cache is None else held(cache.entries[0])
        turn = turn_of(torch.arange(start, start + ids.shape[1])[None])
        x = self.embed(ids, images)
        sees = torch.ones(ids.shape[1], start + ids.shape[1], dtype=torch.bool).tril(start)
        for block in self.blocks:
            x = block(x, turn, sees, cache)
        return Answered(self.head(self.norm(x)), cache)


class SquareAdapter(InsideAdapter):
    def padding_mask(self, inputs):
        return None

    def mask_arguments(self, sees, hidden, arguments):
        return {"sees": sees[0, 0]}


STYLES = {
    "direct": (DirectDecoder, DirectAdapter),
    "pairs": (Pairs, PairsAdapter),
    "inside": (Inside, InsideAdapter),
    "dicts": (Dicts, DictsAdapter),
    "stateful": (Stateful, StatefulAdapter),
}


def made(kind, seed=0):
    """A model of random weights, large enough in scale that every token matters."""
    torch.manual_seed(seed)
    model = kind().double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 1.5 / weight.shape[1] ** 0.5)
    return model


RAGGED = ((2, 1, 4), (0, 1, 2), (9, 0, 3))  # words before, images, words after
EVEN = ((2, 1, 4), (3, 1, 3))


def batch_of(rows=RAGGED, seed=1):
    """Ids, padded on the left, and the patches of all images."""
    generator = torch.Generator().manual_seed(seed)

    def words(count):
        return torch.randint(2, WORDS, (count,), generator=generator).tolist()

    sequences = [words(before) + [IMAGE] * PATCHES * images + words(after) for before, images, after in rows]
    width, images = max(map(len, sequences)), sum(row[1] for row in rows)
    padded = torch.tensor([[PAD] * (width - len(row)) + row for row in sequences])
    return padded, torch.randn(images * PATCHES, PATCH, generator=generator).double()


@torch.no_grad()
def reference(model, ids, images, more, drops, layers):
    """Logits after the prompt and after each of the words `more`, [1 + words batch vocabulary].

    Args:
        model: of any style. ids: [batch seq]. images: of all rows. more: [batch words].
        drops: [batch seq] each, what is gone from each of `layers` on.
    """
    parts = getattr(model, "decoder", model)
    embedded, found = parts.embed(ids, images), []
    for row in range(len(ids)):
        real = ids[row] != PAD
        x = torch.cat((embedded[row][real], parts.embed(more[row])))[None]
        at = torch.arange(x.shape[1])
        for number, block in enumerate(parts.blocks):
            if number in layers:
                gone = functional.pad(drops[layers.index(number)][row][real], (0, more.shape[1]))[at]
                x, at = x[:, ~gone], at[~gone]
            x, _ = block.mix(x, turn_of(at[None]), None)
        found.append(parts.head(parts.norm(x))[0, -1 - more.shape[1] :])
    return torch.stack(found, 1)
