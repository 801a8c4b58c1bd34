"""What is measured on a model: accuracy at every budget, what is kept of pictures, what a prompt costs."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from examples.epic.options import COMPRESSORS, Options
from examples.epic.questions import Data
from examples.epic.results import encode
from tokencurric import keep_count
from tokencurric.evaluation import kept_tokens, measure_efficiency, plot_kept, sweep


def processes() -> PartialState:
    """The processes of this run. Without an accelerator it has to be told, or it counts one, whatever was launched."""
    return PartialState(cpu=not torch.accelerator.is_available())


def counts(model: Any) -> list[int]:
    """Visual tokens kept: all, 4/9, 2/9 and 1/9, which is 144, 64, 32, 16 here and 576, 256, 128, 64 for LLaVA-1.5."""
    visual = model.config.image_seq_length
    return [keep_count(visual, removed) for removed in (0, 5 / 9, 7 / 9, 8 / 9)]


def evaluate(stage: str, model: Any, processor: Any, data: Data, options: Options) -> dict[str, dict[str, str]]:
    """Ask everything at every budget; under `accelerate launch` each process asks its share.

    Returns:
        compressor -> count -> outcomes in the order of the questions.
    """
    state = processes()
    # As many for each process: one whose share is smaller asks the first again, for sharded models run together.
    share = range(state.process_index, state.process_index + len(data.prompts), state.num_processes)
    mine = [data.prompts[number % len(data.prompts)] for number in share]
    keeps = counts(model)
    passes = (len(keeps) - 1) * len(COMPRESSORS) + 2
    found: dict[str, dict[str, str]] = {}
    if mine:
        with tqdm(total=passes, desc=f"evaluate {stage}", disable=not state.is_main_process) as bar:

            def tell(name: str) -> None:
                bar.set_postfix_str(name, refresh=False)
                bar.update()

            found = encode(sweep(model, mine, processor.tokenizer, COMPRESSORS, keeps, layer=options.layer, tell=tell))
    numbers = [number for batch in mine for number in batch.row_key.tolist()]
    shares: list[tuple[list[int], dict[str, dict[str, str]]]] = gather_object([(numbers, found)])
    return _joined(shares, sorted(data.kinds))


def _joined(shares: list[tuple[list[int], dict[str, dict[str, str]]]], order: list[int]) -> dict[str, dict[str, str]]:
    """The processes' shares of the questions, put into their order."""
    by_number: dict[str, dict[str, dict[int, str]]] = {}
    for numbers, found in shares:
        for name, texts in found.items():
            for kept, text in texts.items():
                by_number.setdefault(name, {}).setdefault(kept, {}).update(zip(numbers, text, strict=True))
    return {
        name: {kept: "".join(outcomes[number] for number in order) for kept, outcomes in texts.items()}
        for name, texts in by_number.items()
    }


def draw_kept(model: Any, data: Data, options: Options) -> None:
    """Four images, and what each compressor keeps of them at the smallest budget but one."""
    samples = [sample for sample in data.samples if len(sample.images) == 1][:4]
    if not samples or data.ask is None:
        raise ValueError("no question has exactly one image")
    keep, first = counts(model)[-2], data.ask(samples)
    inputs = {name: value.to(model.device) for name, value in first.inputs.items()}
    row_key = first.row_key.to(model.device)
    masks = {  # each [batch visual]
        name: kept_tokens(model, inputs, compressor, keep=keep, layer=options.layer, row_key=row_key)
        for name, compressor in COMPRESSORS.items()
    }
    if processes().is_main_process:
        asked = [next(turn for turn in sample.turns if turn.role == "user").words.strip() for sample in samples]
        pictures = [(question, sample.images[0]) for question, sample in zip(asked, samples, strict=True)]
        table = [[(name, keep, mask[row]) for name, mask in masks.items()] for row in range(len(samples))]
        plot_kept(pictures, table).savefig(options.output / "kept.png", dpi=110)


def costs(model: Any, data: Data, options: Options, *, batch: int = 16) -> list[Mapping[str, Any]]:
    """Cost of the first question with an image at each count, asked several times at once to outweigh the loop."""
    sample = next((sample for sample in data.samples if sample.images), None)
    if sample is None or data.ask is None:
        raise ValueError("no question has an image")
    inputs = {name: value.to(model.device) for name, value in data.ask([sample]).inputs.items()}
    inputs = {name: value.repeat(batch, *[1] * (value.ndim - 1)) for name, value in inputs.items()}
    model.eval()
    rows = measure_efficiency(model, inputs, COMPRESSORS[options.compressor], counts(model), layer=options.layer)
    return [row.plain() for row in rows]
