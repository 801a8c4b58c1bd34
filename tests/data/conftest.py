"""Files to read: an image folder and a writer of conversation files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Write = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder with `a.png` (square) and `sub/b.png` (wide), and a file beside it."""
    from tests.data.tiny import picture  # here, for jaxtyping 0.3.0 checks nothing that a conftest imports

    inside = tmp_path / "images"
    (inside / "sub").mkdir(parents=True)
    picture(10).save(inside / "a.png")
    picture(200, (32, 16)).save(inside / "sub" / "b.png")
    picture(99).save(tmp_path / "secret.png")
    return inside


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows as a conversation file."""

    def write_rows(*rows: Any, name: str = "talk.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(rows), encoding="utf-8")
        return path

    return write_rows
