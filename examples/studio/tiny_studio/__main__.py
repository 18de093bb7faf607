"""Serve the workspace: ``python -m tiny_studio --port 8000 --data /data``."""

import argparse
import json
import signal
import socketserver
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from .library import MAX_IMAGES_A_DATASET, Full, Library
from .pictures import NoPicture, content_type, size_of
from .requests import (
    FILES,
    BadRequest,
    account_of,
    generation_form,
    number,
    read_object,
    read_paint,
    read_picture,
    read_train,
    read_uploads,
    text,
    train_form,
)
from .styles import COLOURS, Style
from .work import Studio

MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_FILES_AT_ONCE = 100
PER_PAGE = 20

_EVENING = ("#171a33", "#403d6b", "#8c5c78", "#d68773", "#f5c48c", "#fcf0d1")

BASE_STYLE = Style(
    palette=np.array([[int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)] for colour in _EVENING], np.float32),
    shares=np.full(COLOURS, 1 / COLOURS, np.float32),
    bands=np.array([0.20, 0.12, 0.07, 0.04, 0.02, 0.01], np.float32),
    angle=1.57,
    coherence=0.35,
)
"""What is painted in where no trained model is named: an evening sky."""


class Server(ThreadingHTTPServer):
    """The server."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], studio: Studio) -> None:
        self.studio = studio
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        # the base class asks DNS for this machine's name, which may take half a minute where there is none
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, unless it is only that a client left."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server: Server
    timeout = 60.0

    def do_GET(self) -> None:
        """Answer the forms, picture files and `/health`."""
        url = urlsplit(self.path)
        if url.path.startswith(FILES):
            self._file(url.path.removeprefix(FILES))
        elif url.path == "/api/v1b/get_generation_form":
            account = parse_qs(url.query).get("token", [""])[0]
            self._info(generation_form(self.server.studio.trained(account)))
        elif url.path == "/api/v1b/get_train_form":
            self._info(train_form())
        elif url.path == "/health":
            self._json(200, {"status": "ok"})
        else:
            self._nothing(url.path)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Take uploads, datasets, paintings and trainings."""
        path = urlsplit(self.path).path
        body = self._body()
        if body is None:
            return
        try:
            if path == "/api/v1b/upload_imgs":
                self._upload(body)
            elif (act := self._acts().get(path)) is not None:
                act(read_object(body))
            else:
                self._nothing(path)
        except (BadRequest, NoPicture) as error:
            self._error(400, str(error))
        except Full as error:
            self._error(429, str(error), {"Retry-After": "5"})

    def _acts(self) -> dict[str, Callable[[dict[str, Any]], None]]:
        return {
            "/api/v1b/task_submit": self._task_submit,
            "/api/v1b/task_result": self._task_result,
            "/api/v1b/dataset": self._dataset,
            "/api/v1b/dataset_all": self._dataset_all,
            "/api/v1b/train_submit": self._train_submit,
            "/api/v1b/train_progress": self._train_progress,
        }

    # -- painting

    def _task_submit(self, document: dict[str, Any]) -> None:
        self._json(200, {"task_id": self.server.studio.submit(read_paint(document))})

    def _task_result(self, document: dict[str, Any]) -> None:
        result = self.server.studio.result(account_of(document), text(document, "task_id"))
        if result is None:
            self._error(404, "task_id: there is no such task, or its time is over")
        else:
            self._json(200, result)

    # -- datasets and training

    def _upload(self, body: bytes) -> None:
        _, files = read_uploads(self.headers.get("Content-Type", ""), body)
        if len(files) > MAX_FILES_AT_ONCE:
            raise BadRequest(f"init_img: at most {MAX_FILES_AT_ONCE} pictures at once")
        for data in files:
            size_of(data)
        library = self.server.studio.library
        endings = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}
        names = [library.add_picture(data, endings[content_type(data)]) for data in files]
        self._info([FILES + name for name in names])

    def _dataset(self, document: dict[str, Any]) -> None:
        name, images = text(document, "name").strip(), document.get("images")
        if not name or len(name) > 128:
            raise BadRequest("name: 1 to 128 characters")
        if not isinstance(images, list) or not 1 <= len(images) <= MAX_IMAGES_A_DATASET:
            raise BadRequest(f"images: a list of 1 to {MAX_IMAGES_A_DATASET} links, as upload_imgs returned them")
        library = self.server.studio.library
        for link in images:
            picture = read_picture(link, "images") if isinstance(link, str) else None
            if picture is None or library.picture(picture.name) is None:
                raise BadRequest("images: one is no link to a picture kept here; upload it with upload_imgs")
        links = [FILES + urlsplit(link).path.rpartition(FILES)[2] for link in images]
        number_ = library.add_dataset(account_of(document), name, text(document, "description"), links)
        self._info({"dataset_id": number_})

    def _dataset_all(self, document: dict[str, Any]) -> None:
        page = number(document, "page", 1, 1, 1_000_000)
        per_page = number(document, "per_page", PER_PAGE, 1, 100)
        own = self.server.studio.library.datasets(account_of(document))
        pages = max(1, -(-len(own) // per_page))
        items = [
            {
                **{name: entry[name] for name in ("id", "name", "description", "create_time", "update_time", "images")},
                "demo_picture": entry["images"][0],
                "images_num": len(entry["images"]),
            }
            for entry in own[(page - 1) * per_page : page * per_page]
        ]
        more = {"page": page, "per_page": per_page, "has_next": page < pages, "has_prev": page > 1, "totalPages": pages}
        self._json(200, {"items": items, **more})

    def _train_submit(self, document: dict[str, Any]) -> None:
        self._info({"task_id": self.server.studio.train(read_train(document))})

    def _train_progress(self, document: dict[str, Any]) -> None:
        state = self.server.studio.progress(account_of(document), text(document, "task_id"))
        if state is None:
            self._error(404, "task_id: there is no such training")
        else:
            self._json(200, state)

    # -- answers

    def _file(self, name: str) -> None:
        data = self.server.studio.library.picture(name)
        if data is None:
            self._error(404, "there is no such picture here (any more)")
        else:
            self._send(200, data, content_type(data), {"Cache-Control": "private, max-age=3600"})

    def _info(self, info: Any) -> None:
        self._json(200, {"code": 0, "info": info, "msg": ""})

    def _error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self._json(status, {"code": status, "info": {}, "msg": message}, headers)

    def _nothing(self, path: str) -> None:
        self._error(404, "nothing is served here")

    def _body(self) -> bytes | None:
        """Return the request's body; None after it was refused."""
        length = self.headers.get("Content-Length", "0")
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return self._chunked()
        if not (length.isascii() and length.isdigit()) or int(length) > MAX_BODY_BYTES:
            self._refuse_body()
            return None
        return self.rfile.read(int(length))

    def _chunked(self) -> bytes | None:
        body = bytearray()
        while True:
            line = self.rfile.readline(1024).partition(b";")[0].strip()
            try:
                size = int(line, 16)
            except ValueError:
                size = -1
            if size < 0 or len(body) + size > MAX_BODY_BYTES:
                self._refuse_body()
                return None
            if size == 0:
                while self.rfile.readline(8192).strip():
                    pass
                return bytes(body)
            body += self.rfile.read(size)
            self.rfile.readline(8)

    def _refuse_body(self) -> None:
        self.close_connection = True
        self._error(413, f"a body of at most {MAX_BODY_BYTES} bytes is taken")

    def _json(self, status: int, document: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        body = json.dumps(document, ensure_ascii=False).encode()
        self._send(status, body, "application/json; charset=utf-8", headers or {})

    def _send(self, status: int, body: bytes, media_type: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: prompts are the client's."""


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(
        prog="tiny_studio", description="Styles learned from pictures, as an NGPU workspace."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one; the port is printed")
    parser.add_argument("--data", type=Path, default=Path("/data"), help="folder for pictures, datasets and models")
    arguments = parser.parse_args()

    def now() -> str:
        return f"{datetime.now():%Y-%m-%d %H:%M:%S}"

    try:
        server = Server((arguments.host, arguments.port), Studio(Library(arguments.data, now=now), BASE_STYLE, now=now))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stop = threading.Event()
    for number_ in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number_, lambda *_: stop.set())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"tiny_studio: http://{arguments.host}:{server.server_port}", flush=True)
    stop.wait()
    server.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
