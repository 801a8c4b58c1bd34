"""One context, several threads: each forward is what it would be alone."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.adapters.tiny import IMAGE, ONE, RAGGED, tiny_batch, tiny_llava
from tokencurric import DART, EPIC, FastV, Random, StateError, Uniform, compress, tcd

NEW = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
NEW |= {"suppress_tokens": [IMAGE]}
ROWS = [ONE, RAGGED, ((4, "I", 2),), ((2, "I", 3, "I", 5), (7, "I", 9))]


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def batches(count):
    return [tiny_batch(ROWS[number % len(ROWS)], seed=number) for number in range(count)]


def together(work, jobs, threads):
    """`work` of every job, from several threads that begin at once."""
    gate = threading.Barrier(threads)

    def from_the_gate(job):
        number, each = job
        if number < threads:
            gate.wait()
        return work(each)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(from_the_gate, enumerate(jobs)))


def forward(model):
    def run(batch):
        with torch.no_grad():
            return model(**batch).logits

    return run


def generate(model):
    def run(batch):
        with torch.no_grad():
            return torch.stack(model.generate(**batch, **NEW).logits)

    return run


@pytest.mark.parametrize("compressor", [FastV(), DART(), Random(), Uniform()], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("way", [forward, generate])
def test_forwards_of_several_threads_are_right(model, compressor, way):
    jobs = batches(24)
    with compress(model, compressor, keep=5, layer=2):
        alone = [way(model)(batch) for batch in jobs]
        found = together(way(model), jobs, threads=4)
    for one, other in zip(alone, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    plain = [way(model)(batch) for batch in jobs]
    assert all((one - other).abs().max() > 1e-2 for one, other in zip(alone, plain, strict=True)), "control"


@pytest.mark.slow
def test_a_thousand_forwards_of_eight_threads_are_right(model):
    jobs = batches(1000)
    with compress(model, FastV(), keep=5, layer=2):
        alone = [forward(model)(batch) for batch in jobs]
        found = together(forward(model), jobs, threads=8)
    assert sum(not torch.equal(one, other) for one, other in zip(alone, found, strict=True)) == 0


def test_a_thread_that_fails_leaves_the_others_alone(model):
    jobs = batches(24)

    def sometimes(job):
        number, batch = job
        if number % 3:
            return forward(model)(batch)
        with pytest.raises(ValueError, match="features and image tokens"):
            model(**batch | {"pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)})
        return None

    with compress(model, FastV(), keep=5, layer=2):
        alone = [None if number % 3 == 0 else forward(model)(batch) for number, batch in enumerate(jobs)]
        found = together(sometimes, list(enumerate(jobs)), threads=4)
    for one, other in zip(alone, found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert type(model.model.language_model.layers[1].self_attn.config) is type(model.config.text_config)
    assert model.model.language_model.layers[1].self_attn.config is model.config.text_config


def test_leaving_waits_for_what_other_threads_have_begun(model):
    batch = tiny_batch(RAGGED)
    with compress(model, FastV(), keep=5, layer=2):
        expected = generate(model)(batch)
    begun, found = threading.Event(), []

    def slow(*_):
        begun.set()
        time.sleep(0.02)

    watch = model.model.language_model.layers[-1].register_forward_hook(slow)
    try:
        with compress(model, FastV(), keep=5, layer=2):
            thread = threading.Thread(target=lambda: found.append(generate(model)(batch)))
            thread.start()
            begun.wait()
    finally:
        watch.remove()
        thread.join()
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0)
    assert not torch.equal(generate(model)(batch), expected), "control: the model is plain again"


def test_a_second_context_from_another_thread_is_refused(model):
    def second(_):
        with (
            pytest.raises(StateError, match="Only one compression"),
            compress(model, Uniform(), keep=5, layer=2),
        ):
            pass

    with compress(model, FastV(), keep=5, layer=2):
        together(second, range(4), threads=4)


def test_a_plain_forward_beside_a_training_step_is_plain(model):
    batch, labelled = tiny_batch(RAGGED), tiny_batch(RAGGED, answers=2)
    objective, inside, go_on, found = EPIC(Random(), tcd()), threading.Event(), threading.Event(), []
    expected = objective(model, labelled, step=5, total=10).loss
    plain = forward(model)(batch)

    def pause(*_):
        if threading.current_thread() is trainer:
            inside.set()
            go_on.wait(10)

    trainer = threading.Thread(target=lambda: found.append(objective(model, labelled, step=5, total=10).loss))
    watch = model.model.language_model.layers[3].register_forward_hook(pause)
    try:
        trainer.start()
        assert inside.wait(10)
        beside = forward(model)(batch)
    finally:
        go_on.set()
        trainer.join()
        watch.remove()
        objective.detach()
    assert torch.equal(beside, plain)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0)


def test_a_decoder_called_by_itself_takes_nothing_from_a_call_that_broke_off(model):
    batch = tiny_batch(RAGGED)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad(), compress(model, FastV(), keep=5, layer=2):
        with pytest.raises(ValueError, match="features and image tokens"):
            model(**batch | {"pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)})
        with pytest.raises(StateError, match="which tokens are visual"):
            model.get_decoder()(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
