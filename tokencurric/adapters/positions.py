"""Positions of a padded row: those of the row alone.

A transformers model that is called without `position_ids` numbers the padded sequence, so a row with padding on its
left starts at a position other than 0. Rotary attention does not notice, for it depends on distances only. Keys after
rotary embedding do depend on it, and so does every compressor that reads them. `generate` numbers each row from its
first token, and so does `compress` where the caller leaves the prompt's positions to the model. Only where a row begins
to count is moved: calls that go on after such a prompt are moved along, those with positions of their own too.
"""

import torch
from jaxtyping import Int
from torch import Tensor


def row_positions(
    made: Int[Tensor, "#batch seq"] | None, padding: Int[Tensor, " batch"], length: int
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, " batch"]]:
    """Positions that each row counts from its first token.

    Args:
        made: positions that the model made, with a batch of 1 where rows share them; None means 0, 1, 2, ...
        padding: number of positions before each row's first token.
        length: number of positions of the padded sequence.

    Returns:
        The positions, where padding gets the first one, and what was subtracted from each row. Rows whose positions do
        not count their padding are left alone.

    Example:
        >>> padding = torch.tensor([0, 2])
        >>> row_positions(None, padding, 4)[0].tolist()
        [[0, 1, 2, 3], [0, 0, 0, 1]]
        >>> row_positions(torch.tensor([[1, 2, 3, 4]]), padding, 4)[0].tolist()
        [[1, 2, 3, 4], [1, 1, 1, 2]]
        >>> row_positions(torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]]), padding, 4)[1].tolist()
        [0, 0]
    """
    made = torch.arange(length, device=padding.device)[None] if made is None else made
    padding = padding.to(made.device)
    first = made[:, :1]
    made = made.expand(len(padding), -1)
    counted = made.gather(1, padding[:, None]) - first == padding[:, None]
    shift = torch.where(counted[:, 0], padding, 0)
    return torch.maximum(made - shift[:, None], first), shift


def later_positions(
    counted: Int[Tensor, "*axes new"], shift: Int[Tensor, " batch"] | None, missing: int
) -> Int[Tensor, "*moved new"]:
    """Positions of tokens after a compressed prompt.

    Args:
        counted: as the model, or its caller, counted them.
        shift: what was subtracted from the prompt's positions of each row; None means nothing.
        missing: number of positions that the count has left out.

    Example:
        >>> later_positions(torch.tensor([[3, 4]]), torch.tensor([0, 2]), 4).tolist()
        [[7, 8], [5, 6]]
    """
    counted = counted + missing
    return counted if shift is None else counted - shift.to(counted.device)[:, None]
