"""What it takes to check a compressor: processor time of all its laws, right ones and wrong ones.

python -m tests.testing.durations              # the library's and the gallery's
python -m tests.testing.durations Draws FastV  # those whose name has one of these words
"""

import argparse
import time
import warnings
from typing import Any

import torch

from tests.testing.discovery import compressors
from tests.testing.gallery import GALLERY, RIGHT
from tokencurric.testing import LawError, check_compressor


def measured(subject: Any, examples: int | None) -> tuple[float, str]:
    """Seconds of processor time, and the first line of the report."""
    start = time.process_time()
    try:
        report = repr(check_compressor(subject, examples=examples))
    except LawError as error:
        report = str(error)
    return time.process_time() - start, report.splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="parts of the names of the compressors; none takes all")
    parser.add_argument("--examples", type=int, help="cases a law; 100 unless given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    subjects = [*compressors(), *(kind() for kind in (*RIGHT, *GALLERY))]
    total = worst = 0.0
    for subject in subjects:
        if options.words and not any(word.lower() in repr(subject).lower() for word in options.words):
            continue
        seconds, said = measured(subject, options.examples)
        total, worst = total + seconds, max(worst, seconds)
        print(f"{seconds:7.1f} s  {said}", flush=True)
    print(f"{total:7.1f} s  in all; the longest took {worst:.1f} s")


if __name__ == "__main__":
    main()
