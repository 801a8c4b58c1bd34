"""From any image file to 8-bit RGB, as a viewer shows it."""

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tokencurric.errors import DataError, MissingDependencyError, RangeError

if TYPE_CHECKING:
    import PIL.Image

_DEEP = ("I", "F")  # and "I;16" with its variants
# Numbers of TIFF tags.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


@dataclass(frozen=True, slots=True)
class ImageDecoding:
    """How image files become 8-bit RGB.

    `style="viewer"` shows what an image viewer shows. Images are turned by their EXIF orientation. Transparency is laid
    on `background`. Grey values of 16 bits are scaled from [0, 65535] (of 12 bits, from [0, 4095]), floats in [0, 1]
    from there. 32-bit and signed integers, and floats outside of [0, 1], have no range that is known: they are
    stretched from the image's own minimum and maximum, as matplotlib and ImageJ show them, or from `value_range`; one
    value alone becomes black. A file that counts from white is inverted. Nothing is clipped. Of several frames or pages
    the first is taken; colour profiles are not applied.

    `style="llava"` is `Image.open(path).convert("RGB")`, as in LLaVA's original code: images lie as they are stored,
    transparent pixels get the colour that is stored below them, and deep grey values are clipped at 255.

    Args:
        style: "viewer" or "llava".
        background: colour below transparent pixels: a name, "#rrggbb", or (red, green, blue) in [0, 255].
        value_range: black and white of 32-bit and signed integers and of all floats; values beyond are refused. None
            takes [0, 1] for floats that lie in it, and each image's minimum and maximum otherwise.

    Raises:
        RangeError: an option is out of its range.

    Example:
        >>> from PIL import Image
        >>> clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
        >>> ImageDecoding(background="black").to_rgb(clear).getpixel((0, 0))
        (0, 0, 0)
        >>> ImageDecoding(style="llava").to_rgb(clear).getpixel((0, 0))
        (255, 0, 0)
    """

    style: Literal["viewer", "llava"] = "viewer"
    background: str | tuple[int, int, int] = "white"
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.style not in ("viewer", "llava"):
            raise RangeError(
                f"style must be 'viewer' or 'llava'; got {self.style!r}.\nHint: leave it out for 'viewer'."
            )
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise RangeError(
                f"value_range must be (black, white) with black < white; got {self.value_range}.\n"
                "Hint: for 8-bit values stored as floats, pass (0, 255)."
            )
        if self.background != "white":
            _rgb(self.background)

    def to_rgb(self, image: "PIL.Image.Image") -> "PIL.Image.Image":
        """An opened image as 8-bit RGB.

        Args:
            image: as `PIL.Image.open` returns it.

        Returns:
            The decoded image.

        Raises:
            DataError: values are not finite, lie outside of `value_range`, or have no form in RGB.
        """
        if self.style == "llava":
            return image.convert("RGB")
        stored = _Stored.of(image)  # turning an image leaves nothing of its file
        image, alpha = _turned(image), None
        if image.mode in _DEEP or image.mode.startswith("I;16"):
            image, alpha = self._shallow(image, stored)
        elif image.mode in ("RGBa", "La"):  # premultiplied
            image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
        if alpha is not None:
            image.putalpha(alpha)
        if image.has_transparency_data:
            from PIL import Image

            image = image.convert("RGBA")
            ground = Image.new("RGBA", image.size, (*_rgb(self.background), 255))
            image = Image.alpha_composite(ground, image)
        return image.convert("RGB")

    def _shallow(self, image: "PIL.Image.Image", stored: "_Stored") -> "tuple[PIL.Image.Image, PIL.Image.Image | None]":
        """A deep grey image with 8 bits, and where it is opaque if one of its values is transparent."""
        values = _values(image, stored)
        if not bool(values.isfinite().all()):
            raise DataError("image values must be finite; got NaN or infinity.\nHint: replace them in the file.")
        low, high = self._range(image.mode, stored, values)
        if low > values.min() or high < values.max():
            raise DataError(
                f"image values must lie in value_range=({low:g}, {high:g}); got {values.min():g} to {values.max():g}.\n"
                "Hint: pass a wider value_range, or None to take each image's own."
            )
        scaled = (values - low) * (255 / (high - low)) if high > low else torch.zeros_like(values)
        clear = image.info.get("transparency")
        return (
            _grey(255 - scaled if stored.white_is_zero else scaled),
            _grey((values != clear) * 255.0) if isinstance(clear, int) else None,
        )

    def _range(self, mode: str, stored: "_Stored", values: Float[Tensor, "height width"]) -> tuple[float, float]:
        """The values that become black and white."""
        if stored.largest is not None:
            return 0.0, float(stored.largest)
        if self.value_range is not None:
            return self.value_range
        low, high = float(values.min()), float(values.max())
        return (0.0, 1.0) if mode == "F" and low >= 0 and high <= 1 else (low, high)


@dataclass(frozen=True, slots=True)
class _Stored:
    """What the file tells about its grey values."""

    largest: int | None  # where it is known what white is
    white_is_zero: bool
    unsigned: bool  # pillow reads 32-bit values as signed ones

    @classmethod
    def of(cls, image: "PIL.Image.Image") -> "_Stored":
        tags = getattr(image, "tag_v2", {})  # of TIFF files
        bits = tags.get(_BITS, 16)
        bits = bits[0] if isinstance(bits, tuple) else bits
        form = tags.get(_SAMPLE_FORMAT, _UNSIGNED)
        known = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        return cls(
            largest=2**bits - 1 if known else None,
            white_is_zero=tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO,
            unsigned=bits == 32 and form in (_UNSIGNED, (_UNSIGNED,)),
        )


AS_SHOWN = ImageDecoding()
"""The default: as a viewer shows it, on white."""


def _rgb(colour: str | tuple[int, int, int]) -> tuple[int, int, int]:
    if isinstance(colour, str):
        try:
            from PIL import ImageColor
        except ImportError as error:
            raise MissingDependencyError(
                f"background={colour!r} needs pillow, which is not installed.\n"
                "Hint: install it with `pip install tokencurric[hf]`."
            ) from error
        try:
            red, green, blue = ImageColor.getrgb(colour)[:3]
        except ValueError as error:
            raise RangeError(
                f"background must be a colour; got {colour!r}.\nHint: pass a name, '#rrggbb' or (red, green, blue)."
            ) from error
        return red, green, blue
    if len(tuple(colour)) != 3 or not all(0 <= part <= 255 for part in colour):
        raise RangeError(
            f"background must have three values in [0, 255]; got {colour}.\nHint: pass a name, such as 'white'."
        )
    return colour


def _turned(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """The image by its EXIF orientation. EXIF data that cannot be read has none, as in viewers."""
    from PIL import ImageOps

    image.load()  # what fails from here on is not the image
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, struct.error):
        return image


def _values(image: "PIL.Image.Image", stored: _Stored) -> Float[Tensor, "height width"]:
    """Grey values as 64-bit floats."""
    if image.mode.startswith("I;16"):
        image = image.convert("I")
    kind = torch.float32 if image.mode == "F" else torch.int32
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=kind).view(image.height, image.width)
    if kind == torch.int32 and stored.largest is None and stored.unsigned:
        return values.long().remainder(2**32).double()
    return values.double()


def _grey(values: Float[Tensor, "height width"]) -> "PIL.Image.Image":
    from PIL import Image

    return Image.fromarray(values.round().to(torch.uint8).numpy())
