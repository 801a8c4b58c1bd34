"""Pictures with the patches drawn on them that a compressor kept."""

import math
from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from jaxtyping import Bool
from torch import Tensor

from tokencurric.errors import ShapeError
from tokencurric.evaluation.plots import display

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_DARK = (44, 44, 52)  # dropped patches tend to it; pictures of all kinds stand out against it


def draw_kept(picture: "Image", kept: Bool[Tensor, " visual"], *, side: int = 288) -> "Image":
    """The picture with kept patches as they are, and the rest darkened.

    Args:
        picture: what the model saw, whole. kept: which of its visual tokens survived, row by row of a square grid.
        side: of the result, in pixels.

    Raises:
        ShapeError: the tokens are no square grid.

    Example:
        >>> import torch
        >>> from PIL import Image
        >>> drawn = draw_kept(Image.new("RGB", (8, 8), "white"), torch.tensor([True, False, False, False]), side=8)
        >>> drawn.getpixel((0, 0)), max(drawn.getpixel((7, 7))) < 128
        ((255, 255, 255), True)
    """
    from PIL import Image

    grid = math.isqrt(kept.numel())
    if kept.ndim != 1 or grid == 0 or grid**2 != kept.numel():
        raise ShapeError(
            f"draw_kept needs the tokens of one picture on a square grid; got shape {tuple(kept.shape)}. A token has "
            "to have a place. Pass one picture's row of the mask."
        )
    picture = picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
    dark = Image.blend(picture, Image.new("RGB", picture.size, _DARK), 0.7)
    stencil = Image.new("L", (grid, grid))
    stencil.putdata([255 if each else 0 for each in kept.tolist()])
    dark.paste(picture, mask=stencil.resize((side, side), Image.Resampling.NEAREST))
    return dark


def plot_kept(
    pictures: "Sequence[tuple[str, Image]]",
    masks: Sequence[Sequence[tuple[str, int, Tensor]]],
) -> "Figure":
    """A table of pictures: a row a question, a column a compressor and count.

    Args:
        pictures: question and picture. masks: for each of them, (compressor, count, survivors).

    Example:
        >>> plot_kept([("What is it?", picture)], [[("fastv", 16, kept)]]).savefig("kept.png")  # doctest: +SKIP
    """
    from matplotlib.figure import Figure

    columns = 1 + len(masks[0])
    figure = Figure(figsize=(1.85 * columns, 2.2 * len(pictures)), layout="constrained")
    panels = figure.subplots(len(pictures), columns, squeeze=False)
    for row, (question, picture) in enumerate(pictures):
        panels[row][0].imshow(picture.convert("RGB"), interpolation="nearest")
        panels[row][0].set_title(fill(question, 26), fontsize=8)
        for panel, (name, count, kept) in zip(panels[row][1:], masks[row], strict=True):
            panel.imshow(draw_kept(picture, kept))
            if row == 0:
                panel.set_title(f"{display(name)}, {count} kept", fontsize=9)
        for panel in panels[row]:
            panel.set_axis_off()
    return figure
