"""Run the workspace: ``python -m gpu_load --port 8000``.

    GET  /health   {"status": "ok", "gpu": "NVIDIA H100 80GB HBM3"}
    POST /load     {"plan": [["busy", 2.0], ["rest", 0.5], …]}; answers {"busy": [[begin, end], …]}, when the GPU worked

The GPU's own events time the work (CUDA events around matrix products); they are placed on the machine's monotonic
clock, which a process outside the container reads alike. Without PyTorch or a GPU it does not start.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MAX_BODY_BYTES = 1 << 16
MAX_PLAN_S = 100.0
_SIDE = 2048
_PIECE_S = 0.1  # each timed piece of a busy step


class Load:
    """Keeps one GPU busy by half-precision matrix products."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        shape = (_SIDE, _SIDE)
        self._left, self._right = (torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(2))
        self.name = str(torch.cuda.get_device_name(0))
        self._run(50)  # the first products load kernels
        self._each_s = self._run(200) / 200

    def _run(self, products: int) -> float:
        """Multiply so often, and return the seconds the GPU took."""
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(products):
            self._torch.mm(self._left, self._right)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def follow(self, plan: list[tuple[str, float]]) -> list[tuple[float, float]]:
        """Do each step in turn, and return when the GPU was busy."""
        busy: list[tuple[float, float]] = []
        for what, seconds in plan:
            until = time.monotonic() + seconds
            if what == "rest":
                time.sleep(seconds)
                continue
            while (left_s := until - time.monotonic()) > self._each_s / 2:
                took_s = self._run(max(1, round(min(left_s, _PIECE_S) / self._each_s)))
                now = time.monotonic()
                busy.append((now - took_s, now))
        return busy


def read_plan(body: bytes) -> list[tuple[str, float]]:
    """Return the steps a request asks for.

    Raises:
        ValueError: it is no plan, or longer than `MAX_PLAN_S`.
    """
    try:
        plan = [(str(what), float(seconds)) for what, seconds in json.loads(body)["plan"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError('a plan is {"plan": [["busy", seconds], ["rest", seconds], …]}') from error
    if any(what not in {"busy", "rest"} or not seconds >= 0 for what, seconds in plan):
        raise ValueError("a step is busy or rest, for a number of seconds")
    if not sum(seconds for _, seconds in plan) <= MAX_PLAN_S:
        raise ValueError(f"a plan takes {MAX_PLAN_S:.0f} s at most")
    return plan


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    load: Load
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(200, {"status": "ok", "gpu": self.load.name})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.path != "/load" or not 0 < length <= MAX_BODY_BYTES:
            self.close_connection = True
            self._answer(404 if self.path != "/load" else 413, {"error": "POST a plan to /load"})
            return
        try:
            plan = read_plan(self.rfile.read(length))
        except ValueError as error:
            self._answer(400, {"error": str(error)})
            return
        self._answer(200, {"busy": self.load.follow(plan), "gpu": self.load.name})

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request: the node does."""


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_load", description="Keeps a GPU busy on request.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("error: PyTorch sees no GPU", file=sys.stderr)
        return 1
    Handler.load = Load(torch)
    server = ThreadingHTTPServer((arguments.host, arguments.port), Handler)
    print(f"{Handler.load.name}, listening on http://{arguments.host}:{arguments.port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
