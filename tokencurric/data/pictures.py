"""Opening images, and making them square the way LLaVA was trained."""

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokencurric.data.decoding import AS_SHOWN, ImageDecoding
from tokencurric.errors import DataError, MissingDependencyError

if TYPE_CHECKING:
    import PIL.Image


def open_picture(source: Path | bytes, decoding: ImageDecoding = AS_SHOWN) -> "PIL.Image.Image":
    """Decode an image to 8-bit RGB.

    Args:
        source: the file, or its content.
        decoding: orientation, transparency and depth; the default is as a viewer shows the image.

    Returns:
        The whole image, decoded, so that nothing can fail later.

    Raises:
        DataError: the file is missing, cut off, no image, or has values without a form in RGB.
        MissingDependencyError: pillow is not installed.

    Example:
        >>> open_picture(Path("no-such.png"))
        Traceback (most recent call last):
        ...
        tokencurric.errors.DataError: open_picture needs a readable picture; got path='no-such.png'. ...
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            "open_picture needs pillow; got none installed. Pictures are decoded with it. "
            "Install it with `pip install tokencurric[hf]`."
        ) from error
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            return decoding.to_rgb(picture)
    except (
        OSError,
        SyntaxError,
        ValueError,
        LookupError,
        ArithmeticError,
        EOFError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        # Besides OSError, broken PNG files raise SyntaxError and odd headers ValueError, IndexError and others.
        name = f"{len(source)} bytes" if isinstance(source, bytes) else f"path={str(source)!r}"
        raise DataError(
            f"open_picture needs a readable picture; got {name}. Opening it failed: {error}. "
            "Replace the file, or leave its row out."
        ) from error


def pad_to_square(picture: "PIL.Image.Image", mean: Sequence[float]) -> "PIL.Image.Image":
    """Centre a picture on a square of the mean colour, so that a centre crop cuts nothing off.

    LLaVA-1.5 was trained this way; the processor in transformers crops to the centre instead.

    Args:
        picture: an RGB picture.
        mean: mean colour by channel in [0, 1], the image processor's `image_mean`.

    Returns:
        The picture itself if it is square already, otherwise a new one with sides max(width, height).

    Example:
        >>> from PIL import Image
        >>> square = pad_to_square(Image.new("RGB", (2, 4), (255, 0, 0)), (0.5, 0.5, 0.5))
        >>> square.size, square.getpixel((0, 0)), square.getpixel((1, 0))
        ((4, 4), (127, 127, 127), (255, 0, 0))

    Source: LLaVA-1.5 (arXiv:2310.03744), `image_aspect_ratio="pad"`.
    """
    from PIL import Image

    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    red, green, blue = (int(channel * 255) for channel in mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square
