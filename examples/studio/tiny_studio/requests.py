"""What clients ask for, read from JSON and forms: bounded, defaults as the interface's document has them.

No value is refused for missing from a form: the document's own defaults (960x960) are not among its choices. An unknown
model paints in the studio's own style, a control that is not enabled is left out, and the answer says so.
"""

import base64
import binascii
import email.message
import email.parser
import email.policy
import json
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from .painting import Wish

MAX_TEXT = 4000
MAX_PICTURES = 8
MIN_SIDE, MAX_SIDE = 64, 2048
MAX_SEED = 2**63 - 1
FILES = "/api/v1b/files/"

BASE_MODEL = "Artist_V0.1.3"
BASE_MODELS = ("商汤自研作画模型 Beta", "水彩风")
ANY_BASE = "自动选择"
MAIN_BODIES = ("Style", "Human", "Architecture", "Plants", "Animals")
_CONTROLS = ("", "canny")
_SIZE = re.compile(r"([0-9]{1,5})[xX*]([0-9]{1,5})")


class BadRequest(ValueError):
    """A field that cannot be used; the message names it."""


@dataclass(frozen=True)
class Picture:
    """A picture a request names: one that is kept here, or one that came along."""

    name: str = ""
    data: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class PaintRequest:
    """A `task_submit`."""

    account: str
    model: str
    wish: Wish
    pictures: int
    source: Picture | None
    contours: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class TrainRequest:
    """A `train_submit`."""

    account: str
    name: str
    description: str
    base_model: str
    trigger_word: str
    main_body: str
    nsfw: bool
    datasets: tuple[int, ...]


