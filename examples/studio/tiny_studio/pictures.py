"""Picture files read and written: bounded before anything is unpacked."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from .styles import Plane

MAX_PIXELS = 4096 * 4096
MIDDLE_SIDE = 256
_FORMATS = ("PNG", "JPEG", "WEBP")


class NoPicture(ValueError):
    """Not a picture that is taken; the message says why."""


def size_of(data: bytes) -> tuple[int, int]:
    """Return width and height of the picture file *data*, after unpacking it once.

    Raises:
        NoPicture: another format, damaged, or too large.
    """
    return _opened(data).size


def pixels_of(data: bytes, size: tuple[int, int] | None = None, *, longest: int | None = None) -> Plane:
    """Return the picture file *data* as height by width by 3, 0 to 1.

    Args:
        size: width and height to bring it to.
        longest: the longer side is made no longer than this.

    Raises:
        NoPicture: see `size_of`.
    """
    image = _opened(data).convert("RGB")
    if size is not None:
        image = image.resize(size, Image.Resampling.LANCZOS)
    elif longest is not None and max(image.size) > longest:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def png(picture: npt.NDArray[np.uint8], about: str) -> bytes:
    """Return *picture* as a PNG file with *about* as its description."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("Description", about)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", pnginfo=info, compress_level=3)
    return buffer.getvalue()


def middle(data: bytes) -> bytes:
    """Return the picture file *data* as a JPEG no longer than `MIDDLE_SIDE`."""
    image = _opened(data).convert("RGB")
    image.thumbnail((MIDDLE_SIDE, MIDDLE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def content_type(data: bytes) -> str:
    """Return the media type of a picture file that was taken."""
    if data.startswith(b"\x89PNG"):
        return "image/png"
    return "image/webp" if data[8:12] == b"WEBP" else "image/jpeg"


def _opened(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:  # before it is unpacked
            raise NoPicture(f"a picture of {image.width} x {image.height} is too large")
        image.load()
    except NoPicture:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise NoPicture("not a PNG, JPEG or WebP picture") from None
    return image
