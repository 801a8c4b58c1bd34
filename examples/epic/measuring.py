"""What is measured on a model: accuracy at every budget, what is kept of pictures, what a prompt costs."""

from collections.abc import Mapping
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from examples.epic.options import COMPRESSORS, Options
from examples.epic.questions import Data
from examples.epic.results import encode
from tokencurric import keep_count
from tokencurric.evaluation import kept_tokens, measure_efficiency, plot_kept, sweep


def counts(model: Any) -> list[int]:
    """Visual tokens kept: all, 4/9, 2/9 and 1/9, which is 144, 64, 32, 16 here and 576, 256, 128, 64 for LLaVA-1.5."""
    visual = model.config.image_seq_length
    return [keep_count(visual, removed) for removed in (0, 5 / 9, 7 / 9, 8 / 9)]


def evaluate(stage: str, model: Any, processor: Any, data: Data, options: Options) -> dict[str, dict[str, str]]:
    """Ask everything at every budget; under `accelerate launch` each process asks its share.

    Returns:
        compressor -> count -> outcomes in the order of the questions.
    """
    state = PartialState()
    mine = data.prompts[state.process_index :: state.num_processes]
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
    """Four pictures, and what each compressor keeps of them at the smallest budget but one."""
    keep, first = counts(model)[-2], data.prompts[0]
    inputs = {name: value.to(model.device) for name, value in first.inputs.items()}
    row_key = first.row_key.to(model.device)
    masks = {  # each [batch visual]
        name: kept_tokens(model, inputs, compressor, keep=keep, layer=options.layer, row_key=row_key)
        for name, compressor in COMPRESSORS.items()
    }
    rows = [row for row in range(len(first.references)) if len(data.samples[row].images) == 1][:4]
    if rows:
        turns = [next(turn for turn in data.samples[row].turns if turn.role == "user") for row in rows]
        asked = [turn.words.strip() for turn in turns]
        pictures = [(question, data.samples[row].images[0]) for question, row in zip(asked, rows, strict=True)]
        table = [[(name, keep, mask[row]) for name, mask in masks.items()] for row in rows]
        plot_kept(pictures, table).savefig(options.output / "kept.png", dpi=110)


def costs(model: Any, data: Data, options: Options, *, batch: int = 16) -> list[Mapping[str, Any]]:
    """What the first question costs at each count, asked several times at once so that the model outweighs the loop."""
    first = data.prompts[0]
    real = first.inputs["attention_mask"][0].bool()
    inputs = {name: value[:1].to(model.device) for name, value in first.inputs.items()}
    inputs |= {name: inputs[name][:, real] for name in ("input_ids", "attention_mask")}  # [1 seq], without padding
    inputs = {name: value.repeat(batch, *[1] * (value.ndim - 1)) for name, value in inputs.items()}
    model.eval()
    rows = measure_efficiency(model, inputs, COMPRESSORS[options.compressor], counts(model), layer=options.layer)
    return [row.plain() for row in rows]
