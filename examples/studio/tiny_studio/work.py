"""Painting and training, done beside the requests: bounded queues, a painter and a trainer, states to poll.

A painting is `pending` until it is `done` or `failed`, and forgotten after a while. A training is kept in the library
from the moment it is taken: one that a restart interrupted begins again.
"""

import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from .library import Full, Library
from .painting import paint
from .pictures import NoPicture, middle, pixels_of, png
from .requests import BASE_MODEL, FILES, BadRequest, PaintRequest, Picture, TrainRequest, read_picture
from .styles import Style, learn

MAX_WAITING = 64
MAX_KEPT = 500
TRAINING_SIDE = 512


@dataclass
class _Painting:
    account: str
    state: str = "pending"
    images: list[tuple[str, str]] = field(default_factory=list)
    error: str = ""
    notes: tuple[str, ...] = ()


class Studio:
    """The studio's work on one library.

    Args:
        base_style: what is painted in where no trained model is named.
        now: see `Library`.
    """

    def __init__(self, library: Library, base_style: Style, *, now: Callable[[], str]) -> None:
        self.library = library
        self._base_style = base_style
        self._now = now
        self._lock = threading.Lock()
        self._paintings: dict[str, _Painting] = {}
        self._to_paint: queue.Queue[tuple[str, PaintRequest]] = queue.Queue(MAX_WAITING)
        # one more than may wait was begun
        again = [entry for entry in library.models() if entry["state"] not in ("done", "failed")]
        self._to_train: queue.Queue[tuple[str, TrainRequest]] = queue.Queue(max(MAX_WAITING, len(again)))
        for entry in again:
            self._to_train.put_nowait((entry["task_id"], _request_of(entry)))
        threading.Thread(target=self._keep, args=(self._to_paint, self._paint), daemon=True).start()
        threading.Thread(target=self._keep, args=(self._to_train, self._train), daemon=True).start()

    # -- what clients ask

    def submit(self, request: PaintRequest) -> str:
        """Return the task id of a painting.

        Raises:
            BadRequest: it names a picture that is not kept here.
            Full: too many wait.
        """
        if request.source is not None:
            self._picture(request.source, "init_img")
        task_id = secrets.token_hex(16)
        with self._lock:
            done = [key for key, one in self._paintings.items() if one.state != "pending"]
            for key in done[: max(0, len(self._paintings) - MAX_KEPT + 1)]:
                del self._paintings[key]
            self._paintings[task_id] = _Painting(request.account, notes=request.notes)
        self._put(self._to_paint, (task_id, request), lambda: self._paintings.pop(task_id))
        return task_id

    def result(self, account: str, task_id: str) -> dict[str, Any] | None:
        """Return how a painting stands, as `task_result` says it; None when *account* has none of that id."""
        with self._lock:
            found = self._paintings.get(task_id)
            if found is None or found.account != account:
                return None
            images = [
                {
                    "large": FILES + large,
                    "middle": FILES + small,
                    "save_index": index,
                    "share": False,
                    "shareable": True,
                }
                for index, (large, small) in enumerate(found.images)
            ]
            return {"state": found.state, "images": images, "error_msg": found.error, "notes": list(found.notes)}

    def train(self, request: TrainRequest) -> str:
        """Return the task id of a training.

        Raises:
            BadRequest: a dataset that the account does not have, or a name it has used.
            Full: too many wait, or too many are kept.
        """
        own = {entry["id"]: entry for entry in self.library.datasets(request.account)}
        if missing := [number for number in request.datasets if number not in own]:
            raise BadRequest(f"dataset: there is no dataset {missing[0]}")
        task_id = secrets.token_hex(16)
        with self._lock:
            if self._named(request.account, request.name) is not None:
                raise BadRequest(f"name: there is a model {request.name!r} already")
            self.library.add_model(request.account, _entry_of(task_id, request, self._now()))
        self._put(self._to_train, (task_id, request), lambda: self._note(task_id, request.account, state="failed"))
        return task_id

    def progress(self, account: str, task_id: str) -> dict[str, Any] | None:
        """Return how a training stands, as `train_progress` says it; None when *account* has none of that id."""
        entry = self.library.model(account, task_id)
        if entry is None:
            return None
        shown = ("create_time", "description", "main_body", "model_name", "state", "training_progress", "trigger_word")
        answer = {name: entry[name] for name in shown}
        return {**answer, "error_msg": entry["error"]} if entry["error"] else answer

    def trained(self, account: str) -> list[str]:
        """Return the names of the models *account* may paint with."""
        return [entry["name"] for entry in self.library.models(account) if entry["state"] == "done"]

    # -- the work

    def _put(self, work: "queue.Queue[Any]", item: Any, undo: Callable[[], object]) -> None:
        try:
            work.put_nowait(item)
        except queue.Full:
            undo()
            raise Full("too many tasks wait; come again later") from None

    def _keep(self, work: "queue.Queue[Any]", act: Callable[[str, Any], None]) -> None:
        while True:
            task_id, request = work.get()
            try:
                act(task_id, request)
            except Exception as error:  # one task that cannot be done must not end the worker
                print(f"{act.__name__} {task_id}: {error!r}", file=sys.stderr, flush=True)

    def _paint(self, task_id: str, request: PaintRequest) -> None:
        try:
            style, notes = self._style(request)
            wish = request.wish
            seed = wish.seed if wish.seed >= 0 else secrets.randbelow(10_000_000)
            size = (wish.width, wish.height)
            source = None
            if request.source is not None:
                source = pixels_of(self._picture(request.source, "init_img"), size)
            images = []
            for index in range(request.pictures):
                one = replace(wish, seed=seed + index)
                data = png(
                    paint(one, style, source=source, contours=request.contours), f"{request.model}, seed {one.seed}"
                )
                name = self.library.add_picture(data, "png", painted=True)
                images.append((name, self.library.add_middle(name, middle(data))))
            with self._lock:
                self._paintings[task_id].images = images
                self._paintings[task_id].notes += notes
                self._paintings[task_id].state = "done"
        except Exception as error:
            with self._lock:
                self._paintings[task_id].error = str(error) or type(error).__name__
                self._paintings[task_id].state = "failed"
            if not isinstance(error, BadRequest | NoPicture):
                raise

    def _style(self, request: PaintRequest) -> tuple[Style, tuple[str, ...]]:
        """Return the style of the model a request names, and what is to be noted: where no model of that name is
        trained, it is the studio's own."""
        entry = self._named(request.account, request.model)
        if entry is not None and entry["state"] == "done":
            return Style.of(entry["style"]), ()
        if request.model == BASE_MODEL:
            return self._base_style, ()
        why = "is not trained yet" if entry is not None else "is none of yours"
        return self._base_style, (f"model_name {request.model} {why}; the picture is in the studio's own style",)

    def _named(self, account: str, name: str) -> dict[str, Any] | None:
        for entry in self.library.models(account):
            if name in (entry["name"], entry["model_name"]) and entry["state"] != "failed":
                return entry
        return None

    def _train(self, task_id: str, request: TrainRequest) -> None:
        said_at_s = 0.0

        def progress(share: float) -> None:
            nonlocal said_at_s
            if share >= 1 or time.monotonic() - said_at_s >= 0.2:
                said_at_s = time.monotonic()
                self._note(task_id, request.account, state="training", training_progress=min(0.99, round(share, 3)))

        try:
            own = {entry["id"]: entry for entry in self.library.datasets(request.account)}
            links = [link for number in request.datasets for link in own[number]["images"]]
            loads = [self._loader(link) for link in links]
            style = learn(loads, progress=progress)
            done = {"state": "done", "training_progress": 1.0, "style": style.document()}
            self._note(task_id, request.account, **done)
        except Exception as error:
            self._note(task_id, request.account, state="failed", error=str(error) or type(error).__name__)
            if not isinstance(error, BadRequest | NoPicture):
                raise

    def _loader(self, link: str) -> Callable[[], Any]:
        picture = read_picture(link, "images")
        if picture is None:
            raise BadRequest("images: a link is empty")
        self._picture(picture, "images")
        return lambda: pixels_of(self._picture(picture, "images"), longest=TRAINING_SIDE)

    def _picture(self, picture: Picture, name: str) -> bytes:
        data = picture.data or self.library.picture(picture.name)
        if not data:
            raise BadRequest(f"{name}: there is no such picture here (any more)")
        return data

    def _note(self, task_id: str, account: str, **news: Any) -> None:
        entry = self.library.model(account, task_id)
        if entry is not None:
            self.library.add_model(account, {**entry, **news})


def _entry_of(task_id: str, request: TrainRequest, now: str) -> dict[str, Any]:
    return {
        "task_id": task_id,
        "name": request.name,
        "model_name": "_".join(request.name.split()),
        "description": request.description,
        "base_model": request.base_model,
        "trigger_word": request.trigger_word,
        "main_body": request.main_body,
        "nsfw": request.nsfw,
        "datasets": list(request.datasets),
        "create_time": now,
        "state": "pending",
        "training_progress": 0.0,
        "style": None,
        "error": "",
    }


def _request_of(entry: dict[str, Any]) -> TrainRequest:
    names = ("account", "name", "description", "base_model", "trigger_word", "main_body", "nsfw")
    return TrainRequest(**{name: entry[name] for name in names}, datasets=tuple(entry["datasets"]))
