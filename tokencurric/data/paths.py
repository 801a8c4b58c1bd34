"""From a file name in the data to a picture on disk that lies inside the image folder."""

import os
import re
from pathlib import Path, PurePath

from tokencurric.errors import DataError


def is_url(name: str) -> bool:
    """Whether an image's name is an address.

    Example:
        >>> is_url("https://example.org/a.png"), is_url("coco/a.png")
        (True, False)
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) is not None


def locate_image(folder: Path | None, name: str, *, follow_links: bool = False, allow_absolute: bool = False) -> Path:
    """The file that `name` means, proven to lie inside `folder`.

    Conversation files come from strangers, and what they name is read and, by way of a model's answers,
    shown. So a name may not be absolute, may not climb (`..`), and may not reach out through a symbolic link.

    Args:
        folder: the image folder; None where every name is absolute.
        name: file name relative to it, as it stands in the data.
        follow_links: allow links *inside* the folder to lead out of it, for folders that you laid out
            yourself (`coco -> /data/coco`). `..` stays refused.
        allow_absolute: allow absolute names, wherever they lead.

    Returns:
        The path of an existing file: links resolved, or only joined if `follow_links`.

    Raises:
        DataError: the name leaves the folder, or there is no such file.

    Example:
        >>> locate_image(Path("pictures"), "../secret.png")
        Traceback (most recent call last):
        ...
        tokencurric.errors.DataError: locate_image needs an image name inside the folder; got
        name='../secret.png'. ...
    """
    if allow_absolute and os.path.isabs(name) and "\0" not in name:
        try:
            if os.path.isfile(name):
                return Path(name)
        except (OSError, ValueError):
            pass
        raise DataError(
            f"locate_image needs an existing image file; got name={name!r}. There is no such file. Check the path, or "
            "leave the row out."
        )
    if is_url(name):
        raise DataError(
            f"locate_image needs a file name; got name={name!r}. It is an address, and nothing is fetched from there. "
            "Pass open_url= to open such images yourself."
        )
    if folder is None:
        raise DataError(
            f"locate_image needs an image folder; got images=None and name={name!r}. File names alone cannot be "
            "opened. Pass images= to read_conversations."
        )
    if "\0" in name or os.path.isabs(name) or ".." in PurePath(name).parts:
        raise DataError(
            f"locate_image needs an image name inside the folder; got name={name!r}. An absolute name or "
            f"'..' would read files outside {folder}. Name the picture relative to the image folder, or pass "
            "allow_absolute=True for absolute names of your own."
        )
    path = folder / name
    real, home = path, folder
    try:
        real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
        exists = real.is_file()
    except (OSError, ValueError):
        # Names that the file system cannot even spell: lone surrogates, thousands of characters.
        exists = False
    if not exists:
        raise DataError(
            f"locate_image needs an existing image file; got name={name!r}. There is no such file in "
            f"{folder}. Check the image folder, or leave the row out."
        )
    if follow_links:
        return path
    if not real.is_relative_to(home):
        raise DataError(
            f"locate_image needs an image name inside the folder; got name={name!r}. A symbolic link leads "
            f"from {folder} to a file outside it. Put the picture itself there, or pass follow_links=True if "
            "the links are your own."
        )
    return real