def read_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object *body* is.

    Raises:
        BadRequest: it is none.
    """
    try:
        document = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON") from None
    if not isinstance(document, dict):
        raise BadRequest("the body is not a JSON object")
    return document


def account_of(document: dict[str, Any]) -> str:
    """Return whose request it is: its token, which a gateway may have replaced by a public name."""
    token = document.get("token", "")
    if not isinstance(token, str | int) or len(str(token)) > 256:
        raise BadRequest("token: text of at most 256 characters")
    return str(token)


def read_paint(document: dict[str, Any]) -> PaintRequest:
    """Return what a `task_submit` asks for.

    Raises:
        BadRequest: naming the field.
    """
    notes = []
    width, height = _size(document)
    control = text(document, "controlnet_model")
    source = read_picture(text(document, "init_img", most=32 * 1024 * 1024), "init_img")
    if control and source is None:
        raise BadRequest("init_img: a controlnet_model needs a picture")
    if control not in _CONTROLS:
        notes.append(f"controlnet_model {control} is not enabled here; the picture was made without it")
    seed = number(document, "select_seed", -1, -1, MAX_SEED)
    return PaintRequest(
        account=account_of(document),
        model=text(document, "model_name") or BASE_MODEL,
        wish=Wish(
            prompt=text(document, "prompt"),
            negative_prompt=text(document, "neg_prompt"),
            seed=seed,
            width=width,
            height=height,
            scale=number(document, "scale", 7, 1, 20),
        ),
        pictures=number(document, "n_images", 2, 1, MAX_PICTURES),
        source=source,
        contours=control == "canny",
        notes=tuple(notes),
    )


def read_train(document: dict[str, Any]) -> TrainRequest:
    """Return what a `train_submit` asks for.

    Raises:
        BadRequest: naming the field.
    """
    name = text(document, "name").strip()
    if not name or len(name) > 128:
        raise BadRequest("name: 1 to 128 characters for the model")
    chosen = document.get("dataset")
    ids = [_whole(one) for one in (chosen if isinstance(chosen, list) else [chosen])]
    if not 1 <= len(ids) <= 50 or None in ids:
        raise BadRequest("dataset: a list of 1 to 50 dataset ids, as /api/v1b/dataset returned them")
    nsfw = document.get("nsfw")
    return TrainRequest(
        account=account_of(document),
        name=name,
        description=text(document, "description"),
        base_model=text(document, "base_model") or ANY_BASE,
        trigger_word=text(document, "trigger_word"),
        main_body=text(document, "main_body") or "Style",
        # 1 is true, as in the document's example and not as in its table
        nsfw=nsfw if isinstance(nsfw, bool) else number(document, "nsfw", 0, 0, 1) == 1,
        datasets=tuple(one for one in ids if one is not None),
    )


def read_picture(value: str, name: str) -> Picture | None:
    """Return the picture a field names: a link of this studio, or a data: URL; None for none.

    Raises:
        BadRequest: a link to somewhere else, which this workspace does not fetch.
    """
    if not value:
        return None
    if value.startswith("data:"):
        try:
            return Picture(data=base64.b64decode(value.partition(",")[2], validate=True))
        except binascii.Error:
            raise BadRequest(f"{name}: the data: URL does not hold base64") from None
    _, found, file = urlsplit(value).path.rpartition(FILES)
    if not found or not file:
        raise BadRequest(f"{name}: upload the picture with /api/v1b/upload_imgs first and give the link it returns")
    return Picture(name=file)


def read_uploads(content_type: str, body: bytes) -> tuple[str, list[bytes]]:
    """Return the account and the picture files of an `upload_imgs` form, whose token is one of its parts.

    Raises:
        BadRequest: not such a form.
    """
    if not content_type.lower().startswith("multipart/form-data"):
        raise BadRequest("send multipart/form-data with the parts token and init_img")
    parser = email.parser.BytesParser(policy=email.policy.HTTP)
    form = parser.parsebytes(b"Content-Type: " + content_type.encode("latin-1") + b"\r\n\r\n" + body)
    if not form.is_multipart():
        raise BadRequest("the form has no parts, or its boundary is wrong")
    account, files = "", []
    for part in form.iter_parts():
        name = part.get_param("name", header="content-disposition")
        data = part.get_payload(decode=True)
        if not isinstance(data, bytes):
            raise BadRequest("the form holds a part within a part")
        if name == "token":
            account = account_of({"token": data.decode("utf-8", "replace").strip()})
        elif name == "init_img":
            files.append(data)
    if not files:
        raise BadRequest("init_img: give at least one picture, each as a part of this name")
    return account, files


def text(document: dict[str, Any], name: str, *, most: int = MAX_TEXT) -> str:
    """Return a field that is text; empty where it is missing or null."""
    value = document.get(name)
    value = "" if value is None else value
    if not isinstance(value, str) or len(value) > most:
        raise BadRequest(f"{name}: text of at most {most} characters")
    return value.encode("utf-8", "replace").decode()


def number(document: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    """Return a field that is a whole number, also where it came as text."""
    value = document.get(name)
    if value is None or value == "":
        return default
    whole = _whole(value)
    if whole is None or not low <= whole <= high:
        raise BadRequest(f"{name}: a whole number from {low} to {high}")
    return whole


def _whole(value: Any) -> int | None:
    """Return a whole number however it was written, None where it is none."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,20}", value.strip()):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _size(document: dict[str, Any]) -> tuple[int, int]:
    # the request's table calls it output_size, the form resolution
    value = text(document, "output_size") or text(document, "resolution") or "960x960"
    matched = _SIZE.fullmatch(value.strip())
    sides = (int(matched[1]), int(matched[2])) if matched else (0, 0)
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in sides):
        raise BadRequest(f"output_size: width x height, each {MIN_SIDE} to {MAX_SIDE}, such as 960x960")
    return sides


def generation_form(models: list[str]) -> list[dict[str, Any]]:
    """Return the fields of `get_generation_form`, with *models* beside the studio's own."""
    sides = {"1:1": ((512, 512), (640, 640), (768, 768), (1024, 1024)),
             "2:3": ((512, 768), (640, 960), (768, 1152), (1024, 1536)),
             "3:2": ((768, 512), (960, 640), (1152, 768), (1536, 1024))}  # fmt: skip
    sizes = {ratio: [f"{width}x{height}" for width, height in ones] for ratio, ones in sides.items()}

    def entry(name: str, kind: str, default: Any, description: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "type": kind, "default": default, "description": description, **more}

    return [
        entry("model_name", "list", BASE_MODEL, "model name", choices=[BASE_MODEL, *models]),
        entry("prompt", "string", "", "prompt"),
        entry("neg_prompt", "string", "", "negative prompt"),
        entry("n_images", "int", 2, "number of images", min=1, max=MAX_PICTURES),
        entry("scale", "int", 7, "Guidance Scale", min=1, max=20),
        entry("select_seed", "int", -1, "seed", min=0, max=9999999),
        entry("resolution", "dict", "512x512", "resolution", choices=sizes),
        entry("init_img", "str", "", "init image url"),
        entry("controlnet_model", "str", "", "controlnet model", choices=list(_CONTROLS)),
    ]


def train_form() -> dict[str, Any]:
    """Return what `get_train_form` says."""
    return {"base_model": list(BASE_MODELS), "main_body": list(MAIN_BODIES)}
