"""Every function that takes a compressor refuses what is none, in one line that names what came."""

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch

from tests.adapters.tiny import tiny_batch, tiny_llava
from tests.testing.discovery import compressors
from tokencurric import EPIC, FastV, compress, tcd
from tokencurric.compressors import Compressor, Tags, require_compressor
from tokencurric.errors import NotACompressorError, TokencurricError
from tokencurric.evaluation import answer_prompts, kept_tokens, measure_efficiency, sweep
from tokencurric.testing import check_compressor, parametrize_with_checks

# The checks of types under pytest would refuse it first.
pytestmark = pytest.mark.usefixtures("unchecked")


@cache
def model():
    return tiny_llava()


def compressing(value: Any) -> None:
    with compress(model(), value, keep=2):
        pass


DOORS: dict[str, Callable[[Any], Any]] = {
    "compress": compressing,
    "EPIC": lambda value: EPIC(value, tcd()),
    "kept_tokens": lambda value: kept_tokens(model(), tiny_batch(), value, keep=2),
    "answer_prompts": lambda value: answer_prompts(model(), [], None, compressor=value),
    "sweep": lambda value: sweep(model(), [], None, {"mine": value}, [2]),
    "measure_efficiency": lambda value: measure_efficiency(model(), tiny_batch(), value, [2]),
    "A check": check_compressor,
    "parametrize_with_checks": lambda value: parametrize_with_checks([value]),
}


def chosen(view, keep, *, seed=0):
    return view.mask


class Mine:
    needs = frozenset()
    tags = Tags()

    def __call__(self, view, keep, *, seed=0):
        return view.mask


def mine(**changed: Any) -> Any:
    """An instance of `Mine` with other attributes; None takes one away."""
    parts = {name: value for name, value in vars(Mine).items() if not name.startswith("__")} | {
        "__call__": Mine.__call__
    }
    return type("Mine", (), {name: value for name, value in (parts | changed).items() if value is not None})()


WRONG = {
    "a string": ("fastv", r"='fastv', a string\.\nHint: pass an instance, such as tokencurric\.FastV\(\)"),
    "the class": (FastV, r"=FastV, a class\.\nHint: pass an instance: FastV\(\), not FastV\."),
    "a function": (chosen, r"=chosen, a plain function\.\nHint: write a class with needs, tags and __call__"),
    "a lambda": (lambda view, keep, seed=0: view, r"=<lambda>, a plain function\.\nHint: write a class"),
    "a partial": (partial(chosen, seed=1), r"=functools.partial\(<function.*\.\.\. without needs and tags\."),
    "nothing": (None, r"=None, which cannot be called\.\nHint: pass an instance"),
    "no call": (mine(__call__=None), r"Mine object>, which cannot be called\."),
    "no tags": (mine(tags=None), r"Mine object> without tags\.\nHint: add tags = Tags\(\) to its class"),
    "no needs": (mine(needs=None), r"Mine object> without needs\.\nHint: add needs = frozenset\(\) to its class"),
    "a bare signal": (mine(needs="keys"), r"Mine object> with needs='keys'\.\nHint: make needs a set of signals"),
    "a list of signals": (mine(needs=["keys"]), r"Mine object> with needs=\['keys'\]\.\nHint: make needs a set"),
    "a misspelt signal": (mine(needs={"key"}), r"Mine object> with the unknown signal 'key'\.\nHint: .* keys, att"),
    "tags of another sort": (mine(tags={"exact": True}), r"with tags={'exact': True}\.\nHint: make tags an instance"),
    "no seed": (mine(__call__=lambda self, view, keep: view), r"with the call \(view, keep\)\.\nHint: give it the"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_compressor_is_refused_at_the_door(door: str, what: str):
    value, message = WRONG[what]
    if (door, what) == ("answer_prompts", "nothing"):
        pytest.skip("None runs the model as it is")
    with pytest.raises(NotACompressorError, match=message) as caught:
        DOORS[door](value)
    line, hint = str(caught.value).split("\n")
    assert len(line) <= 120
    assert hint.startswith("Hint: ")
    assert hint.endswith(".")
    kit = door in ("A check", "parametrize_with_checks")
    name = "subject" if kit else "compressors['mine']" if door == "sweep" else "compressor"
    assert line.startswith(f"{'A check' if kit else door} needs a compressor; got {name}=")
    assert isinstance(caught.value, TokencurricError)
    assert isinstance(caught.value, TypeError)
    assert not re.search(r"0x[0-9a-f]{6}", line)


@pytest.mark.parametrize("compressor", compressors(), ids=repr)
def test_what_is_one_passes(compressor: Compressor):
    assert require_compressor(compressor, who="test") is compressor


def test_what_has_all_that_is_needed_is_one_whatever_it_is():
    def choosing(view, keep, *, seed=0):
        return view.mask

    choosing.needs, choosing.tags = {"keys"}, Tags(exact=False)  # a plain set, and a function, do as well
    module = torch.nn.Identity()
    module.needs, module.tags = frozenset(), Tags()
    for value in (choosing, module, mine()):
        assert require_compressor(value, who="test") is value
    compressing(FastV())
