"""The page on writing a compressor: its code runs, its failures look as printed, its table is complete."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tokencurric.testing import LawError, compressor_checks

PAGE = (Path(__file__).parents[2] / "docs" / "write_a_compressor.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("unchecked")
def test_every_block_does_what_the_page_says(monkeypatch: pytest.MonkeyPatch):
    page = ModuleType("page")  # a module, so that what is defined in it can be pickled
    monkeypatch.setitem(sys.modules, "page", page)
    blocks = BLOCK.findall(PAGE)
    assert len(blocks) > 10
    failures = 0
    for (language, code), following in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if language == "text":
            continue
        if following[0] != "text":
            exec(code, vars(page))
            continue
        failures += 1
        with pytest.raises(LawError) as caught:
            exec(code, vars(page))
        for line in following[1].splitlines():
            assert line.strip() in str(caught.value)
    assert failures == sum(language == "text" for language, _ in blocks)


def test_the_table_explains_every_check():
    explained = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert explained == [check.name for check in compressor_checks()]
