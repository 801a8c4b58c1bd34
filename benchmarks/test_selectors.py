"""Selector timings under pytest-benchmark: every exported compressor, beside a per-sample loop, growing batches."""

import pytest
import torch

from benchmarks.peers import LOOPS
from benchmarks.selectors import compressors
from benchmarks.shapes import Shape, view_of

SHAPES = [Shape(batch=b, visual=n, heads=8, head_dim=64) for b, n in ((1, 576), (8, 576), (8, 1152))]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.batch}x{s.visual}")
@pytest.mark.parametrize("name", compressors())
def test_selector(benchmark, name, shape):
    benchmark.group = f"{shape.batch} rows of {shape.visual} tokens, width {shape.dim}"
    view, compressor = view_of(shape), compressors()[name]
    mask = benchmark(compressor, view, 64)
    assert mask.sum(1).tolist() == [64] * shape.batch


@pytest.mark.parametrize("name", LOOPS)
def test_loop(benchmark, name):
    shape = SHAPES[1]
    benchmark.group = f"{shape.batch} rows of {shape.visual} tokens, width {shape.dim}"
    view = view_of(shape)
    mask = benchmark(LOOPS[name], view, 64)
    if name in ("FastV", "DART"):
        assert torch.equal(mask, compressors()[name](view, 64))
