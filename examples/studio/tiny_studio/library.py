"""What clients keep here: uploaded and painted pictures, datasets, trained models; in files below one folder.

Everything belongs to an *account*, the text a client shows as its token, and is invisible to every other one. A
picture's file is found by its name alone, which cannot be guessed: whoever has the link may see it.

One index in JSON, replaced whole at each change, so that a crash leaves the one before or the one after. Every kind of
thing is bounded; painted pictures and trainings that failed make room for new ones, what clients uploaded or trained
does not.
"""

import json
import os
import re
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_UPLOADS = 2000
MAX_PAINTED = 500
MAX_DATASETS = 200
MAX_MODELS = 200
MAX_IMAGES_A_DATASET = 500

_NAME = re.compile(r"[0-9a-f]{32}(?:\.mid)?\.(?:png|jpg|webp)")


class Full(Exception):
    """As much is kept as may be; the message says of what."""


class Library:
    """The folder.

    Args:
        folder: made where it is not there.
        now: the time as the index says it, "2023-04-23 00:00:00".
    """

    def __init__(self, folder: Path, *, now: Callable[[], str]) -> None:
        self._files = folder / "files"
        self._files.mkdir(parents=True, exist_ok=True)
        self._path = folder / "index.json"
        self._now = now
        self._lock = threading.RLock()
        self._index: dict[str, Any] = {"uploads": [], "painted": [], "datasets": [], "models": [], "next_dataset": 1}
        if self._path.exists():
            self._index.update(json.loads(self._path.read_text()))

    # -- pictures

    def add_picture(self, data: bytes, ending: str, *, painted: bool = False) -> str:
        """Keep a picture file; return its name."""
        name = f"{secrets.token_hex(16)}.{ending}"
        kind, most = ("painted", MAX_PAINTED) if painted else ("uploads", MAX_UPLOADS)
        with self._lock:
            if not painted and len(self._index[kind]) >= most:
                raise Full(f"{most} uploaded pictures are kept at most")
            (self._files / name).write_bytes(data)
            self._index[kind].append(name)
            for old in self._index[kind][:-most]:
                for file in (old, beside(old)):
                    (self._files / file).unlink(missing_ok=True)
            self._index[kind] = self._index[kind][-most:]
            self._save()
        return name

    def add_middle(self, name: str, data: bytes) -> str:
        """Keep a smaller form of the picture *name*; return the name it has."""
        small = beside(name)
        (self._files / small).write_bytes(data)
        return small

    def picture(self, name: str) -> bytes | None:
        """Return the file of a picture; None when there is none of that name."""
        if _NAME.fullmatch(name) is None:
            return None
        try:
            return (self._files / name).read_bytes()
        except FileNotFoundError:
            return None

    # -- datasets

    def add_dataset(self, account: str, name: str, description: str, images: list[str]) -> int:
        """Keep a dataset of pictures (links as the client gave them); return its id."""
        with self._lock:
            if len(self._index["datasets"]) >= MAX_DATASETS:
                raise Full(f"{MAX_DATASETS} datasets are kept at most")
            number = int(self._index["next_dataset"])
            self._index["next_dataset"] = number + 1
            now = self._now()
            entry = {"id": number, "account": account, "name": name, "description": description, "images": images,
                     "create_time": now, "update_time": now}  # fmt: skip
            self._index["datasets"].append(entry)
            self._save()
        return number

    def datasets(self, account: str) -> list[dict[str, Any]]:
        """Return the datasets of *account*, oldest first."""
        with self._lock:
            return [dict(entry) for entry in self._index["datasets"] if entry["account"] == account]

    # -- models

    def add_model(self, account: str, entry: dict[str, Any]) -> None:
        """Keep a training as it stands, in place of the one with its `task_id`."""
        with self._lock:
            models = self._index["models"]
            kept = [one for one in models if one["task_id"] != entry["task_id"]]
            if len(kept) >= MAX_MODELS:
                failed = next((one for one in kept if one["state"] == "failed"), None)
                if failed is None:
                    raise Full(f"{MAX_MODELS} trained models are kept at most")
                kept.remove(failed)
            self._index["models"] = [*kept, {**entry, "account": account}]
            self._save()

    def model(self, account: str, task_id: str) -> dict[str, Any] | None:
        """Return the training *task_id* of *account*; None when it has none."""
        return next((entry for entry in self.models(account) if entry["task_id"] == task_id), None)

    def models(self, account: str | None = None) -> list[dict[str, Any]]:
        """Return the trainings of *account*, of all accounts when None, oldest first."""
        with self._lock:
            return [dict(one) for one in self._index["models"] if account is None or one["account"] == account]

    def _save(self) -> None:
        draft = self._path.with_suffix(".draft")
        with draft.open("w") as file:
            json.dump(self._index, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)


def beside(name: str) -> str:
    """Return the name of the smaller form of the picture *name*."""
    return f"{name.partition('.')[0]}.mid.jpg"
