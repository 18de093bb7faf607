"""Serve the workspace: ``python -m procedural_paint --port 8000``."""

import argparse
import json
import signal
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .generation import PICTURES, picture, read_generation, statuses
from .jobs import Jobs, QueueFull
from .requests import BadRequest, Job, read_job

MAX_BODY_BYTES = 32 * 1024 * 1024
PAINTERS = 2

_POSTS = ("/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/create", "/status", "/api/generate")
_GETS = ("/health", "/status", "/api/status")


class Server(ThreadingHTTPServer):
    """The server; painting is bounded by *painting*, however many connections there are."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int]) -> None:
        self.jobs = Jobs(PAINTERS)
        self.painting = threading.BoundedSemaphore(PAINTERS)
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
        """Answer `/health`, and what asks for jobs and their pictures."""
        url = urlsplit(self.path)
        if url.path == "/health":
            self._json(200, {"status": "ok"})
        elif url.path == "/status":
            self._status(parse_qs(url.query).get("task_id", [""])[0])
        elif url.path == "/api/status":
            found = statuses(self.server.jobs, url.query)
            self._json(200 if found else 404, found or {"detail": "there are no such jobs, or their time is over"})
        elif url.path.startswith(PICTURES):
            self._picture(url.path)
        else:
            self._nothing(url.path)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Paint, or take a job."""
        path = urlsplit(self.path).path
        body = self._body()
        if body is None:
            return
        try:
            if path == "/sdapi/v1/txt2img":
                self._paint(read_job(body, from_image=False))
            elif path == "/sdapi/v1/img2img":
                self._paint(read_job(body, from_image=True))
            elif path == "/create":
                self._json(200, {"task_id": self.server.jobs.submit(read_job(body, from_image=None))})
            elif path == "/api/generate":
                self._json(200, {"job_id": self.server.jobs.submit(read_generation(body))})
            elif path == "/status":
                document = json.loads(body or b"{}")
                self._status(str(document.get("task_id", "")) if isinstance(document, dict) else "")
            else:
                self._nothing(path)
        except BadRequest as error:
            self._json(422, {"detail": str(error)})
        except ValueError:
            self._json(422, {"detail": "the body is not JSON"})
        except QueueFull:
            self._json(429, {"detail": "too many jobs wait; come again later"}, {"Retry-After": "2"})

    def _paint(self, job: Job) -> None:
        with self.server.painting:
            files = job.run()
        if "image/png" in self.headers.get("Accept", ""):
            self._send(200, files[0], "image/png", {"X-Seed": str(job.seeds[0])})
        else:
            self._json(200, job.answer(files))

    def _status(self, task_id: str) -> None:
        state = self.server.jobs.status(task_id)
        if state is None:
            self._json(404, {"detail": "there is no such job, or its time is over"})
        else:
            self._json(200, state)

    def _picture(self, path: str) -> None:
        file = picture(self.server.jobs, path)
        if file is None:
            self._json(404, {"detail": "there is no such picture, or its time is over"})
        else:
            self._send(200, file, "image/png", {})

    def _nothing(self, path: str) -> None:
        allowed = "POST" if path in _POSTS else "GET" if path in _GETS else ""
        if allowed:
            self._json(405, {"detail": f"use {allowed}"}, {"Allow": allowed})
        else:
            self._json(404, {"detail": "nothing is served here"})

    def _body(self) -> bytes | None:
        """Return the request's body; None after it was refused."""
        length = self.headers.get("Content-Length", "0")
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return self._chunked()
        if not (length.isascii() and length.isdigit()) or int(length) > MAX_BODY_BYTES:
            return self._refuse_body()
        return self.rfile.read(int(length))

    def _chunked(self) -> bytes | None:
        body = bytearray()
        while True:
            line = self.rfile.readline(1024).partition(b";")[0].strip()
            try:
                size = int(line, 16)
            except ValueError:
                return self._refuse_body()
            if size < 0 or len(body) + size > MAX_BODY_BYTES:
                return self._refuse_body()
            if size == 0:
                while self.rfile.readline(8192).strip():
                    pass
                return bytes(body)
            body += self.rfile.read(size)
            self.rfile.readline(8)

    def _refuse_body(self) -> None:
        self.close_connection = True
        self._json(413, {"detail": f"a body of at most {MAX_BODY_BYTES} bytes is taken"})

    def _json(
        self, status: int, document: dict[str, Any] | list[dict[str, Any]], headers: dict[str, str] | None = None
    ) -> None:
        self._send(status, json.dumps(document).encode(), "application/json", headers or {})

    def _send(self, status: int, body: bytes, content_type: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
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
    parser = argparse.ArgumentParser(prog="procedural_paint", description="Pictures from words, as an NGPU workspace.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one; the port is printed")
    arguments = parser.parse_args()
    try:
        server = Server((arguments.host, arguments.port))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"procedural_paint: http://{arguments.host}:{server.server_port}", flush=True)
    stop.wait()
    server.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
