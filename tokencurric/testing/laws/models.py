"""The laws of compression inside a model: what `compress` promises, tried on a model of yours."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tokencurric.adapters import compress, find_parts
from tokencurric.adapters.discovery import is_visual
from tokencurric.compressors import Compressor, FastV, Uniform
from tokencurric.errors import RangeError
from tokencurric.testing.check import Broken, Check
from tokencurric.testing.models import Prompted, Recording, apart, fingerprint, hidden, recomputed


@dataclass(frozen=True)
class Compression:
    """Where and how much: decoder layers, the tokens kept from each on, and by which compressor.

    Args:
        layer: those that run shorter than the one before, ascending. keep: tokens a row. compressor: FastV reads the
            attention of the layer before.
    """

    layer: tuple[int, ...]
    keep: tuple[int, ...]
    compressor: Compressor


def _cuts(depth: int, most: int, compressor: Compressor) -> st.SearchStrategy[Compression]:
    first = 1 if compressor.needs else 0  # what FastV reads comes from the layer before
    layers, keeps = st.integers(first, depth - 1), st.integers(1, most)

    def cuts(count: int) -> st.SearchStrategy[Compression]:
        where = st.lists(layers, min_size=count, max_size=count, unique=True).map(sorted).map(tuple)
        falling = st.lists(keeps, min_size=count, max_size=count, unique=True)
        return st.builds(
            Compression, where, falling.map(lambda each: tuple(sorted(each, reverse=True))), st.just(compressor)
        )

    return st.integers(1, min(2, depth - first, most)).flatmap(cuts)


def compressions(subject: Prompted) -> st.SearchStrategy[Compression]:
    """One cut or two, at any layers, with up to half of the visual tokens of the fullest row; at least one."""
    parts = find_parts(subject.model)
    depth, most = parts.depth, int(is_visual(subject.inputs["input_ids"], parts.visual_ids).sum(1).max())
    if most < 2:
        raise RangeError(
            f"model_checks need inputs with at least two visual tokens in some row; got {most}. Nothing could be "
            "dropped. Give a batch with pictures, as the model's processor makes it."
        )
    found = _cuts(depth, most // 2, Uniform())
    return found | _cuts(depth, most // 2, FastV()) if depth > 1 else found


def _always(_: Prompted) -> bool:
    return True


def left_padded(subject: Prompted) -> bool:
    """The last position of every row is a token, so that `generate` goes on from there."""
    return bool(subject.real()[:, -1].all())


def _itself(subject: Prompted) -> Prompted:
    return subject


def model_law(
    law: str, *, examples: int, applies: Callable[[Prompted], bool] = _always
) -> Callable[[Callable[[Prompted, Compression], None]], Check]:
    """Make a check of a function (subject, compression) that raises `Broken`."""

    def made(body: Callable[[Prompted, Compression], None]) -> Check:
        name: str = body.__name__
        return Check(name, law, cases=compressions, body=body, applies=applies, prepare=_itself, most=examples)

    return made


@contextmanager
def _compressed(subject: Prompted, how: Compression) -> Iterator[Recording]:
    recording = Recording(how.compressor)
    with compress(subject.model, recording, keep=how.keep, layer=how.layer):
        yield recording


def _drops(subject: Prompted, how: Compression, recording: Recording) -> list[Tensor]:
    return recording.drops(*subject.shape, len(how.layer))


def _must_move(subject: Prompted, plain: Tensor, full: Tensor) -> None:
    moved = apart(plain, full)
    if moved < subject.moves:
        raise Broken(
            f"Dropping moves the logits by {moved:.1e} of the largest; it takes {subject.moves:.0e} for a comparison "
            "to show anything. Use weights of larger scale, or more text after the pictures."
        )


@model_law("A compressed forward gives what the whole model gives with the dropped tokens masked.", examples=4)
def equals_the_masked_model(subject: Prompted, how: Compression) -> None:
    """At all kept positions; and the drop must matter, or the comparison says nothing."""
    plain = subject.logits()
    with _compressed(subject, how) as recording:
        short = subject.logits()
    drops = _drops(subject, how, recording)
    with hidden(subject.model, drops, how.layer):
        full = subject.logits()
    kept = subject.real() & ~drops[-1]
    difference = apart(short[kept], full[kept])
    if not difference < subject.tolerance:
        raise Broken(f"The logits differ by {difference:.1e} of the largest.")
    _must_move(subject, plain[kept], full[kept])


def _recomputed(subject: Prompted, drops: list[Tensor], how: Compression, sequences: Tensor) -> Tensor:
    return recomputed(subject.model, subject.inputs, drops, how.layer, sequences, lengthen=subject.lengthen)


@model_law(
    "`generate` chooses from the logits that a recompute without a cache gives.", examples=2, applies=left_padded
)
def generates_what_a_recompute_gives(subject: Prompted, how: Compression) -> None:
    """For four greedy tokens, of which three read the short cache."""
    with _compressed(subject, how) as recording:
        sequences, ours = subject.generated()
    drops = _drops(subject, how, recording)
    full = _recomputed(subject, drops, how, sequences)
    difference = apart(ours, full)
    if not difference < subject.tolerance:
        raise Broken(f"The logits differ by {difference:.1e} of the largest.")
    undropped = _recomputed(subject, [torch.zeros_like(each) for each in drops], how, sequences)
    for tokens in (slice(1), slice(1, None)):  # from the prompt, and from the cache
        _must_move(subject, undropped[tokens], full[tokens])


@model_law("Layers from the compressing one on run on the tokens that are left, the others on all.", examples=3)
def runs_short(subject: Prompted, how: Compression) -> None:
    """Seen by the widths that the layers are given, with and without."""

    def widths() -> list[int]:
        seen: list[int] = []

        def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen.append((args[0] if args else kwargs["hidden_states"]).shape[1])

        # Looked at last, after whatever compression has put there.
        handles = [each.register_forward_pre_hook(look, with_kwargs=True) for each in find_parts(subject.model).layers]
        try:
            subject.logits()
        finally:
            for handle in handles:
                handle.remove()
        return seen

    before = widths()
    with _compressed(subject, how) as recording:
        after = widths()
    expected = list(before)
    for layer, dropped in zip(how.layer, _drops(subject, how, recording), strict=True):
        expected[layer:] = [int((subject.real() & ~dropped).sum(1).max())] * (len(before) - layer)
    if after != expected:
        raise Broken(f"The layers run on {after} positions; expected {expected}.")


@model_law("Keeping all leaves every logit as it was, bit by bit.", examples=1)
def keeps_all_when_allowed(subject: Prompted, how: Compression) -> None:
    """Also as the ratio 0."""
    plain, everything = subject.logits(), subject.shape[1]
    cuts = len(how.layer)
    for keep, ratio in (([everything] * cuts, None), (None, [0.0] * cuts)):
        with compress(subject.model, how.compressor, layer=how.layer, keep=keep, ratio=ratio):
            ours = subject.logits()
        if not torch.equal(ours, plain):
            raise Broken(
                f"With keep={keep}, ratio={ratio} the logits differ by {apart(ours, plain):.1e} of the largest."
            )


@model_law("Leaving the context leaves nothing behind in the model.", examples=2, applies=left_padded)
def leaves_the_model_as_it_was(subject: Prompted, how: Compression) -> None:
    """Hooks, types, attributes, config and weights, after a forward and after `generate`; and the plain logits."""
    plain = subject.logits()  # before the look at the model: transformers notes things at a module's first call
    before = fingerprint(subject.model)
    with _compressed(subject, how):
        subject.logits()
        subject.generated(2)
    _same(before, fingerprint(subject.model), "")
    if not torch.equal(subject.logits(), plain):
        raise Broken("The plain forward gives other logits afterwards.")


class _Stop(Exception):
    """Raised inside a layer."""


@model_law("An exception in any layer leaves nothing behind in the model.", examples=1)
def survives_an_exception(subject: Prompted, how: Compression) -> None:
    """In each decoder layer in turn, in a forward."""
    layers = list(find_parts(subject.model).layers)
    subject.logits()  # transformers notes things at a module's first call

    def stop(*_: Any) -> None:
        raise _Stop

    for number, layer in enumerate(layers):
        handle = layer.register_forward_hook(stop)
        before = fingerprint(subject.model)
        try:
            with _compressed(subject, how):
                subject.logits()
        except _Stop:
            pass
        else:
            raise Broken(f"An exception in layer {number} does not come out.")
        finally:
            after = fingerprint(subject.model)
            handle.remove()
        _same(before, after, f"After an exception in layer {number}: ")


def _same(before: dict[str, tuple[Any, ...]], after: dict[str, tuple[Any, ...]], when: str) -> None:
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise Broken(f"{when}{', '.join(name or 'the model itself' for name in changed[:5])} changed.")
