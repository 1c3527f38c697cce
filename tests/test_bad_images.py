"""Decoding one file: what is refused and why, odd formats, orientation, and the geometry of a frame."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image

from imagefiles import encode, huge_png, ordinary_user, png, put, texture
from understudy.data import decode
from understudy.data.decode import BadImage, decode_file, inspect_bytes
from understudy.data.listing import in_order

GREY = Image.fromarray(texture(1, 40, 40))
COLOUR = Image.fromarray(texture(2, 40, 40, 3))


def frame(data, side=8, channels=1, fit="crop"):
    return decode_file(data, side=side, channels=channels, fit=fit)


def frames_of(image: Image.Image) -> list[Image.Image]:
    return [image.rotate(90 * turn) for turn in range(3)]


def several(kind: str) -> bytes:
    first, *rest = frames_of(COLOUR)
    return encode(first, kind, save_all=True, append_images=rest)


def damaged_png() -> bytes:
    data = bytearray(png(3, side=64))
    place = data.index(b"IDAT") + 20
    data[place : place + 40] = bytes(40)
    return bytes(data)


def grey_float(top: float) -> bytes:
    return encode(Image.fromarray(texture(4).astype(np.float32) / 255 * top), "TIFF")


BAD_HEADERS = {
    "empty": (b"", "empty file"),
    "text": (b"hello, I am no image\n" * 20, "not an image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    "gif of 3": (several("GIF"), "animated (3 frames)"),
    "png of 3": (several("PNG"), "animated (3 frames)"),
    "webp of 3": (several("WEBP"), "animated (3 frames)"),
    "tiff of 3": (several("TIFF"), "animated (3 pages)"),
    "truncated gif": (encode(COLOUR, "GIF")[:-200], "truncated"),
    "bomb": (huge_png(50_000, 50_000), "too large (2500 megapixels, the limit is 89)"),
    "half a bomb": (huge_png(10_000, 10_000), "too large (100 megapixels, the limit is 89)"),
}
BAD_PIXELS = {
    "truncated jpeg": (encode(COLOUR, "JPEG")[:-200], "truncated"),
    "truncated png": (encode(COLOUR, "PNG")[:-200], "truncated"),
    "truncated bmp": (encode(COLOUR, "BMP")[:-200], "truncated"),
    "damaged png": (damaged_png(), "cannot be decoded"),
    "float beyond 255": (grey_float(300.0), "pixel values outside 0..255"),
    "32-bit beyond 16": (encode(Image.new("I", (9, 9), 70_000), "TIFF"), "pixel values outside 0..65535"),
}


@pytest.mark.parametrize(("data", "reason"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_header_is_refused_by_both(data, reason):
    for refuse in (inspect_bytes, frame):
        with pytest.raises(BadImage) as caught:
            refuse(data)
        assert str(caught.value) == reason


@pytest.mark.parametrize(("data", "reason"), BAD_PIXELS.values(), ids=BAD_PIXELS)
def test_bad_pixels_pass_the_header_and_are_refused_when_decoded(data, reason):
    inspect_bytes(data)
    with pytest.raises(BadImage) as caught:
        frame(data)
    assert str(caught.value).startswith(reason)


def test_every_truncation_of_a_file_is_refused_or_decoded_but_never_anything_else():
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
        data = encode(COLOUR, kind)
        refused = 0
        for length in range(0, len(data), 7):
            try:
                assert frame(data[:length]).shape == (1, 8, 8)
            except BadImage:  # nothing else may come out
                refused += 1
        assert refused > len(data) // 7 * 0.8, kind


def test_unreadable_and_missing_files_say_so(tmp_path):
    with pytest.raises(BadImage, match=r"^unreadable: No such file or directory$"):
        frame(tmp_path / "none.png")
    with ordinary_user() as folder:
        closed = put(folder / "closed.png", png(1), aged=False)
        closed.chmod(0)
        with pytest.raises(BadImage, match=r"^unreadable: Permission denied$"):
            frame(closed)


def test_warnings_of_pillow_stay_in_whatever_the_threads_do(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 1600 pixels: Pillow warns, it does not raise
    data = encode(COLOUR, "PNG")
    before = list(warnings.filters)

    def refusal(_: int) -> str:
        with pytest.raises(BadImage) as caught:
            frame(data)
        return str(caught.value)

    assert set(in_order(refusal, range(200), workers=8)) == {"too large (0 megapixels, the limit is 0)"}
    assert warnings.filters == before
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(data))


def test_damaged_exif_does_not_lose_the_image():
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\xff\xff\xff\xff"
    data = encode(GREY, "JPEG", exif=exif)
    assert inspect_bytes(data) == (40, 40, True)
    assert np.array_equal(frame(data, 40), frame(encode(GREY, "JPEG"), 40))


# ------------------------------------------------------------------------------------------------ kinds of pixels


def flat(image: Image.Image, kind: str, channels: int = 1, **options: object) -> list[int]:
    pixels = frame(encode(image, kind, **options), 4, channels)
    assert (pixels == pixels[:, :1, :1]).all()
    return pixels[:, 0, 0].tolist()


@pytest.mark.parametrize("value", [0, 127, 128, 129, 256, 257, 385, 386, 32768, 65534, 65535])
def test_sixteen_bits_are_divided_by_257_and_rounded(value):
    image = Image.fromarray(np.full((6, 5), value, np.uint16))
    assert flat(image, "PNG") == flat(image, "TIFF") == [round(value / 257)]
    big_endian = b"P5 5 6 65535\n" + struct.pack(">H", value) * 30
    assert set(frame(big_endian, 4).ravel().tolist()) == {round(value / 257)}


def test_integers_and_floats():
    assert flat(Image.new("I", (5, 6), 25700), "TIFF") == [100]
    assert flat(Image.new("F", (5, 6), 0.5), "TIFF") == [128]
    assert flat(Image.new("F", (5, 6), 77.4), "TIFF") == [77]
    with pytest.raises(BadImage, match="outside"):
        flat(Image.new("F", (5, 6), float("nan")), "TIFF")


def test_black_and_white_and_colour_to_grey():
    assert flat(Image.new("1", (5, 6), 1), "PNG") == [255]
    red, green, blue = 200, 100, 50
    grey = round(0.299 * red + 0.587 * green + 0.114 * blue)
    assert flat(Image.new("RGB", (5, 6), (red, green, blue)), "PNG") == [grey]
    assert flat(Image.new("L", (5, 6), 90), "PNG", channels=3) == [90, 90, 90]


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan: red
    red, green, blue = flat(image, "TIFF", channels=3)
    assert (red, green, blue) == (255, 0, 0)
    red, green, blue = flat(image, "JPEG", channels=3)
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (5, 6), (200, 0, 100, 0)), [255, 255, 255]),
        (Image.new("RGBA", (5, 6), (200, 0, 100, 255)), [200, 0, 100]),
        (Image.new("RGBA", (5, 6), (200, 0, 100, 51)), [244, 204, 224]),
        (Image.new("LA", (5, 6), (55, 51)), [215, 215, 215]),
    ],
)
def test_transparent_images_are_laid_over_white(image, expected):
    assert flat(image, "PNG", channels=3) == expected


def test_transparency_of_palette_and_of_one_colour():
    palette = Image.new("P", (5, 6), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert flat(palette, "PNG", channels=3) == [10, 20, 30]
    assert flat(palette, "PNG", channels=3, transparency=1) == [255, 255, 255]
    assert flat(palette, "PNG", channels=3, transparency=bytes([255, 0])) == [255, 255, 255]
    assert flat(Image.new("L", (5, 6), 9), "PNG", transparency=9) == [255]


@pytest.mark.parametrize(
    ("image", "kind", "grey"),
    [
        (GREY, "PNG", True),
        (GREY, "JPEG", True),
        (GREY.convert("1"), "PNG", True),
        (GREY.convert("LA"), "PNG", True),
        (GREY.convert("I;16"), "PNG", True),
        (GREY.convert("F"), "TIFF", True),
        (GREY.convert("P"), "PNG", True),
        (COLOUR, "PNG", False),
        (COLOUR, "JPEG", False),
        (COLOUR.convert("CMYK"), "JPEG", False),
        (COLOUR.convert("RGBA"), "PNG", False),
        (COLOUR.quantize(16), "PNG", False),
    ],
)
def test_header_tells_grey_from_colour(image, kind, grey):
    assert inspect_bytes(encode(image, kind)) == (40, 40, grey)


def test_a_phones_second_picture_is_passed_over():
    data = encode(COLOUR, "MPO", save_all=True, append_images=[COLOUR.resize((20, 20))])
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    assert inspect_bytes(data) == (40, 40, False)
    assert np.array_equal(frame(data, 40, 3), frame(encode(COLOUR, "JPEG"), 40, 3))


# ------------------------------------------------------------------------------------------------ geometry

# EXIF orientation: what a viewer must do with the stored rows to see the image upright
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.T,
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].T,
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation_pixel_by_pixel(kind, orientation):
    stored = texture(7, 9, 14)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    data = encode(Image.fromarray(stored), kind, exif=exif, **options)
    expected = UPRIGHT[orientation](stored)
    height, width = expected.shape
    assert inspect_bytes(data)[:2] == (width, height)
    top, left = (height - 9) // 2, (width - 9) // 2
    square = expected[top : top + 9, left : left + 9]
    assert np.abs(frame(data, 9)[0].astype(int) - square).max() <= (3 if kind == "JPEG" else 0)


def triangle_resize(pixels: np.ndarray, side: int) -> np.ndarray:
    """Slow and plain: every output pixel is a triangle-weighted mean, first along one axis, then along the other."""

    def along(rows: np.ndarray) -> np.ndarray:
        ratio = len(rows) / side
        support = max(ratio, 1.0)
        centres = (np.arange(side) + 0.5) * ratio
        distance = np.abs(np.arange(len(rows)) + 0.5 - centres[:, None]) / support
        weights = np.clip(1 - distance, 0, None)
        return weights / weights.sum(1, keepdims=True) @ rows

    return along(along(pixels.astype(float)).T).T


@pytest.mark.parametrize(
    ("height", "width", "side"), [(31, 50, 12), (50, 31, 12), (20, 20, 33), (10, 23, 10), (64, 64, 8)]
)
@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_frame_is_the_middle_square_or_all_resized_with_a_triangle_filter(height, width, side, fit):
    pixels = texture(5, height, width)
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    source = pixels[top : top + short, left : left + short] if fit == "crop" else pixels
    got = frame(encode(Image.fromarray(pixels), "PNG"), side, 1, fit)[0]
    assert np.abs(got - triangle_resize(source, side)).max() <= 1.0  # Pillow rounds after each axis


@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("channels", [1, 3])
def test_image_of_the_right_size_keeps_its_pixels(fit, channels):
    pixels = texture(6, 24, 24, channels)
    got = frame(encode(Image.fromarray(pixels), "PNG"), 24, channels, fit)
    assert got.flags.c_contiguous
    assert np.array_equal(got, pixels.reshape(24, 24, channels).transpose(2, 0, 1))


def test_large_jpeg_is_decoded_small_but_never_below_twice_the_side(monkeypatch):
    image = Image.fromarray(texture(8, 600, 1000, 3))
    data = encode(image, "JPEG", quality=95)
    sizes = []
    real = decode.make_frame
    monkeypatch.setattr(decode, "make_frame", lambda image, **how: (sizes.append(image.size), real(image, **how))[1])
    small = {side: frame(data, side, 3) for side in (37, 38, 75, 76, 150, 151)}
    assert sizes == [(125, 75), (250, 150), (250, 150), (500, 300), (500, 300), (1000, 600)]
    with Image.open(io.BytesIO(data)) as whole:
        exact = real(whole.convert("RGB"), side=37, channels=3, fit="crop")
    assert np.abs(small[37].astype(int) - exact).mean() < 1.0
