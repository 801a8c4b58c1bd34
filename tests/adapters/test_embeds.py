"""Calls with `inputs_embeds` and `visual_mask=`, as models make them that put images among the embeddings themselves.

The configuration names no visual token. What is compared with runs at full length with the dropped tokens hidden, and
without a cache for each new token.
"""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional

from tokencurric import DART, EPIC, FastV, Random, Uniform, compress
from tokencurric.curriculum import constant
from tokencurric.errors import ShapeError, StateError, UnsupportedModelError
from tokencurric.testing.models import Recording, apart, hidden

IMAGE, PATCHES, WIDTH, VOCAB, DEPTH, NEW = -200, 12, 32, 80, 4, 4
TEXT = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": DEPTH,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


class Splicing:
    """What the original LLaVA does: one id stands for all tokens of an image, and rows are padded as embeddings."""

    def splice(self, ids, real, images, labels=None):
        rows, visual, targets, features = [], [], [], iter(self.projector(images))
        labels = torch.full_like(ids, -100) if labels is None else labels
        for row, mask, wanted in zip(ids, real.bool(), labels, strict=True):
            parts, marks, learnt = [], [], []
            for token, target in zip(row[mask], wanted[mask], strict=True):
                image = int(token) == IMAGE
                parts.append(next(features) if image else self.get_input_embeddings()(token[None]))
                marks += [image] * len(parts[-1])
                learnt += [-100] * PATCHES if image else [int(target)]
            rows.append(torch.cat(parts))
            visual.append(torch.tensor(marks))
            targets.append(torch.tensor(learnt))
        width = max(map(len, rows))

        def padded(values, filler=0):
            return torch.stack([functional.pad(v.T, (width - len(v), 0), value=filler).T for v in values])

        ones = [torch.ones(len(row), dtype=torch.long) for row in rows]
        return padded(rows), padded(ones), padded(visual, False), padded(targets, -100)


class LlavaLike(Splicing, hf.LlamaForCausalLM):
    """A subclass of the text model, as the original code has it: its forward and its `generate` make embeddings."""

    def __init__(self, config):
        super().__init__(config)
        self.projector = nn.Linear(8, WIDTH)

    def forward(self, input_ids=None, images=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs):
        if images is not None:
            inputs_embeds, attention_mask, _, spliced = self.splice(input_ids, attention_mask, images, labels)
            input_ids, labels = None, None if labels is None else spliced
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, labels=labels, **kwargs
        )

    @torch.no_grad()
    def generate(self, inputs, images, attention_mask=None, **kwargs):
        embeds, mask, _, _ = self.splice(inputs, attention_mask, images)
        return super().generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)


class ChatLike(Splicing, nn.Module):
    """A text model of its own class within, as remote code has it (InternVL-Chat, MiniCPM-V)."""

    def __init__(self, text):
        super().__init__()
        self.language_model, self.projector = text, nn.Linear(8, WIDTH)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    @torch.no_grad()
    def generate(self, inputs, images, attention_mask, **kwargs):
        embeds, mask, _, _ = self.splice(inputs, attention_mask, images)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)


