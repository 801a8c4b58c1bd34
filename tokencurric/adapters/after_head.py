"""What a model's class does with the logits that its output head gives.

Fields of a config do not tell: one class applies a cap, another with the same field does not. So the head's output is
replaced once by numbers that show any change, and what the class returns is held against them.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokencurric.adapters.discovery import ModelParts
from tokencurric.adapters.quiet import untouched
from tokencurric.errors import TokencurricError, UnsupportedModelError

_HINT = "Hint: EPIC makes its losses from what the head gives; pass a model that returns that as its logits."


def refuse_changed_logits(parts: ModelParts) -> None:
    """Call a transformers model on two text tokens, and raise unless it returns what its head gives.

    All ranks have to do so together where weights are sharded.

    Args:
        parts: of the model; its head is not None.

    Raises:
        UnsupportedModelError: logits are changed, the head is not called, or the model cannot be called like that.
    """
    name, model = type(parts.base).__name__, parts.roots[0]
    weight = next(iter(parts.base.get_input_embeddings().parameters()))
    ids = text_tokens(parts).to("cpu" if weight.device.type == "meta" else weight.device)
    with untouched(model), _ramp_after(parts.head) as ramps:
        try:
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except (TokencurricError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"model is a {name}, which fails on two text tokens: {type(error).__name__}.\nHint: EPIC calls it with "
                f"input_ids, attention_mask and use_cache to see what becomes of its logits. {error}"
            ) from error
    logits = getattr(output, "logits", None)
    if not ramps or not isinstance(logits, Tensor):
        raise UnsupportedModelError(
            f"EPIC needs a model that calls its output head as a module and returns its logits; {name} did not.\n"
            "Hint: models whose forward is logits = self.lm_head(hidden) are supported."
        )
    _refuse(name, change(ramps[-1], logits))


def refuse_changed_output(model: nn.Module, head: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Call a model of any kind on a batch, and raise if it returns its head's output in another form.

    One position of each row reaches the head. Where the model returns nothing of the shape of logits, nothing is known.

    Args:
        model: without wrappers.
        head: its output head.
        inputs: arguments of the model by name.

    Raises:
        UnsupportedModelError: logits are changed.
    """
    with untouched(model), _ramp_after(head, positions=1) as ramps:
        output = model(**inputs)
    if not ramps:
        return
    ramp = ramps[-1]
    found = [each for each in _tensors(output) if each.is_floating_point() and each.ndim > 1]
    found = [each for each in found if each.shape[:-1].numel() == ramp.shape[:-1].numel() and each.shape[-1] > 1]
    changes = [change(ramp, each.reshape(*ramp.shape[:-1], each.shape[-1])) for each in found]
    if changes and None not in changes:
        _refuse(type(model).__name__, changes[0])


def text_tokens(parts: ModelParts) -> Int[Tensor, "1 2"]:
    """Two token ids that mean text: none that the config gives a meaning.

    Args:
        parts: of the model.
    """
    visual = {each for ids in parts.visual_kinds.values() for each in ids}  # a model that is given a mask has none
    special = {*visual, *_token_ids(parts.base.config.to_dict())}
    text = [each for each in range(len(special) + 2) if each not in special]
    return torch.tensor([text[-2:]])


def change(given: Float[Tensor, "*batch vocab"], got: Float[Tensor, "..."]) -> str | None:
    """What was done to logits, in words; None if nothing was.

    Args:
        given: logits that the head gave, as `ramp` makes them.
        got: logits that the model returned.

    Example:
        >>> given = ramp(torch.zeros(1, 2, 100))
        >>> change(given, given.bfloat16()), change(given, 2 * given), change(given, 30 * (given / 30).tanh())
        (None, 'multiplies logits by 2', 'caps logits at 30')
        >>> change(given, given[..., :90])
        'cuts off 10 of 100 columns'
    """
    if got.shape[:-1] != given.shape[:-1]:
        return f"returns logits of shape {tuple(got.shape)} instead of {tuple(given.shape)}"
    columns, width = given.shape[-1], min(given.shape[-1], got.shape[-1])
    done = []
    if got.shape[-1] != columns:
        count = abs(got.shape[-1] - columns)
        done.append(f"{'cuts off' if width < columns else 'adds'} {count} of {max(columns, got.shape[-1])} columns")
    given = given.to(got.device, got.dtype)  # a cast on the way out, as mixed precision makes it, is no change
    x, y = given[..., :width].double().flatten(0, -2), got[..., :width].double().flatten(0, -2)
    hidden = (y <= max(torch.finfo(got.dtype).min / 2, -1e30)).all(0)
    if hidden.any():
        done.append(f"hides {int(hidden.sum())} of {columns} columns")
    if not torch.equal(x[:, ~hidden], y[:, ~hidden]):
        done.append(_function(x[:, ~hidden], y[:, ~hidden]))
    return " and ".join(done) or None


