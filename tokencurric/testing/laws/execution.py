"""The ways in which a model runs: compiled, replayed under checkpointing, without values."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokencurric.compressors import Compressor
from tokencurric.testing.answers import question, same, unchecked
from tokencurric.testing.cases import Case
from tokencurric.testing.check import Broken
from tokencurric.testing.laws.claims import compressor_law
from tokencurric.view import VisualView

COMPILED_EXAMPLES = 1  # a compilation takes about a second


def _given(view: VisualView) -> dict[str, Tensor]:
    each = {item.name: getattr(view, item.name) for item in fields(view)}
    return {name: x for name, x in each.items() if x is not None}


@compressor_law(
    "Compiled, it answers as it does eagerly.",
    examples=COMPILED_EXAMPLES,
    kinds=("normal",),
    dtypes=False,
    least=4,
    per_row=False,
)
def compiles(subject: Compressor, case: Case) -> None:
    """`torch.compile` with the backend `aot_eager`, which changes no arithmetic; one graph, four samples."""
    keep, seed = max(1, case.rows[0].count // 2), case.seed

    def ask(tensors: dict[str, Tensor]) -> Tensor:
        return subject(VisualView(**tensors), keep, seed=seed)

    with _graphs_of_its_own():
        compiled = torch.compile(ask, backend="aot_eager", dynamic=False)
        for other in range(4):
            one = replace(case, rows=tuple(replace(row, seed=row.seed + other) for row in case.rows), keep=keep)
            packed = question(subject, one).packed
            eager = packed.survivors(ask(_given(packed.view)))
            graph = packed.survivors(compiled(_given(packed.view)))
            same(subject, one, eager, graph, told=f"Eagerly it keeps {eager}; compiled, {graph}.")


@contextmanager
def _graphs_of_its_own() -> Iterator[None]:
    """Reset before, as graphs of other subjects count against the limit of recompilations; and no checks of shapes.

    Code that has such checks around it cannot be traced.
    """
    torch.compiler.reset()
    try:
        with unchecked():
            yield
    finally:
        torch.compiler.reset()


@contextmanager
def _defaulting(dtype: torch.dtype) -> Iterator[None]:
    """Tensors are made in `dtype` where none is given."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "with gradients": torch.enable_grad,
    "in inference mode": torch.inference_mode,
    "under autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "with bfloat16 as the default dtype": lambda: _defaulting(torch.bfloat16),
}


@compressor_law(
    "Grad mode, autocast and the default dtype change nothing.",
    kinds=("normal", "close"),
    dtypes=False,
    least=2,
    partial=True,
)
def answers_alike_in_every_mode(subject: Compressor, case: Case) -> None:
    """Against `torch.no_grad()`, under which `compress` and `EPIC` ask; the inputs may require a gradient."""
    for live in (False, True):
        asked = question(subject, replace(case, packing=replace(case.packing, requires_grad=live)))
        with torch.no_grad():
            usual = asked.survivors(subject)
        for mode, entered in _MODES.items():
            with entered():
                other = asked.survivors(subject)
            told = f"Without gradients it keeps {usual}; {mode}, {other}."
            same(subject, case, other, usual, told=told)


@compressor_law(
    "Replayed under gradient checkpointing, it makes the same choice.",
    examples=10,
    kinds=("normal",),
    dtypes=False,
    least=2,
    partial=True,
)
def replays_under_checkpointing(subject: Compressor, case: Case) -> None:
    """Forward and recomputation, with other draws by the process in between."""
    asked = question(subject, case)
    answers: list[list[list[int]]] = []

    def layer(x: Tensor) -> Tensor:
        mask = asked.mask(subject)
        answers.append(asked.packed.survivors(mask))
        return torch.sin(x) * mask.sum()

    x = torch.ones(3, requires_grad=True)
    torch.manual_seed(1)
    out = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
    torch.manual_seed(2)
    out.sum().backward()
    if answers[0] != answers[1]:
        raise Broken(f"In the forward pass it keeps {answers[0]}; in the replay, {answers[1]}.")


@compressor_law(
    "Shapes alone are enough to run it: it waits for no value, so it never makes an accelerator wait.",
    examples=10,
    kinds=("normal",),
    per_row=False,
    least=2,
    partial=True,
)
def runs_without_values(subject: Compressor, case: Case) -> None:
    """On the meta device."""
    asked = question(subject, case)
    view = VisualView(**{name: x.to("meta") for name, x in _given(asked.packed.view).items()})
    mask = subject(view, asked.keep, seed=asked.seed)
    if mask.device.type != "meta" or mask.shape != view.tokens.shape[:2]:
        raise Broken(f"On the meta device the answer has shape {tuple(mask.shape)}, on {mask.device}.")
