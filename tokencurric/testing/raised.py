"""Where an exception comes from: the line of the code that is checked, below which only libraries ran."""

import linecache
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

_LIBRARIES = frozenset({"torch", "numpy", "hypothesis", "jaxtyping", "beartype", "tokencurric"})
_KIT = "tokencurric.testing"
_LONGEST = 600  # characters of an exception's text that a report shows


@dataclass(frozen=True)
class Raised:
    """An exception of a subject. Two are equal if they are of one type and come from one line.

    Args:
        kind: name of the exception's type.
        file: as Python has it.
        line: number of the line.
        function: the line is in.
        text: of the exception.

    Example:
        >>> Raised("ValueError", "mine.py", 3, "scores", "no scores") == Raised("ValueError", "mine.py", 3, "", "none")
        True
    """

    kind: str
    file: str
    line: int
    function: str = field(compare=False)
    text: str = field(compare=False)

    @classmethod
    def of(cls, error: Exception, subject: Any) -> "Raised":
        """Where `error` was raised in the code of `subject`.

        Args:
            error: with its traceback.
            subject: what was called; code of its package counts as the user's wherever it is installed.
        """
        frames = list(_frames(error.__traceback__))
        own = _package(getattr(subject, "__module__", None) or type(subject).__module__)
        theirs = [frame for frame in frames if not _foreign(frame, own)]
        ours = [frame for frame in frames if frame[0].startswith("tokencurric.") and not frame[0].startswith(_KIT)]
        _, file, line, function = (theirs or ours or frames)[-1]
        return cls(type(error).__name__, file, line, function, str(error))

    @property
    def place(self) -> str:
        """File, line and function, the file as seen from the working directory."""
        path = Path(self.file)
        try:
            shown = path.relative_to(Path.cwd()).as_posix()
        except ValueError:
            shown = self.file
        return f"{shown}:{self.line}, in {self.function}"

    @property
    def told(self) -> str:
        """For a report: the exception, its place and the source of the line."""
        text = f"{self.kind}: {self.text}".strip().removesuffix(":")
        text = text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
        source = linecache.getline(self.file, self.line).strip()
        return f"It raised {text}\n  at {self.place}{f': {source}' if source else ''}"


_Frame = tuple[str, str, int, str]  # module, file, line, function


def _frames(traceback: TracebackType | None) -> list[_Frame]:
    found = []
    while traceback is not None:
        code, names = traceback.tb_frame.f_code, traceback.tb_frame.f_globals
        found.append((str(names.get("__name__", "")), code.co_filename, traceback.tb_lineno, code.co_name))
        traceback = traceback.tb_next
    return found


def _package(module: str) -> str:
    return module.partition(".")[0]


def _foreign(frame: _Frame, own: str) -> bool:
    """Whether the frame is of a library, not of who wrote the subject."""
    module, file, _, _ = frame
    package = _package(module)
    if package in _LIBRARIES or file.startswith("<@"):  # "<@beartype(...)>": a wrapper made at run time
        return True
    installed = not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
    return package != own and (installed or package in sys.stdlib_module_names)
