"""Losses that are not numbers, found without a wait for the device in every step."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokencurric.errors import RangeError

_MOST = 1_000  # losses on the way, on devices that do not tell when a number has arrived


@dataclass(frozen=True, eq=False)
class Arriving:
    """A truth value on its way from a device.

    Args:
        value: on the host; it may be read once `arrived`.
        arrived: whether it is there.
        wait: returns when it is.
    """

    value: Bool[Tensor, ""]
    arrived: Callable[[], bool]
    wait: Callable[[], None]


class FiniteLosses:
    """Watches losses. On a CPU one that is not finite raises at once.

    On another device it raises in the first `look` after the number has arrived, or in `look(wait=True)`: to read it in
    its own step would stop the host until the device has caught up.

    Example:
        >>> FiniteLosses().watch(torch.tensor(float("nan")), "layer 2")
        Traceback (most recent call last):
        ...
        tokencurric.errors.RangeError: batch gave a loss that is not finite (layer 2).
        Hint: look for weights or inputs that are not finite, a learning rate too high, or float16 that overflows.
    """

    def __init__(self) -> None:
        self._on_the_way: deque[tuple[Arriving, str]] = deque()

    def watch(self, loss: Float[Tensor, ""], where: str) -> None:
        """Look at a loss now, or as soon as it is known.

        Args:
            loss: scalar.
            where: what to name in the error.

        Raises:
            RangeError: it is on a CPU and not finite.
        """
        finite = torch.isfinite(loss.detach())
        if loss.device.type != "cpu":
            self._on_the_way.append((send(finite), where))
        elif not bool(finite):
            raise _error(where)

    def look(self, *, wait: bool = False) -> None:
        """Raise if an earlier loss was not finite.

        Args:
            wait: for losses that the device has not made yet; False looks only at those that have arrived.

        Raises:
            RangeError: one was not, named by what was given with it.
        """
        while self._on_the_way and (wait or len(self._on_the_way) > _MOST or self._on_the_way[0][0].arrived()):
            flag, where = self._on_the_way.popleft()
            flag.wait()
            if not bool(flag.value):
                self.forget()
                raise _error(where)

    def forget(self) -> None:
        """Look at none of the earlier losses any more."""
        self._on_the_way.clear()


def send(flag: Bool[Tensor, ""]) -> Arriving:
    """Start the copy of `flag` to the host.

    Example:
        >>> bool(send(torch.tensor(True)).value)
        True
    """
    if flag.device.type != "cuda":
        return Arriving(flag, lambda: False, lambda: None)  # reading it waits
    value = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(flag.device))
    return Arriving(value, event.query, event.synchronize)


def _error(where: str) -> RangeError:
    return RangeError(
        f"batch gave a loss that is not finite ({where}).\nHint: look for weights or inputs that are not finite, a "
        "learning rate too high, or float16 that overflows."
    )
