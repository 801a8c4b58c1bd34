"""Every look-up by name in other people's code: the installed releases have each, and the source has no other."""

import ast
from pathlib import Path

import pytest
from transformers import Trainer

import tokencurric
from tests.adapters.tiny import tiny_llava
from tokencurric import EPIC, EpicTrainer, Uniform, compress, tcd
from tokencurric.adapters import deepstack, discovery, hugging_face, pictures, tap, vision
from tokencurric.errors import MissingDependencyError, StateError
from tokencurric.hosts import names
from tokencurric.hosts.lookups import Argument, Attribute, Override
from tokencurric.resuming import ResumableTrainer

LIBRARY = Path(tokencurric.__file__).parent
ROOMS = ("adapters", "hosts", "distill.py", "trainer.py", "resuming.py", "callbacks.py")
ROOMS += tuple(f"evaluation/{name}.py" for name in ("flops", "memory", "efficiency"))
DECLARED = {name for each in names.ALL for name in each.names}
# What is looked up by name and is ours, Python's, or a value and no name.
OURS = {"_tokencurric", "row_key", "visual_mask", "batches", "supervised_tokens", "normed_tokens", "normed_text_tokens"}
OURS |= {"cache_position"}  # of a few models only, and of some that are not in transformers
OURS |= {
    "__self__",
    "__annotations__",
    "forward",
    "__code__",
    "self",
    "_hooks",
    "__dict__",
    "__slots__",
    "token",
    "visual_mask",
    "flash",
    "flex_attention",
    "eager",
    "full_attention",
    "ALora",
}
OURS |= {"__dict__", "__slots__", "token"}
LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
# Names that stand in a table, by the files that look up what is in it; of adapters and caches written by hand, any.
TABLES = {
    "discovery.py": [name for fields in discovery._VISUAL_IDS.values() for name in fields],
    "pictures.py": list(pictures.READERS),
    "generation.py": ["inputs_embeds", "input_ids", "inputs"],
    "hugging_face.py": [*hugging_face._ALIGNED, *hugging_face._SEEN, *vision.VISION, *LOGITS],
    "deepstack.py": [deepstack._MASK, deepstack._FEATURES],
    "handwritten.py": [],
    "caches.py": [],
    "plans.py": [],
    "lookups.py": [],
    "tap.py": sorted(tap._READ),
}


@pytest.mark.parametrize("lookup", names.ALL, ids=lambda each: " ".join(each.names))
def test_the_installed_release_has_it(lookup):
    assert lookup.on, "a look-up needs an example that has it"
    assert list(lookup.gone()) == []


@pytest.mark.parametrize(
    ("lookup", "line"),
    [
        (Attribute("layer_kinds", ("transformers.LlamaConfig",)), "LlamaConfig has no attribute layer_kinds"),
        (Attribute("self_attn", ("transformers.LlamaLayer",)), "LlamaLayer has no attribute self_attn"),
        (Argument("kv", "memory", on=(names.CACHE.on[0],)), "LlamaDecoderLayer.forward takes no argument kv or memory"),
        (Override("_get_sampler", ("transformers.Trainer",)), "Trainer has no method _get_sampler"),
        (Override("pop_callback", ("transformers.Trainer",)), "Trainer does not call its method pop_callback"),
    ],
)
def test_what_is_gone_is_named(lookup, line):
    (found,) = lookup.gone()
    assert found.endswith(line)


def test_a_package_that_is_not_installed_has_nothing_to_lose():
    assert list(Attribute("anything", ("no_such_package.Thing",)).gone()) == []


def looked_up(path):
    """Names whose absence goes unnoticed where the source looks them up, and their lines; None for a computed one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name: object = None
        if isinstance(node, ast.Call) and node.args:
            reads = isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop", "setdefault")
            if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
                yield node.args[1].value if isinstance(node.args[1], ast.Constant) else None, node.lineno
            elif reads:
                name = getattr(node.args[0], "value", None)
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            name = getattr(node.left, "value", None)
        if isinstance(name, str):
            yield name, node.lineno


def sources():
    found = [path for room in ROOMS for path in (LIBRARY / room, *(LIBRARY / room).rglob("*.py"))]
    return sorted(path for path in found if path.is_file())


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(LIBRARY).as_posix())
def test_the_source_looks_up_nothing_else(path):
    undeclared = {(name, line) for name, line in looked_up(path) if name not in DECLARED | OURS | {None}}
    assert not undeclared, "declare them in tokencurric.hosts.names, each with an example that has it"
    computed = [line for name, line in looked_up(path) if name is None]
    assert not computed or path.name in TABLES, f"lines {computed} look up names that are not written there"
    assert set(TABLES.get(path.name, ())) <= DECLARED | OURS


def test_the_reader_of_the_source_sees_look_ups(tmp_path):
    source = "getattr(a, 'one', 0)\nhasattr(a, 'two')\nb.get('three')\n'four' in c\ngetattr(a, name)\na.five\nb['six']"
    (tmp_path / "some.py").write_text(source)
    assert {name for name, _ in looked_up(tmp_path / "some.py")} == {"one", "two", "three", "four", None}


def test_every_private_method_of_trainer_that_is_replaced_is_declared():
    ours = {name for kind in (EpicTrainer, ResumableTrainer) for name in vars(kind)}
    replaced = {name for name in ours if name.startswith("_") and not name.startswith("__")}
    replaced &= set(dir(Trainer))
    assert {"_save", "_get_train_sampler"} <= replaced
    assert replaced <= {each.name for each in names.ALL if isinstance(each, Override)}


def test_an_override_of_nothing_is_refused_where_it_is_written():
    gone = Override("_get_sampler", ("transformers.Trainer",))

    def _get_sampler(self):
        return None

    with pytest.raises(MissingDependencyError, match="Trainer has no method _get_sampler"):
        gone.overridden_by(_get_sampler)

    def _save(self, output_dir=None):
        return None

    with pytest.raises(MissingDependencyError, match=r"Trainer\._save takes state_dict besides"):
        names.SAVE.overridden_by(_save)
    with pytest.raises(StateError, match="Override of _save needs a method of that name; got _get_sampler"):
        names.SAVE.overridden_by(_get_sampler)


def test_a_release_without_a_name_is_refused_at_the_door(monkeypatch):
    model = tiny_llava()
    lost = Attribute("layer_kinds", ("transformers.Gemma3TextConfig",))
    monkeypatch.setattr(names, "HOOKED", (*names.HOOKED, lost))
    names._check.cache_clear()
    refused = pytest.raises(MissingDependencyError, match=r"first is: transformers\.Gemma3TextConfig has no attribute")
    with refused, compress(model, Uniform(), keep=4):
        pass
    with refused:
        EPIC(Uniform(), tcd()).attach(model)
    monkeypatch.undo()
    with compress(model, Uniform(), keep=4):
        pass
    names._check.cache_clear()
