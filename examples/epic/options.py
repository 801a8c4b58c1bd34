"""The command line of `llava_epic.py`."""

import argparse
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tokencurric import DART, Compressor, Curriculum, FastV, Random, Uniform, icd, lcd, tcd

SCENES = Path(__file__).parents[1] / "scenes"
STAGES = ("base", "sft", "direct", "epic")
COMPRESSORS: dict[str, Compressor] = {"random": Random(), "fastv": FastV(), "dart": DART(), "uniform": Uniform()}
CURRICULA = ("tcd", "tcd-code", "lcd", "icd")

# What a run is unless the command line says otherwise: on the embedded scenes, with --smoke, and with --data.
EMBEDDED = {
    "epochs": None,
    "steps": 520,
    "batch": 20,
    "accumulate": 1,
    "optimizer": "muon",
    "lr": 1.75e-3,
    "warmup": 0.05,
    "schedule": "warmup_stable_decay",
    "train_tower": True,
    "log_every": 1,
    "eval_batch": 25,
    "questions": 1000,
    "scenes": 5000,
    "save_every": 160,
    "workers": 0,
    "max_length": 512,
    "group_rows": False,
}
SMOKE = EMBEDDED | {"steps": 3, "batch": 4, "questions": 12, "scenes": 16, "eval_batch": 6, "save_every": 2}
REAL = EMBEDDED | {
    "epochs": 1.0,
    "steps": None,
    "batch": 4,
    "accumulate": 4,
    "optimizer": "adamw",
    "lr": 2e-5,
    "warmup": 0.03,
    "schedule": "cosine",
    "train_tower": False,
    "log_every": 10,
    "eval_batch": 8,
    "questions": None,
    "scenes": None,
    "save_every": 500,
    "workers": 4,
    "max_length": 2048,
    "group_rows": True,
}


@dataclass(frozen=True)
class Options:
    """A parsed command line; the help texts below say what each is."""

    output: Path
    model: str
    data: Path | None
    images: Path | None
    eval_data: Path | None
    on_error: str
    ignore_keys: tuple[str, ...]
    absolute_images: bool
    image_style: str
    background: str
    template: str
    stages: tuple[str, ...]
    compressor: str
    curriculum: str
    weight: float
    temperature: float
    layer: int
    lora: int
    train_tower: bool
    steps: int | None
    epochs: float | None
    batch: int
    accumulate: int
    optimizer: str
    lr: float
    warmup: float
    schedule: str
    bf16: bool
    gradient_checkpointing: bool
    max_length: int
    group_rows: bool
    log_every: int
    save_every: int
    workers: int
    questions: int | None
    scenes: int | None
    eval_batch: int
    seed: int
    resume: bool
    smoke: bool

    @property
    def embedded(self) -> bool:
        """Whether the data are the scenes that come with the repository."""
        return self.data is None

    def plain(self) -> dict[str, Any]:
        """All settings as JSON knows them, without where things lie on this machine."""
        values = asdict(self) | {"model": "base" if self.model == str(SCENES / "base") else self.model}
        del values["output"]
        values["ignore_keys"] = ",".join(self.ignore_keys)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def differing(self, settings: dict[str, Any]) -> list[str]:
        """The options that are not as in the `settings` of an earlier run, apart from those that decide no result."""
        free = {"stages", "resume", "workers", "on_error"}
        return sorted(name for name, value in self.plain().items() if name not in free and settings.get(name) != value)

    def make_curriculum(self) -> Curriculum:
        """The curriculum that was asked for, ending at `layer`."""
        if self.curriculum == "lcd":
            return lcd(last=self.layer)
        if self.curriculum == "icd":
            return icd(last=self.layer)
        return tcd("code" if self.curriculum == "tcd-code" else "paper", layer=self.layer)


