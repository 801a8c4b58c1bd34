"""What is trained on and what is asked."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.epic.options import Options
from examples.scenes.data import write_scenes
from tokencurric.data import (
    VICUNA_V1,
    ConversationCollator,
    ConversationDataset,
    PromptCollator,
    Prompts,
    RowSizes,
    Sample,
    read_conversations,
)

# A description of all places ends each conversation: what is at a place is lost first when tokens are dropped, so it
# teaches most. The questions before it are mostly about numbers, which are forgotten first when nobody asks.
TRAINED = {"color": 0.2, "shape": 0.15, "exists": 0.1, "count": 0.55}


@dataclass(frozen=True)
class Data:
    """Conversations to train on, questions as left-padded prompts with what kind each is, and a digest of the files.

    `sizes` are of the conversations, where batches are made by them.
    """

    train: ConversationDataset
    collate: ConversationCollator
    samples: list[Sample]
    prompts: list[Prompts]
    kinds: dict[int, str]
    digest: str
    sizes: RowSizes | None = None


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
    train = ConversationDataset(read_conversations(talk, images=images))
    collate = ConversationCollator(
        processor, template=template, square="pad", max_length=options.max_length, too_long="drop_turns"
    )
    if asked is None:
        return Data(train, collate, [], [], {}, "")

    test = ConversationDataset(read_conversations(asked, images=images))
    count = len(test) if options.questions is None else min(options.questions, len(test))
    samples = [test[number] for number in range(count)]
    ask = PromptCollator(processor, template=template, square="pad")
    # Tokenized once: every stage and every budget answers these very tensors.
    prompts = [ask(samples[at : at + options.eval_batch]) for at in range(0, count, options.eval_batch)]
    text = asked.read_bytes()
    kinds = {sample.row_key: "all" for sample in samples}
    if options.embedded:
        rows = json.loads(text)
        kinds = {number: rows[number]["kind"][0] for number in kinds}
        text += talk.read_bytes()  # of the scenes it is small
    return Data(train, collate, samples, prompts, kinds, hashlib.sha256(text).hexdigest())


def draw_scenes(options: Options, folder: Path) -> None:
    """Scenes to train on, each with six questions and a description; others to test with, each with a question."""
    if options.scenes is None or options.questions is None:
        raise ValueError("the scenes need --scenes and --questions")
    write_scenes(
        folder, split="train", scenes=options.scenes, questions=6, seed=options.seed, kinds=TRAINED, described=True
    )
    # One question a scene, so that the questions are independent of each other, as standard errors suppose.
    write_scenes(folder, split="test", scenes=options.questions, questions=1, seed=options.seed)
