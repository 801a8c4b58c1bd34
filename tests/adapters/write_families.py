"""Run the tests of the families and write docs/families.md from what passed: `python tests/adapters/write_families.py`.

An ability gets a mark if all tests of it passed for the family, and a dash if there is none.
"""

import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.adapters.zoo import FAMILIES, tiny_model  # noqa: E402
from tokencurric.testing import model_checks  # noqa: E402

FILES = ["test_families.py", "test_modes.py", "test_budgets.py", "test_wrappers.py::test_low_precision"]
LAWS = {check.name for check in model_checks()}
ABILITIES = {
    "prefill": ["equals_the_masked_model", "keeps_all_when_allowed", "runs_short"],
    "generate": ["generates_what_a_recompute_gives"],
    "restored": ["leaves_the_model_as_it_was", "survives_an_exception"],
    "attention": ["test_attention_signal"],
    "video": ["test_video", "test_a_video_is_a_picture"],
    "each picture": ["test_every_picture_keeps_its_budget", "test_families_that_do_not_tell_take_groups"],
    "EPIC": ["test_epic_shares_layers_without_a_trace_in_the_gradients"],
    "bf16, fp16": ["test_low_precision"],
}
MODES = {
    "greedy": ["generates_what_a_recompute_gives"],
    "sampling, several answers a prompt": ["test_sampling_several_answers"],
    "beam search": ["test_beams"],
    "prompt lookup": ["test_prompt_lookup"],
    "assisted by a language model": ["test_assisted"],
    "static cache": ["test_static_cache"],
    "turns of a conversation on one cache": ["test_turns_of_a_conversation"],
}

PAGE = """# Families

Models that `compress` was held against: small random ones, built from the family's own configuration class, in the
versions of `constraints.txt`. This page is written from a run of the tests; `python tests/adapters/write_families.py`
writes it anew.

{families}

- **prefill**: logits at the kept positions equal, within 1e-4 of the largest, those of the model at full length with
  the dropped tokens hidden, for cuts at any one or two layers; the layers really run on fewer positions; keeping all
  changes no bit. Batches of one row and of ragged rows, padded left and right, with sdpa and eager attention.
- **generate**: the same for the logits of every new token, against whole forwards without a cache.
- **restored**: leaving the context left no trace, also by an exception in any layer.
- **attention**: the attention that {{py:class}}`tokencurric.FastV` reads equals what the model returns itself.
- **video**: prefill and generate with the tokens of a video.
- **each picture**: with `per="image"` every picture keeps its budget, touching or not, in prefill and `generate`.
  Idefics3, SmolVLM and Llama 4 do not tell their pictures apart and take `groups=`; Video-LLaVA tells frames apart.
- **EPIC**: gradients, where teacher and student share their first layers, equal those where they do not.
- **bf16, fp16**: prefill, within 3% of the largest logit.

In every comparison a control shows that dropping tokens changes the answer. A dash means: not tested.

## Ways to generate

{modes}

## What is refused

By an error that says why:

- models whose layers read vision by cross-attention (Mllama), with linear-attention layers (Qwen3.5), whose upper
  layers share keys and values of lower ones (as in Gemma 3n), and encoder-decoders (Florence-2);
- calls from which visual tokens cannot be told: the configuration names none, or there are no ids, and
  `visual_mask=` is not given ({{doc}}`your_own_model`);
- decoders that take, or hand to their layers, an unknown tensor as long as the sequence (Gemma 4, Ernie 4.5 VL MoE);
- `flex_attention` in the decoder, whose block masks cannot be shortened;
- compressors that need attention or keys, where an attention module hands its attention function an unknown argument;
- by `EPIC`, classes that change logits after their output head, found by calling them: Chameleon, which hides columns,
  PaliGemma and Gemma 4 with a soft cap, Granite Docling, HyperCLOVA X Vision and Muse Glimmer, which scale;
- FSDP1;
- `prefill_chunk_size` in `generate`, and pictures in a later call on the same cache.
"""


def run(record):
    """Run the tests, and tell how each went: {(test, family): [passed, ...]}."""
    paths = [f"tests/adapters/{name}" for name in FILES]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--numprocesses=auto",
        "-m",
        "slow or not slow",
        "-o",
        "junit_family=xunit1",
        f"--junitxml={record}",
    ]
    subprocess.run([*command, *paths], cwd=ROOT, check=False)
    outcomes = defaultdict(list)
    for case in ElementTree.parse(record).iter("testcase"):
        families = [each.get("value") for each in case.iter("property") if each.get("name") == "family"]
        failed = any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
        test, _, parameters = case.get("name").partition("[")
        if test == "test_laws":  # a family's name may have hyphens as well
            (test,) = LAWS.intersection(parameters.split("-"))
        for family in families or ["llava"]:
            outcomes[test, family].append(not failed)
    return outcomes


def works(outcomes, tests, family):
    results = [result for test in tests for result in outcomes.get((test, family), [])]
    return all(results) if results else None


def table(header, rows):
    lines = [header, ["---"] + [":-:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def page(outcomes):
    marks = {True: "✓", False: "**fails**", None: "–"}
    families = [
        [
            family,
            f"`{type(tiny_model(family)).__name__}`",
            *(marks[works(outcomes, tests, family)] for tests in ABILITIES.values()),
        ]
        for family in FAMILIES
    ]
    modes = []
    for mode, tests in MODES.items():
        good = [family for family in FAMILIES if works(outcomes, tests, family)]
        modes.append([mode, "all of the above" if len(good) == len(FAMILIES) else ", ".join(good)])
    return PAGE.format(
        families=table(["family", "class", *ABILITIES], families), modes=table(["way", "tested with"], modes)
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        (ROOT / "docs" / "families.md").write_text(page(run(Path(folder) / "record.xml")))