def parse_options(arguments: list[str] | None = None) -> Options:
    """Read the command line, and fill up what it leaves open."""
    parser = argparse.ArgumentParser(
        description="Train a LLaVA with EPIC and show what it bought. Without arguments: a tiny one, here and now.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    what = parser.add_argument_group("what")
    what.add_argument("--output", type=Path, default=Path("runs/llava_epic"), help="folder for everything that is made")
    what.add_argument("--model", default=str(SCENES / "base"), help="folder, or name on the model hub")
    what.add_argument("--data", type=Path, default=None, help="conversations to train on; none: the scenes")
    what.add_argument("--images", type=Path, default=None, help="folder of the pictures that the data name")
    what.add_argument("--eval-data", type=Path, default=None, help="the same format: questions with short answers")
    what.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="skip: the next good row stands in for a bad one"
    )
    what.add_argument("--ignore-keys", default="", help="keys such as video,tools that may be dropped from rows")
    what.add_argument("--absolute-images", action="store_true", default=False, help="open absolute image names too")
    what.add_argument(
        "--image-style", choices=("viewer", "llava"), default="viewer", help="llava: as stored, as its code opens them"
    )
    what.add_argument("--background", default="white", help="colour below transparent pixels")
    what.add_argument("--template", choices=("model", "vicuna_v1"), help="(default: vicuna_v1 with --data)")
    what.add_argument("--smoke", action="store_true", default=False, help="a few steps and questions, to see it run")
    what.add_argument("--resume", action="store_true", default=False, help="go on with the run in --output")
    how = parser.add_argument_group("how")
    how.add_argument("--stages", default="base,epic", help=f"some of {','.join(STAGES)}, each from the same base")
    how.add_argument("--compressor", choices=tuple(COMPRESSORS), default="random", help="trained with")
    how.add_argument("--curriculum", choices=CURRICULA, default="tcd", help="of the stage epic")
    how.add_argument("--weight", type=float, default=0.7, help="λ, the share of the consistency loss")
    how.add_argument("--temperature", type=float, default=1.0, help="τ of the consistency loss")
    how.add_argument("--layer", type=int, default=2, help="first decoder layer that runs short")
    how.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank in the decoder")
    how.add_argument(
        "--train-tower", action=argparse.BooleanOptionalAction, help="train the vision tower too (not with --data)"
    )
    how.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    effort = parser.add_argument_group("effort", "defaults depend on --data and --smoke")
    effort.add_argument("--steps", type=int, help="optimizer steps, instead of --epochs")
    effort.add_argument("--epochs", type=float, help="passes over the data")
    effort.add_argument("--batch", type=int, help="conversations a device and micro-batch")
    effort.add_argument("--accumulate", type=int, help="micro-batches an optimizer step")
    effort.add_argument("--optimizer", choices=("adamw", "muon"), help="muon: for the matrices inside the blocks")
    effort.add_argument("--lr", type=float, help="peak of the learning rate")
    effort.add_argument("--warmup", type=float, help="share of the steps in which the learning rate rises")
    effort.add_argument("--schedule", help="of the learning rate after that: cosine, warmup_stable_decay, linear, ...")
    effort.add_argument("--bf16", action="store_true", default=False, help="train in bfloat16")
    effort.add_argument("--gradient-checkpointing", action="store_true", default=False, help="less memory, more time")
    effort.add_argument("--max-length", type=int, help="tokens; longer conversations lose their last turns")
    effort.add_argument(
        "--group-rows", action=argparse.BooleanOptionalAction, help="batches of like length, text-only rows apart"
    )
    effort.add_argument("--log-every", type=int, help="steps")
    effort.add_argument("--save-every", type=int, help="steps")
    effort.add_argument("--workers", type=int, help="processes that prepare batches")
    effort.add_argument("--scenes", type=int, help="pictures to train on, without --data")
    effort.add_argument("--questions", type=int, help="asked of each stage at each count")
    effort.add_argument("--eval-batch", type=int, help="questions a batch")
    given = vars(parser.parse_args(arguments))
    return _fill(parser, given)


def _fill(parser: argparse.ArgumentParser, given: dict[str, Any]) -> Options:
    embedded = given["data"] is None
    defaults: dict[str, Any] = SMOKE if given["smoke"] else EMBEDDED if embedded else REAL
    values = {**defaults, "template": "model" if embedded else "vicuna_v1", **given}
    if "steps" in given and "epochs" in given:
        parser.error("--steps and --epochs both say how long to train: give one of them")
    if "epochs" in given:
        values["steps"] = None
    elif values["steps"] is not None:
        values["epochs"] = None
    stages = tuple(values["stages"].split(","))
    if not set(stages) <= set(STAGES) or len(set(stages)) != len(stages):
        parser.error(f"--stages takes some of {','.join(STAGES)}, each once; got {values['stages']}")
    values["stages"] = tuple(stage for stage in STAGES if stage in stages)
    values["ignore_keys"] = tuple(key for key in values["ignore_keys"].split(",") if key)
    if embedded and (given["images"] or given["eval_data"]):
        parser.error("--images and --eval-data go with --data: the scenes bring their own")
    return Options(**{field.name: values[field.name] for field in fields(Options)})
