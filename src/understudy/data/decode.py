"""One image file becomes one square of whole grey levels; imported by the data package only.

What is refused, is refused with a `BadImage` whose text is a short reason. Nothing here imports torch.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from understudy.errors import DataError

DECODE_VERSION = 1
"""Raised when the pixels of some image come out differently, so that stores of before are not taken for current."""

# Only what the known endings promise: Pillow's other decoders (EPS runs a program) stay out of reach of a renamed file.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


class BadImage(DataError):  # noqa: N818 - an image, not the program, is at fault
    """An image that cannot be used; its text is a short reason, such as "truncated"."""


class Header(NamedTuple):
    """What an image says of itself before it is decoded."""

    width: int
    """Pixels, as the image is seen: turned as EXIF demands."""
    height: int
    is_grey: bool
    """Its pixels are grey by their format: grey levels, black and white, or a palette of greys."""


def read(path: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        BadImage: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"unreadable: {error.strerror or error}") from None


def inspect_bytes(data: bytes) -> Header:
    """Read the header of an image; its pixels are not decoded, so damage behind the header goes unseen.

    Raises:
        BadImage: empty, not an image, more than one frame, or more pixels than Pillow's limit.
    """
    with _refusing(), _open(data) as image:
        width, height = image.size
        # Pillow's TIFF reader gives the turned size already.
        if image.format != "TIFF" and _orientation(image) >= 5:
            width, height = height, width
        return Header(width, height, _is_grey(image))


def decode_file(
    path_or_bytes: Path | str | bytes, *, side: int, channels: Literal[1, 3], fit: Literal["crop", "squash"]
) -> NDArray[np.uint8]:
    """Decode one image file into a square frame.

    The image is turned as EXIF demands, then goes through `make_frame`. A JPEG much larger than `side` is decoded
    at 1/2, 1/4 or 1/8 of its size, never below twice `side`, so that the final resize still antialiases.

    Args:
        path_or_bytes: a path, or the bytes of the file.
        side: side of the frame in pixels.
        channels: 1 for grey, 3 for RGB.
        fit: see `make_frame`.

    Returns:
        uint8 `[channels, side, side]`.

    Raises:
        BadImage: the file is unreadable, empty, not an image, truncated, damaged, animated or too large.
    """
    data = path_or_bytes if isinstance(path_or_bytes, bytes) else read(Path(path_or_bytes))
    with _refusing(), _open(data) as image:
        image.draft(None, (2 * side, 2 * side))
        image.load()
        turn = _TURNS.get(_orientation(image))
        upright = image if turn is None else image.transpose(turn)
        return make_frame(upright, side=side, channels=channels, fit=fit)


def decode_upright(path_or_bytes: Path | str | bytes, *, channels: Literal[1, 3]) -> NDArray[np.uint8]:
    """Decode one image file at its own size, turned as EXIF demands: what a graph with preprocessing inside takes.

    Returns:
        uint8 `[height, width, channels]`.

    Raises:
        BadImage: as `decode_file`.
    """
    data = path_or_bytes if isinstance(path_or_bytes, bytes) else read(Path(path_or_bytes))
    with _refusing(), _open(data) as image:
        image.load()
        turn = _TURNS.get(_orientation(image))
        upright = image if turn is None else image.transpose(turn)
        pixels = np.asarray(_flatten(upright, "L" if channels == 1 else "RGB"))
        return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], channels))


def make_frame(
    image: Image.Image, *, side: int, channels: Literal[1, 3], fit: Literal["crop", "squash"]
) -> NDArray[np.uint8]:
    """Turn an upright image into a square frame.

    `"crop"`: of H x W pixels, m = min(H, W), the m x m square whose corner is at row floor((H - m) / 2) and column
    floor((W - m) / 2) is cut out, then resized to `side` x `side`. `"squash"`: the whole image is resized to
    `side` x `side`. The resize is Pillow's BILINEAR: a triangle filter with half-pixel centres whose support grows with
    the ratio when shrinking (antialiased), rounded to whole grey levels. The filter sees the square only, never pixels
    beside it, so that a graph which crops first computes the same. An image of `side` x `side` keeps its exact pixels.

    Before the resize, transparent images are laid over white; 16-bit grey is divided by 257 and rounded; colour
    becomes grey by Pillow's "L" (ITU-R 601 weights); grey becomes colour by repetition.

    Returns:
        uint8 `[channels, side, side]`.

    Raises:
        BadImage: pixel values beyond what the format's range should be.
    """
    if fit == "crop":
        image = _middle_square(image)
    flat = _flatten(image, "L" if channels == 1 else "RGB")
    pixels = np.asarray(flat.resize((side, side), Image.Resampling.BILINEAR))
    return np.ascontiguousarray(pixels.reshape(side, side, channels).transpose(2, 0, 1))


def _middle_square(image: Image.Image) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    return image.crop((left, top, left + short, top + short))


def _flatten(image: Image.Image, mode: Literal["L", "RGB"]) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bits(image)
    elif image.has_transparency_data:
        image = _over_white(image)
    return image if image.mode == mode else image.convert(mode)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit and 32-bit integers from 0..65535, floats from 0..1, or from 0..255 where one exceeds 1."""
    values = np.asarray(image).astype(np.float32)
    top = 65535
    if image.mode == "F":
        top = 1 if values.max() <= 1 else 255
    if not (values.min() >= 0 and values.max() <= top):
        raise BadImage(f"pixel values outside 0..{max(top, 255)}")
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("empty file")
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = image.size
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise BadImage(_too_large(width * height))
    # A phone's MPO is a JPEG with a second, smaller picture behind it: the first is the photograph.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        unit = "pages" if image.format == "TIFF" else "frames"
        raise BadImage(f"animated ({getattr(image, 'n_frames', 2)} {unit})")
    return image


def _orientation(image: Image.Image) -> int:
    # PngImageFile.getexif would decode the image; the base class looks at what has been read so far.
    try:
        return int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises anything, and the pixels may well be sound
        return 1


def _is_grey(image: Image.Image) -> bool:
    if image.mode == "P":
        colours = np.array(image.getpalette("RGB") or [0, 0, 1]).reshape(-1, 3)
        return bool((colours == colours[:, :1]).all())
    return image.mode in ("1", "L", "LA", "La") or image.mode.startswith(("I", "F"))


def _too_large(pixels: int) -> str:
    limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
    return f"too large ({pixels / 1e6:.0f} megapixels, the limit is {limit:.0f})"


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn whatever a decoder raises into a `BadImage`."""
    try:
        with _quiet():
            yield
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise BadImage(_too_large(int(pixels[0])) if pixels else "too large") from None
    except MemoryError:
        raise BadImage("too large for this machine's memory") from None
    except Exception as error:  # damaged bytes can raise anything in a decoder
        raise BadImage(_reason(error)) from None


def _reason(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return "truncated"
    return f"cannot be decoded ({text[:80]})"


_quiet_lock = threading.Lock()
_quiet_filters: list[warnings.catch_warnings[None]] = []
_quiet_depth = 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Pillow's warnings in.

    The filters belong to the whole process, so the first thread to come in sets them and the last to leave restores
    them; `warnings.catch_warnings` in every thread would restore them in any order.
    """
    global _quiet_depth
    with _quiet_lock:
        if _quiet_depth == 0:
            _quiet_filters.append(warnings.catch_warnings())
            _quiet_filters[-1].__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _quiet_depth += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0:
                _quiet_filters.pop().__exit__(None, None, None)
