"""The systems measured side by side. Each is started on loopback in front of the same workspace and offers one URL.

- ``direct``: the workspace itself, the floor.
- ``nginx``: a reverse proxy with keep-alive to the workspace, one worker; when it is installed.
- ``litellm``: LiteLLM's proxy, two workers, passing OpenAI calls through; in an environment of its own.
- ``ngpu``: a client's request to the bootstrap peer's ``/proxy/``, an order to a node, the workspace, a receipt back.

All get the same request. LiteLLM runs as fast as it can be set: no keys, no database, no callbacks.
"""

import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

from examples.demo.processes import Process, StartError
from tests.bench.streams import Endpoint

T = TypeVar("T")
REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
LITELLM_VERSION = "1.106.2"
LITELLM_WORKERS = 2
CHAT_PATH = "/v1/chat/completions"


@dataclass(slots=True)
class System:
    """One thing to measure.

    Attributes:
        name: as in the table.
        endpoint: where its paths begin and which headers it wants.
        processes: what runs for it, beyond the workspace.
        streams: whether it passes arbitrary paths, so that streams and large bodies can be measured.
    """

    name: str
    endpoint: Endpoint
    processes: list[Process] = field(default_factory=list)
    streams: bool = True


class Missing(Exception):
    """A system that cannot run on this machine; the message says why, and the others are measured without it."""


class Systems(AbstractContextManager["Systems"]):
    """Starts systems in *folder* and stops what it started, the last first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def enter(self, part: AbstractContextManager[T]) -> T:
        """Enter *part*; it is left with everything else that was started here."""
        return self._stack.enter_context(part)

    def workspace(self) -> System:
        """Start the workspace."""
        port = free_port()
        # -u: nothing of it is buffered. The model is not what is measured, so it learns from little.
        process = self._start(
            "workspace",
            [sys.executable, "-m", "ngram_chat", "serve", "--port", str(port), "--token-delay-ms", "0"],
            cwd=REPOSITORY_ROOT / "examples" / "chat",
        )
        wait_for_http(process, f"http://127.0.0.1:{port}/health", 10)
        return System("direct", Endpoint(f"http://127.0.0.1:{port}", {}), [process])

    def nginx(self, upstream: str) -> System:
        """Start nginx in front of *upstream*.

        Raises:
            Missing: it is not installed.
        """
        program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if program is None:
            raise Missing("nginx is not installed")
        port = free_port()
        folder = self.folder / "nginx"
        folder.mkdir()
        config = folder / "nginx.conf"
        config.write_text(_NGINX_CONFIG.format(folder=folder, port=port, upstream=upstream.removeprefix("http://")))
        process = self._start("nginx", [program, "-c", str(config), "-p", str(folder), "-e", str(folder / "error.log")])
        wait_for_http(process, f"http://127.0.0.1:{port}/health", 10)
        return System("nginx", Endpoint(f"http://127.0.0.1:{port}", {}), [process])

    def litellm(self, upstream: str, cache: Path) -> System:
        """Start LiteLLM's proxy in front of *upstream*; its environment is made below *cache* the first time.

        Raises:
            Missing: it cannot be installed.
        """
        program = _litellm_environment(cache) / "bin" / "litellm"
        port = free_port()
        config = self.folder / "litellm.yaml"
        config.write_text(_LITELLM_CONFIG.format(upstream=upstream))
        process = self._start(
            "litellm",
            [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port),
             "--num_workers", str(LITELLM_WORKERS), "--telemetry", "False"],
            # without these it asks the network for prices at start, and refuses to run without a key
            env={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "NO_DOCS": "True",
                 "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"},
        )  # fmt: skip
        wait_for_http(process, f"http://127.0.0.1:{port}/health/liveliness", 120)
        return System("litellm", Endpoint(f"http://127.0.0.1:{port}", {}), [process], streams=False)

    def _start(
        self, name: str, command: list[str], *, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> Process:
        process = Process(name, command, self.folder / f"{name}.log", env=env, cwd=cwd)
        self._stack.callback(process.stop)
        return process


def wait_for_http(process: Process, url: str, timeout_s: float) -> None:
    """Return once *url* answers 200; raises StartError when it does not in time."""

    def answers() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    process.wait_until(answers, timeout_s, f"did not answer {url}")


def free_port() -> int:
    """Return a TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _litellm_environment(cache: Path) -> Path:
    folder = cache / f"litellm-{LITELLM_VERSION}-python{sys.version_info[0]}.{sys.version_info[1]}"
    if (folder / "complete").exists():
        return folder
    print(f"installing LiteLLM {LITELLM_VERSION} into {folder} (a minute, once)", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True, timeout=120)
        install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, f"litellm[proxy]=={LITELLM_VERSION}"], check=True, capture_output=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or b""
        last = output.decode(errors="replace").strip().splitlines()[-1:] or [str(error)]
        raise Missing(f"LiteLLM {LITELLM_VERSION} cannot be installed: {last[0][:200]}") from error
    (folder / "complete").touch()
    return folder


_NGINX_CONFIG = """\
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 0;
    keepalive_requests 1000000;
    upstream workspace {{ server {upstream}; keepalive 64; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://workspace;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_request_buffering off;
        }}
    }}
}}
"""

_LITELLM_CONFIG = """\
model_list:
  - model_name: fixed
    litellm_params:
      model: openai/fixed
      api_base: {upstream}/v1
      api_key: none
litellm_settings:
  telemetry: false
"""

__all__ = ["CHAT_PATH", "Missing", "StartError", "System", "Systems", "free_port"]