def ramp(output: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
    """Numbers in place of logits by which every scale, cap, shift and hidden column is seen; of one kind in any dtype.

    Args:
        output: logits whose shape, dtype and device are taken.

    Example:
        >>> ramp(torch.zeros(2, 5)).int()
        tensor([[-30000,    -88,      0,     88,  30000],
                [ 30000,     88,      0,    -88, -30000]], dtype=torch.int32)
    """
    t = torch.linspace(-1, 1, output.shape[-1], dtype=torch.float64)
    row = 60 * t + 29940 * t**9  # dense where a cap bends, and beyond any cap at its ends
    rows = torch.stack([row, row.flip(0)]).repeat(math.ceil(output.shape[:-1].numel() / 2), 1)
    return rows[: output.shape[:-1].numel()].reshape(output.shape).to(output.device, output.dtype)


def _function(x: Tensor, y: Tensor) -> str:
    """The function that makes `y` [row column] of `x`, of those that models use."""
    cap, small = float(y.abs().max()), (x.abs() > 0.01) & (x.abs() < 90)
    top = y.abs()[x.abs() > 0.5 * x.abs().max()]
    capped = math.isfinite(cap) and bool((top > 0.999 * cap).all()) and cap < 0.5 * float(x.abs().max())
    if capped:
        bent = small & (y.abs() < 0.9 * cap) & (y.abs() > 0)
        scale = float((cap * torch.atanh(y[bent] / cap) / x[bent]).median()) if bent.any() else 1.0
        fits = torch.allclose(cap * torch.tanh(scale * x / cap), y, rtol=0.05, atol=0.01 * cap)
        if fits:
            return f"caps logits at {cap:.4g}" + ("" if abs(scale - 1) < 0.02 else f" after a factor of {scale:.4g}")
    elif small.any():
        scale = float((y[small] / x[small]).median())
        if torch.allclose(scale * x[small], y[small], rtol=0.02, atol=1e-3):
            return f"multiplies logits by {scale:.4g}"
    return f"changes logits by up to {float((y - x).abs().max()):.4g}"


def _refuse(name: str, what: str | None) -> None:
    if what is not None:
        raise UnsupportedModelError(f"model is a {name}, which {what} after its output head.\n{_HINT}")


@contextmanager
def _ramp_after(head: Any, positions: int | None = None) -> Iterator[list[Tensor]]:
    """Within, `head` answers with a ramp; what it answered is listed.

    Its hook is the last, so that other hooks on the head see a head's output.

    Args:
        head: the module.
        positions: of each row, that reach it; None means all.
    """
    given: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:
            raise UnsupportedModelError(
                "EPIC needs a model that gives its output head the hidden states in place, as in lm_head(hidden); got "
                f"{', '.join(kwargs) or 'nothing'}.\nHint: losses are made of them; call the head with them first."
            )
        return (args[0][:, :positions], *args[1:]), kwargs

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        given.append(ramp(output))
        return given[-1].clone()  # the model may change it in place

    handles = [
        head.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        head.register_forward_hook(after),
    ]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


def _token_ids(config: Any, named: bool = False) -> Iterator[int]:
    """Whole numbers in fields of a config whose name has `token` in it."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from _token_ids(value, "token" in str(name))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _token_ids(value, named)
    elif named and type(config) is int:
        yield config


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for each in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _tensors(each)
