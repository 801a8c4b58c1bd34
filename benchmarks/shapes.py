"""Inputs of the sizes that models have."""

from dataclasses import dataclass

import torch

from tokencurric import VisualView


@dataclass(frozen=True)
class Shape:
    """Sizes of a view: rows, visual tokens, prompt-text tokens, heads and their width."""

    batch: int = 16
    visual: int = 576
    text: int = 40
    heads: int = 32
    head_dim: int = 128

    @property
    def dim(self) -> int:
        """Width of the hidden states."""
        return self.heads * self.head_dim


LLAVA_7B = Shape()
SMALL = Shape(batch=4, visual=144, text=20, heads=8, head_dim=32)


def view_of(shape: Shape, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> VisualView:
    """A random view with every signal that a decoder layer can give."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g).to(dtype)

    b, n, t, h, d = shape.batch, shape.visual, shape.text, shape.heads, shape.head_dim
    return VisualView(
        tokens=normal(b, n, shape.dim),
        normed_tokens=normal(b, n, shape.dim),
        keys=normal(b, n, h, d),
        attention=torch.rand(b, n, generator=g),
        text_tokens=normal(b, t, shape.dim),
        normed_text_tokens=normal(b, t, shape.dim),
        text_keys=normal(b, t, h, d),
        row_key=torch.arange(b),
    )
