"""Images as a viewer shows them: orientation, transparency, depth; against arithmetic by hand, on real files."""

import contextlib
import io

import numpy as np
import PIL
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokencurric.data.decoding import ImageDecoding
from tokencurric.data.pictures import open_picture
from tokencurric.errors import DataError, RangeError

VIEWER, LLAVA = ImageDecoding(), ImageDecoding(style="llava")


def stored(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(content: bytes, decoding: ImageDecoding = VIEWER) -> np.ndarray:
    image = open_picture(content, decoding)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def as_llava_does(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


PLAIN = [("RGB", "PNG"), ("RGB", "JPEG"), ("L", "PNG"), ("L", "JPEG"), ("1", "PNG"), ("P", "GIF"), ("CMYK", "JPEG")]


@pytest.mark.parametrize(
    ("mode", "kind"), [*PLAIN, ("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("RGB", "WEBP"), ("RGB", "BMP")]
)
def test_what_needs_no_care_is_what_it_always_was(mode, kind):
    """Bit for bit as in LLaVA's original code, so training on such images is unchanged."""
    content = stored(Image.fromarray(noise(5, 7, 3)).convert(mode), kind)
    try:
        expected = as_llava_does(content)
    except OSError as error:  # a YCbCr TIFF, up to Pillow 12.0
        pytest.skip(f"Pillow {PIL.__version__} cannot read back what it wrote: {error}")
    assert np.array_equal(pixels(content), expected)
    assert np.array_equal(pixels(content, LLAVA), expected)
    assert len(np.unique(pixels(content))) > 1


ORIENTED = {  # what a viewer does with rows and columns
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", ORIENTED)
def test_images_are_turned_by_their_orientation(kind, orientation):
    colours, tag = noise(5, 7, 3), Image.Exif()
    tag[274] = orientation
    content = stored(Image.fromarray(colours), kind, exif=tag, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(pixels(content), ORIENTED[orientation](colours))
    if kind != "TIFF":  # which pillow turns in any case
        assert np.array_equal(pixels(content, LLAVA), colours)


def test_photographs_are_turned():
    tag = Image.Exif()
    tag[274] = 6
    content = stored(Image.fromarray(noise(16, 32, 3)), "JPEG", exif=tag)
    assert pixels(content).shape == (32, 16, 3)
    assert np.array_equal(pixels(content), ORIENTED[6](as_llava_does(content)))


@pytest.mark.parametrize("broken", [b"Exif\0\0MM\0*\0\0\0\x08", b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_broken_orientation_is_none(broken):
    content = stored(Image.fromarray(noise(16, 32, 3)), "JPEG", exif=broken)
    assert np.array_equal(pixels(content), as_llava_does(content))


def laid(colours: np.ndarray, alpha: np.ndarray, ground=(255, 255, 255)) -> np.ndarray:
    share = alpha[..., None] / 255
    return colours * share + np.array(ground) * (1 - share)


@pytest.mark.parametrize("ground", ["white", "#102030", (0, 255, 9)])
@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "TIFF"), ("RGBA", "WEBP")])
def test_transparency_is_laid_on_a_ground(mode, kind, ground):
    colours, alpha = noise(6, 5, 3), noise(6, 5, seed=1)
    colours = colours if mode == "RGBA" else colours[..., :1].repeat(3, -1)
    image = Image.fromarray(colours).convert("RGB" if mode == "RGBA" else "L")
    image.putalpha(Image.fromarray(alpha))
    content = stored(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    rgb = {"white": (255, 255, 255), "#102030": (16, 32, 48)}.get(ground, ground)
    shown = pixels(content, ImageDecoding(background=ground))
    assert np.abs(shown - laid(colours, alpha, rgb)).max() <= 1
    assert np.array_equal(pixels(content, LLAVA), colours)
    assert np.abs(shown - colours).max() > 100


def test_palettes_may_have_transparent_entries():
    colours = np.array([[0, 1, 2]], dtype=np.uint8)
    image = Image.fromarray(colours).convert("L").convert("P")
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    for transparency, alpha in ((1, (255, 0, 255)), (bytes([0, 51, 255]), (0, 51, 255))):
        content = stored(image, "PNG", transparency=transparency)
        wanted = laid(np.array([[[200, 0, 0], [0, 200, 0], [0, 0, 200]]]), np.array([alpha]))
        assert np.abs(pixels(content) - wanted).max() <= 1
    content = stored(image, "GIF", transparency=2)
    assert pixels(content)[0].tolist() == [[200, 0, 0], [0, 200, 0], [255, 255, 255]]


@pytest.mark.parametrize(("mode", "clear", "wanted"), [("RGB", (7, 8, 9), 255), ("L", 7, 255), ("1", 0, 255)])
def test_one_colour_may_be_transparent(mode, clear, wanted):
    image = Image.new(mode, (2, 1), clear)
    image.putpixel((1, 0), 255 if mode != "RGB" else (1, 2, 3))
    content = stored(image, "PNG", transparency=clear)
    assert pixels(content)[0, 0].tolist() == [wanted] * 3
    assert pixels(content)[0, 1].tolist() == ([1, 2, 3] if mode == "RGB" else [255] * 3)
    assert pixels(content, LLAVA)[0, 0].tolist() != [wanted] * 3


RAMP = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_keep_all_levels(kind):
    content = stored(Image.fromarray((RAMP * 257).astype(np.uint16)), kind)
    assert np.array_equal(pixels(content), RAMP[..., None].repeat(3, -1))
    assert len(np.unique(pixels(content, LLAVA))) <= 2, "clipped, as in LLaVA's code"


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=20), st.sampled_from(["PNG", "TIFF"]))
def test_sixteen_bits_are_rounded_to_eight(values, kind):
    deep = np.array([values], dtype=np.uint16)
    assert np.array_equal(pixels(stored(Image.fromarray(deep), kind))[..., 0], np.rint(deep * (255 / 65535)))


def test_big_endian_and_twelve_bits():
    image = Image.fromarray((RAMP * 257).astype(">u2"))
    assert image.mode == "I;16B"
    assert np.array_equal(pixels(stored(image, "TIFF"))[..., 0], RAMP)
    packed = bytes([0x00, 0x0F, 0xFF])  # 0 and 4095
    entries = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 1), (279, 3)]
    head = b"II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little")
    head += b"".join(
        tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little") for tag, value in entries
    )
    content = (head + bytes(4)).ljust(122, b"\0") + packed
    assert Image.open(io.BytesIO(content)).mode == "I;16"
    assert pixels(content)[0, :, 0].tolist() == [0, 255]


def test_deep_images_are_turned_and_may_count_from_white():
    deep = (noise(4, 6).astype(np.uint16)) * 257
    tag = Image.Exif()
    tag[274] = 6
    content = stored(Image.fromarray(deep), "PNG", exif=tag)
    assert np.array_equal(pixels(content)[..., 0], ORIENTED[6](deep // 257))
    inverted = stored(Image.fromarray(deep), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(pixels(inverted)[..., 0], 255 - deep // 257)


def test_a_deep_value_may_be_transparent():
    deep = np.array([[0, 1000, 30000]], dtype=np.uint16)
    content = stored(Image.fromarray(deep), "PNG", transparency=1000)
    assert pixels(content)[0, :, 0].tolist() == [0, 255, 117]


def floats(values: np.ndarray) -> bytes:
    return stored(Image.fromarray(values.astype(np.float32)), "TIFF")


def test_floats_from_zero_to_one_are_shades():
    assert np.array_equal(pixels(floats(RAMP / 255))[..., 0], RAMP)
    assert pixels(floats(RAMP / 255), LLAVA).max() <= 1, "black, as in LLaVA's code"
    half = pixels(floats(np.array([[0.2, 0.5]])))
    assert half[0, :, 0].tolist() == [51, 128], "not stretched"


def test_other_ranges_are_stretched_and_never_clipped():
    for values in (RAMP * 1000.0 - 5, RAMP / 1e6 + 7, -1.0 * RAMP[::-1, ::-1]):
        assert np.array_equal(pixels(floats(values))[..., 0], RAMP)
    whole = stored(Image.fromarray((RAMP * 3000 - 70).astype(np.int32)), "TIFF")
    assert np.array_equal(pixels(whole)[..., 0], RAMP)
    assert pixels(floats(np.full((2, 2), 9.0))).max() == 0, "one value has no contrast"


def test_unsigned_integers_are_not_read_as_negative():
    values = (RAMP.astype(np.int64) * 16843009).astype(np.uint32)  # to 2³² − 1
    image = Image.frombytes("I", (16, 16), values.tobytes())
    content = stored(image, "TIFF", tiffinfo={339: 1})
    told = Image.open(io.BytesIO(content)).tag_v2.get(339, (1,))
    if told not in (1, (1,)):  # pillow writes what it thinks; the file is corrected by hand
        at = content.index((339).to_bytes(2, "little") + b"\3\0\1\0\0\0\2\0")
        content = content[: at + 8] + b"\1\0" + content[at + 10 :]
    assert np.array_equal(pixels(content)[..., 0], RAMP)


def test_a_range_can_be_given():
    fixed = ImageDecoding(value_range=(0, 255))
    assert np.array_equal(pixels(floats(RAMP / 2), fixed)[..., 0], np.rint(RAMP / 2))
    assert pixels(floats(np.array([[0.0, 1.0]])), fixed)[0, :, 0].tolist() == [0, 1], "a dark image stays dark"
    with pytest.raises(DataError, match=r"value_range=\(0, 255\); got 0 to 256"):
        pixels(floats(np.array([[0.0, 256.0]])), fixed)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(value):
    with pytest.raises(DataError, match="must be finite"):
        pixels(floats(np.array([[0.0, value]])))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "options",
    [
        {"style": "fancy"},
        {"background": "no colour"},
        {"background": (0, 0)},
        {"background": (0, 0, 256)},
        {"value_range": (1, 1)},
    ],
)
def test_options_out_of_range_are_refused(options):
    ((name, _),) = options.items()
    with pytest.raises(RangeError, match=name):
        ImageDecoding(**options)


@given(st.data())
def test_a_damaged_file_opens_or_is_refused(data):
    """Whatever pillow raises for damaged bytes becomes one kind of error."""
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "JPEG2000"]))
    content = bytearray(stored(Image.fromarray(noise(8, 8, 3)).convert("P" if kind == "GIF" else "RGB"), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    with contextlib.suppress(DataError):
        assert open_picture(bytes(content)).mode == "RGB"
