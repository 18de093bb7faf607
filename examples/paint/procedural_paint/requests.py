"""What a client asks for, read from JSON: bounded before anything is allocated, unknown fields ignored.

The fields are those of the `sdapi/v1` calls of Stable Diffusion web UIs, as far as they mean something here.
"""

import base64
import binascii
import io
import json
import secrets
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from .synthesis import Progress, Wish, paint, repaint

MAX_SIDE = 2048
MIN_SIDE = 16
MAX_PICTURES = 8
MAX_PROMPT = 4000
MAX_SEED = 2**63 - 1
MAX_SOURCE_PIXELS = 4096 * 4096


class BadRequest(Exception):
    """The request cannot be painted; the message says which field is wrong."""


@dataclass(frozen=True)
class Job:
    """Pictures to paint: one for each seed, from nothing or from a source.

    Attributes:
        source: what image-to-image begins with; None for text-to-image.
        strength: how far from it, 0 to 1.
    """

    wish: Wish
    seeds: tuple[int, ...]
    source: Image.Image | None = None
    strength: float = 0.75

    def run(self, progress: Progress = lambda share: None) -> list[bytes]:
        """Return the PNG files. *progress* is told the share of all pictures done."""
        source = None
        if self.source is not None:
            fitted = self.source.convert("RGB").resize((self.wish.width, self.wish.height), Image.Resampling.LANCZOS)
            source = np.asarray(fitted)
        files = []
        for index, seed in enumerate(self.seeds):
            wish = replace(self.wish, seed=seed)

            def share(part: float, index: int = index) -> None:
                progress((index + part) / len(self.seeds))

            picture = paint(wish, share) if source is None else repaint(source, wish, self.strength, share)
            files.append(png(picture, wish))
        return files

    def answer(self, files: list[bytes]) -> dict[str, Any]:
        """Return the answer in JSON: pictures in base64, the parameters, and the seeds in a JSON text of its own."""
        wish = self.wish
        parameters: dict[str, Any] = {
            "prompt": wish.prompt,
            "negative_prompt": wish.negative_prompt,
            "seed": self.seeds[0],
            "width": wish.width,
            "height": wish.height,
            "steps": wish.steps,
        }
        if self.source is not None:
            parameters["denoising_strength"] = self.strength
        info = {**parameters, "all_seeds": list(self.seeds)}
        images = [base64.b64encode(file).decode() for file in files]
        return {"images": images, "parameters": parameters, "info": json.dumps(info)}


def read_job(body: bytes, *, from_image: bool | None) -> Job:
    """Return the job a request's body describes.

    Args:
        from_image: whether it must name a source image; None: where it does, it is image-to-image.

    Raises:
        BadRequest: naming the field.
    """
    try:
        document = json.loads(body or b"{}")
    except ValueError:
        raise BadRequest("the body is not JSON") from None
    if not isinstance(document, dict):
        raise BadRequest("the body is not a JSON object")
    wish = Wish(
        prompt=_text(document, "prompt"),
        negative_prompt=_text(document, "negative_prompt"),
        width=_number(document, "width", 512, MIN_SIDE, MAX_SIDE),
        height=_number(document, "height", 512, MIN_SIDE, MAX_SIDE),
        steps=_number(document, "steps", 20, 1, 150),
    )
    pictures = _number(document, "batch_size", 1, 1, MAX_PICTURES) * _number(document, "n_iter", 1, 1, MAX_PICTURES)
    if pictures > MAX_PICTURES:
        raise BadRequest(f"batch_size times n_iter: at most {MAX_PICTURES} pictures")
    seed = _number(document, "seed", -1, -1, MAX_SEED)
    first = secrets.randbelow(2**32) if seed == -1 else seed
    job = Job(wish, tuple((first + index) % (MAX_SEED + 1) for index in range(pictures)))
    sources = document.get("init_images")
    if from_image is False or (from_image is None and not sources):
        return job
    if not isinstance(sources, list) or not sources or not isinstance(sources[0], str):
        raise BadRequest("init_images: give a list with one image in base64")
    source = _image(sources[0])
    if "width" not in document and "height" not in document:
        side = [min(max(length, MIN_SIDE), MAX_SIDE) for length in source.size]
        wish = replace(wish, width=side[0], height=side[1])
    return Job(wish, job.seeds, source, _share(document, "denoising_strength", 0.75))


def png(picture: npt.NDArray[np.uint8], wish: Wish) -> bytes:
    """Return *picture* as a PNG file that says what made it."""
    about = PngImagePlugin.PngInfo()
    about.add_itxt("parameters", f"{wish.prompt}\nSteps: {wish.steps}, Seed: {wish.seed}")
    buffer = io.BytesIO()
    Image.fromarray(picture, "RGB").save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def _image(text: str) -> Image.Image:
    head, comma, rest = text.partition(",")
    encoded = rest if comma and head.startswith("data:") else text
    try:
        image = Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height > MAX_SOURCE_PIXELS:  # before it is unpacked
            raise BadRequest(f"init_images: an image of {image.width} x {image.height} is too large")
        image.load()
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise BadRequest("init_images: not a PNG, JPEG or WebP image in base64") from None
    return image


def _text(document: dict[str, Any], name: str) -> str:
    value = document.get(name, "")
    if not isinstance(value, str) or len(value) > MAX_PROMPT:
        raise BadRequest(f"{name}: text of at most {MAX_PROMPT} characters")
    return value.encode("utf-8", "replace").decode()


def _number(document: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = document.get(name, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadRequest(f"{name}: a whole number from {low} to {high}")
    return value


def _share(document: dict[str, Any], name: str, default: float) -> float:
    value = document.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise BadRequest(f"{name}: a number from 0 to 1")
    return float(value)