def scaled(model):
    model.eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(0, 1.0 if "embed_tokens" in name else weight.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def llava(request):
    torch.manual_seed(0)
    return scaled(LlavaLike._from_config(hf.LlamaConfig(**TEXT), attn_implementation=request.param))


@pytest.fixture(scope="module", params=[hf.LlamaForCausalLM, hf.Qwen2ForCausalLM], ids=["llama", "qwen2"])
def chat(request):
    torch.manual_seed(0)
    return scaled(ChatLike(request.param(request.param.config_class(**TEXT))))


ROWS = ((2, 1, 4), (1, 1, 2), (9, 0, 3))  # words before, images, words after


def batch_of(rows=ROWS, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def words(count):
        return torch.randint(5, VOCAB, (count,), generator=generator).tolist()

    ids = [words(before) + [IMAGE] * images + words(after) for before, images, after in rows]
    width = max(map(len, ids))
    return {
        "inputs": torch.tensor([[0] * (width - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
        "images": torch.randn(sum(row[1] for row in rows), PATCHES, 8, generator=generator),
    }


@torch.no_grad()
def recomputed(text, embeds, mask, dropped, layer, new):
    """Logits before each of the tokens `new` [batch words], from whole forwards without a cache."""
    found = []
    for count in range(new.shape[1]):
        longer = torch.cat((embeds, text.get_input_embeddings()(new[:, :count])), 1)
        gone, real = functional.pad(dropped, (0, count)), functional.pad(mask, (0, count), value=1)
        with hidden(text, gone, layer):
            found.append(text(inputs_embeds=longer, attention_mask=real, use_cache=False).logits[:, -1])
    return torch.stack(found)


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("compressor", [FastV(), DART(), Random()], ids=lambda c: type(c).__name__)
@torch.no_grad()
def test_the_original_llava(llava, compressor, layer):
    if layer == 0:
        compressor = Uniform()
    batch, recording = batch_of(), Recording(compressor)
    embeds, mask, visual, _ = llava.splice(batch["inputs"], batch["attention_mask"], batch["images"])
    with compress(llava, recording, keep=3, layer=layer, visual_mask=visual):
        out = llava.generate(**batch, **GREEDY)
        dropped = recording.dropped(*visual.shape)
        prefill = llava(batch["inputs"], batch["images"], batch["attention_mask"]).logits
    assert torch.equal(recording.dropped(*visual.shape), dropped), "forward and generate choose alike"
    assert dropped.sum(1).tolist() == [PATCHES - 3] * 2 + [0]
    expected = recomputed(llava, embeds, mask, dropped, layer, out.sequences)
    assert apart(torch.stack(out.logits), expected) < 1e-4
    assert apart(prefill[:, -1], expected[0]) < 1e-4
    plain = recomputed(llava, embeds, mask, torch.zeros_like(dropped), layer, out.sequences)
    assert apart(plain, expected) > 1e-2, "control"


@pytest.mark.parametrize("compressor", [FastV(), Uniform()], ids=lambda c: type(c).__name__)
@torch.no_grad()
def test_a_text_model_that_is_fed_by_another(chat, compressor):
    batch, recording, text = batch_of(), Recording(compressor), chat.language_model
    embeds, mask, visual, _ = chat.splice(batch["inputs"], batch["attention_mask"], batch["images"])
    with compress(text, recording, keep=3, layer=2, visual_mask=visual):
        out = chat.generate(**batch, **GREEDY)
    dropped = recording.dropped(*visual.shape)
    expected = recomputed(text, embeds, mask, dropped, 2, out.sequences)
    assert apart(torch.stack(out.logits), expected) < 1e-4
    plain = recomputed(text, embeds, mask, torch.zeros_like(dropped), 2, out.sequences)
    assert apart(plain, expected) > 1e-2, "control"


@torch.no_grad()
def test_a_second_call_on_the_cache(chat):
    batch, recording, text = batch_of(), Recording(Uniform()), chat.language_model
    embeds, mask, visual, _ = chat.splice(batch["inputs"], batch["attention_mask"], batch["images"])
    more = torch.randint(5, VOCAB, (3, 3), generator=torch.Generator().manual_seed(3))
    longer = functional.pad(mask, (0, 3), value=1)
    cache = hf.DynamicCache(config=text.config)
    with compress(text, recording, keep=3, layer=2, visual_mask=visual):
        text(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True)
        new = text.get_input_embeddings()(more)
        ours = text(inputs_embeds=new, attention_mask=longer, past_key_values=cache).logits
    dropped = functional.pad(recording.dropped(*visual.shape), (0, 3))
    with hidden(text, dropped, 2):
        full = text(inputs_embeds=torch.cat((embeds, new), 1), attention_mask=longer, use_cache=False).logits[:, -3:]
    assert apart(ours, full) < 1e-4
    plain = text(inputs_embeds=torch.cat((embeds, new), 1), attention_mask=longer, use_cache=False).logits[:, -3:]
    assert apart(plain, full) > 1e-2, "control"


@torch.no_grad()
def test_generation_without_a_cache(chat):
    """Also for a text model that is given ids: the mask is that of the prompt, and each step is a longer sequence."""
    text, recording = chat.language_model, Recording(Random())
    ids = torch.randint(5, VOCAB, (2, 18), generator=torch.Generator().manual_seed(4))
    mask, visual = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    mask[0, :2], visual[0, 3:9], visual[1, 1:13] = 0, True, True
    embeds = text.get_input_embeddings()(ids)
    expected = None
    for inputs in ({"input_ids": ids}, {"inputs_embeds": embeds}):
        row_key = torch.tensor([3, 4])
        for cached in (True, False):
            with compress(text, recording, keep=3, layer=1, visual_mask=visual, row_key=row_key):
                out = text.generate(**inputs, attention_mask=mask, use_cache=cached, **GREEDY)
            if expected is None:
                dropped = recording.dropped(*ids.shape)
                expected = recomputed(text, embeds, mask, dropped, 1, out.sequences[:, -NEW:])
            assert apart(torch.stack(out.logits), expected) < 1e-4
    plain = recomputed(text, embeds, mask, torch.zeros_like(dropped), 1, out.sequences[:, -NEW:])
    assert apart(plain, expected) > 1e-2, "control"


@torch.no_grad()
def test_a_call_that_broke_off_leaves_nothing_to_the_next(llava):
    batch, recording = batch_of(), Recording(Uniform())
    embeds, mask, visual, _ = llava.splice(batch["inputs"], batch["attention_mask"], batch["images"])
    other = torch.zeros_like(mask)
    with compress(llava, recording, keep=3, layer=1, visual_mask=visual):
        with pytest.raises(TypeError):  # between the model's hook and the decoder's
            llava(input_ids=other, attention_mask=other, images=3)
        llava.model(inputs_embeds=embeds)
    assert recording.dropped(*visual.shape).sum(1).tolist() == [PATCHES - 3] * 2 + [0]


@torch.no_grad()
def test_layers_that_run_past_their_decoder(llava):
    class Own(LlavaLike):
        def forward(self, input_ids, **kwargs):
            hidden = self.get_input_embeddings()(input_ids)
            for layer in self.model.layers:
                hidden = layer(hidden, position_embeddings=self.model.rotary_emb(hidden, torch.arange(4)[None]))
            return self.lm_head(self.model.norm(hidden))

    model = Own(hf.LlamaConfig(**TEXT)).eval()
    ids = torch.full((1, 4), 7)
    model(ids)
    with (
        compress(model, Uniform(), keep=1, layer=1, visual_mask=ids > 0),
        pytest.raises(UnsupportedModelError, match="has not called its LlamaModel as a module"),
    ):
        model(ids)


@torch.no_grad()
def test_beams(llava):
    """Each row is repeated, and with it what was given per row: masks, keys, counts."""
    batch, recording = batch_of(), Recording(Random())
    embeds, mask, visual, _ = llava.splice(batch["inputs"], batch["attention_mask"], batch["images"])
    given = {"visual_mask": visual, "row_key": torch.tensor([4, 5, 6]), "keep": torch.tensor([3, 2, 1])}
    settings = {"num_beams": 3, "length_penalty": 0.0, "output_scores": True, "return_dict_in_generate": True}
    with compress(llava, recording, layer=1, **given):
        out = llava.generate(**batch, max_new_tokens=NEW, do_sample=False, **settings)
        several = llava.generate(**batch, max_new_tokens=2, do_sample=True, num_return_sequences=2)
        llava.generate(**batch, max_new_tokens=1, do_sample=False)
    assert len(several) == 6
    dropped = recording.dropped(*visual.shape)
    beams = recording.calls[0][1].view(3, 3, -1)
    assert torch.equal(beams, recording.calls[-1][1][:, None].expand_as(beams)), "beams of a prompt share its choice"
    for gone, near in ((dropped, True), (torch.zeros_like(dropped), False)):
        logits = recomputed(llava, embeds, mask, gone, 1, out.sequences)
        chosen = logits.log_softmax(-1).gather(2, out.sequences.T[..., None])[..., 0].sum(0)
        assert (apart(out.sequences_scores, chosen) < 1e-4) == near


@torch.no_grad()
def test_rows_are_told_apart_by_length_or_by_row_key(llava):
    rows = ((2, 1, 4), (2, 1, 4), (1, 1, 2))
    batch, recording = batch_of(rows), Recording(Random())
    visual = llava.splice(batch["inputs"], batch["attention_mask"], batch["images"])[2]
    for key in (None, torch.tensor([1, 2, 3])):
        with compress(llava, recording, keep=3, layer=1, visual_mask=visual, row_key=key):
            llava.generate(**batch, max_new_tokens=1, do_sample=False)
    by_length, by_key = (mask for _, mask in recording.calls)
    assert torch.equal(by_length[0], by_length[1])
    assert not torch.equal(by_length[0], by_length[2])
    assert not torch.equal(by_key[0], by_key[1])


@pytest.mark.parametrize("layer", [0, 2])
@torch.no_grad()
def test_instructblip_whose_generate_calls_the_text_model(layer):
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.InstructBlipConfig(
        vision_config={**tower, "image_size": 24, "patch_size": 6},
        qformer_config={**tower, "encoder_hidden_size": 16, "vocab_size": VOCAB},
        text_config=hf.LlamaConfig(**TEXT).to_dict(),
        num_query_tokens=PATCHES,
        image_token_index=VOCAB - 1,
    )
    model = scaled(hf.InstructBlipForConditionalGeneration(config))
    ids = torch.randint(5, VOCAB - 1, (2, PATCHES + 6))
    ids[0, 2 : 2 + PATCHES] = ids[1, 4 : 4 + PATCHES] = VOCAB - 1
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    inputs = {
        "pixel_values": torch.randn(2, 3, 24, 24), "input_ids": ids, "attention_mask": mask,
        "qformer_input_ids": torch.randint(5, VOCAB - 1, (2, 4)),
    }  # fmt: skip
    recording, seen = Recording(FastV() if layer else Uniform()), []
    hook = model.language_model.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    with compress(model, recording, keep=3, layer=layer, visual_mask=ids == VOCAB - 1):
        out = model.generate(**inputs, **GREEDY)
    hook.remove()
    dropped = recording.dropped(*ids.shape)
    text, embeds = model.language_model, seen[0]["inputs_embeds"]
    expected = recomputed(text, embeds, mask, dropped, layer, out.sequences[:, -NEW:])
    assert apart(torch.stack(out.logits), expected) < 1e-4
    plain = recomputed(text, embeds, mask, torch.zeros_like(dropped), layer, out.sequences[:, -NEW:])
    assert apart(plain, expected) > 1e-2, "control"


# Training


def gradients(model, objective, batch):
    model.zero_grad()
    out = objective(model, batch, step=0, total=1)
    out.loss.backward()
    objective.detach()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return out, found


def test_epic_with_a_visual_mask_in_the_batch():
    """The same loss and gradients from embeddings, from a forward that makes them, and from two whole passes."""
    torch.manual_seed(0)
    model = scaled(LlavaLike(hf.LlamaConfig(**TEXT))).double()
    batch = batch_of(((2, 1, 4), (1, 1, 3), (9, 0, 3)))  # a word before the answers, so that none is displaced
    ids, real, images = batch["inputs"], batch["attention_mask"], batch["images"].double()
    wanted = torch.where((torch.arange(ids.shape[1]) >= ids.shape[1] - 2) & (ids > 0), ids, -100)
    embeds, mask, visual, labels = model.splice(ids, real, images, wanted)
    whole = {"labels": labels, "visual_mask": visual, "row_key": torch.tensor([3, 4, 5])}
    inside = {"input_ids": ids, "images": images, "attention_mask": real, **whole}
    stage = constant(0.8, margin=0.4, layer=1)
    out, ours = gradients(model, EPIC(Random(), stage), inside)
    separate, theirs = gradients(model, EPIC(Random(), stage, share_prefix=False), inside)
    outside, others = gradients(
        model, EPIC(Random(), stage), {"inputs_embeds": embeds, "attention_mask": mask, **whole}
    )
    torch.testing.assert_close(out.loss, separate.loss)
    torch.testing.assert_close(out.loss, outside.loss)
    assert len(ours) > 30
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])
        torch.testing.assert_close(ours[name], others[name])

    at = functional.pad(labels[:, 1:] != -100, (0, 1), value=False)
    query = at.int().argmax(1)
    passes = {"layer": 1, "seed": out.stage.seed, "query": query, "row_key": whole["row_key"], "visual_mask": visual}
    logits = []
    for ratio in (out.stage.teacher, out.stage.student):
        with torch.no_grad(), compress(model, Random(), ratio=ratio, **passes):
            logits.append(model(ids, images, real).logits[at])
    teacher, student = (each.log_softmax(-1) for each in logits)
    sft = functional.cross_entropy(logits[1], labels[:, 1:][at[:, :-1]])
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
    torch.testing.assert_close(out.loss.detach(), 0.3 * sft + 0.7 * kl)
    assert kl > 1e-3, "control"
    _, untaught = gradients(model, EPIC(Random(), stage, weight=0.0), inside)
    assert any(apart(untaught[name], ours[name]) > 1e-2 for name in ours), "control"


def test_a_module_as_teacher_is_given_the_mask_too():
    torch.manual_seed(0)
    model = scaled(LlavaLike(hf.LlamaConfig(**TEXT))).double()
    batch = batch_of()
    ids, real, images = batch["inputs"], batch["attention_mask"], batch["images"].double()
    wanted = torch.where((torch.arange(ids.shape[1]) >= ids.shape[1] - 2) & (ids > 0), ids, -100)
    _, _, visual, labels = model.splice(ids, real, images, wanted)
    whole = {"input_ids": ids, "images": images, "attention_mask": real, "labels": labels, "visual_mask": visual}
    stage = constant(0.8, margin=0.4, layer=1)
    out, ours = gradients(model, EPIC(FastV(), stage), whole)
    twin, theirs = gradients(model, EPIC(FastV(), stage, teacher=copy.deepcopy(model)), whole)
    torch.testing.assert_close(out.loss, twin.loss)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.lm_head.weight)
    changed, _ = gradients(model, EPIC(FastV(), stage, teacher=other), whole)
    assert float((changed.loss - out.loss).detach().abs()) > 1e-3, "control"


@torch.no_grad()
def test_what_does_not_fit_is_refused(llava):
    batch = batch_of()
    embeds, mask, visual, _ = llava.splice(batch["inputs"], batch["attention_mask"], batch["images"])
    with compress(llava, Uniform(), keep=3, layer=1), pytest.raises(StateError, match="visual_mask="):
        llava.generate(**batch, **GREEDY)
    with (
        compress(llava, Uniform(), keep=3, layer=1, visual_mask=visual[:1]),  # no row of the batch is repeated
        pytest.raises(ShapeError),
    ):
        llava(inputs_embeds=embeds)
    with pytest.raises(StateError, match="visual_mask: True at visual tokens"):
        EPIC(Uniform(), constant(0.5, layer=1))(llava, {"inputs_embeds": embeds, "labels": mask}, step=0, total=1)
