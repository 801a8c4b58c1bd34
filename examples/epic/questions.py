"""What is trained on and what is asked."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from examples.epic.options import Options
from examples.scenes.data import write_scenes
from tokencurric.data import (
    VICUNA_V1,
    ConversationCollator,
    ConversationDataset,
    ConversationFile,
    ImageDecoding,
    Problem,
    PromptCollator,
    Prompts,
    RowSizes,
    Sample,
    preflight,
    read_conversations,
)
from tokencurric.data.left_out import read_left_out, write_left_out
from tokencurric.errors import DataError

# A description of all places ends each conversation: what is at a place is lost first when tokens are dropped, so it
# teaches most. The questions before it are mostly about numbers, which are forgotten first when nobody asks.
TRAINED = {"color": 0.2, "shape": 0.15, "exists": 0.1, "count": 0.55}


@dataclass(frozen=True)
class Data:
    """Conversations to train on, questions as left-padded prompts with what kind each is, and a digest of the files.

    `sizes` are of the conversations, where batches are made by them; `ask` made the prompts.
    """

    train: ConversationDataset
    collate: ConversationCollator
    samples: list[Sample]
    prompts: list[Prompts]
    kinds: dict[int, str]
    digest: str
    sizes: RowSizes | None = None
    ask: PromptCollator | None = None


def prepare(options: Options, processor: Any, *, write: bool) -> Data:
    """Read the data; for the embedded default, draw the scenes first.

    Args:
        options: of the run. processor: of the model. write: whether this process is the one that writes files.
    """
    scenes = options.output / "scenes"
    talk, asked, images = options.data, options.eval_data, options.images
    if talk is None:
        talk, asked, images = scenes / "train.json", scenes / "test.json", scenes / "images"
        if write:
            draw_scenes(options, scenes)
    template = VICUNA_V1 if options.template == "vicuna_v1" else None
    record = options.output / "skipped.jsonl"
    if write and not options.resume:
        record.unlink(missing_ok=True)
    file = read(talk, images, options)
    if write:
        note_skipped(record, file)
    skips = options.on_error == "skip"
    train = ConversationDataset(file, on_error="skip" if skips else "raise", record=record)
    collate = ConversationCollator(
        processor,
        template=template,
        square="pad",
        max_length=options.max_length,
        too_long="drop_turns",
        stand_in=train.stand_in if skips else None,
    )
    if asked is None:
        return Data(train, collate, [], [], {}, "")

    ask = PromptCollator(processor, template=template, square="pad")
    questions = read(asked, images, options)
    samples, bad = choose(questions, ask, options)
    if write:
        note_skipped(record, questions.without(bad))
    # Tokenized once: every stage and every budget answers these very tensors.
    prompts = [ask(samples[at : at + options.eval_batch]) for at in range(0, len(samples), options.eval_batch)]
    text = asked.read_bytes()
    kinds = {sample.row_key: "all" for sample in samples}
    if options.embedded:
        rows = json.loads(text)
        kinds = {number: rows[number]["kind"][0] for number in kinds}
        text += talk.read_bytes()  # of the scenes it is small
    return Data(train, collate, samples, prompts, kinds, hashlib.sha256(text).hexdigest(), ask=ask)


def read(path: Path, images: Path | None, options: Options) -> ConversationFile:
    """Read a file as the command line wants it, and print what was left out of it."""
    file = read_conversations(
        path,
        images=images,
        on_error="skip" if options.on_error == "skip" else "raise",
        allow_absolute=options.absolute_images,
        ignore=options.ignore_keys,
        decoding=ImageDecoding("llava" if options.image_style == "llava" else "viewer", options.background),
    )
    if PartialState().is_main_process and not options.embedded:
        print(f"{path}: {preflight(file).summary}")
    return file


def choose(file: ConversationFile, ask: PromptCollator, options: Options) -> tuple[list[Sample], list[Problem]]:
    """The first questions that can be asked, as many as wanted; with `--on-error skip`, the bad ones before them."""
    test = ConversationDataset(file)
    samples: list[Sample] = []
    bad: list[Problem] = []
    for number, row in enumerate(file.rows):
        if len(samples) == options.questions:
            break
        try:
            sample = test[number]
            if options.on_error == "skip":
                ask([sample])
        except DataError as error:
            if options.on_error == "stop":
                raise
            bad.append(Problem(row.index, row.id, str(error)))
        else:
            samples.append(sample)
    if not samples:
        raise DataError(f"no question of {file.path} can be asked; the first was refused so: {bad[0].reason}")
    return samples, bad


def note_skipped(record: Path, file: ConversationFile) -> None:
    """Write down the rows that were left out of a file, each once, also if the run is resumed."""
    noted = read_left_out(record, file)
    news = [problem for problem in file.skipped if problem.index not in noted]
    if news:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_left_out(record, file, news)


def draw_scenes(options: Options, folder: Path) -> None:
    """Scenes to train on, each with six questions and a description; others to test with, each with a question."""
    if options.scenes is None or options.questions is None:
        raise ValueError("the scenes need --scenes and --questions")
    write_scenes(
        folder, split="train", scenes=options.scenes, questions=6, seed=options.seed, kinds=TRAINED, described=True
    )
    # One question a scene, so that the questions are independent of each other, as standard errors suppose.
    write_scenes(folder, split="test", scenes=options.questions, questions=1, seed=options.seed)
