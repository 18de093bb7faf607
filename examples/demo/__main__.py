"""``scripts/demo``: a bootstrap and two nodes as processes of their own, three tasks, their receipts.

Exit code 0 when every task's receipt was verified; 1 with one clear message otherwise; 130 after Ctrl-C. Whatever the
end, what was started is stopped and what was made is removed, unless ``--keep`` says otherwise.
"""

import argparse
import json
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ngpu_client import Client, NgpuError

from . import image, kept, tasks
from .network import MODEL, PROJECT, CommandFailed, LocalNetwork, Workspace
from .processes import StartError
from .screen import Screen

CHAT = image.REPOSITORY_ROOT / "examples" / "chat"
NODES = 2


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived: stop, clean up."""


def main() -> int:
    """Return the exit code."""
    arguments = _arguments()
    screen = Screen()
    if arguments.stop:
        if not kept.stop(screen.step):
            screen.line("nothing is running that --keep left")
        return 0
    if arguments.keep and kept.FILE.exists():
        screen.line("an earlier --keep is still running: stop it with scripts/demo --stop")
        return 1
    runs: list[tasks.TaskRun] = []
    engine: str | None = None
    code = 1
    try:
        with _interruptible():
            engine = image.engine_answers()
            with Demonstration(screen, engine, arguments) as demonstration:
                demonstration.deploy()
                demonstration.run_tasks(runs)
                code = demonstration.judge(runs)
                if arguments.keep and code == 0:
                    demonstration.keep()
    except Interrupted:
        screen.line("interrupted; everything was stopped and removed")
        code = 130
    except (StartError, CommandFailed, tasks.TaskFailed, image.ImageError) as error:
        screen.line(f"error: {error}")
    except NgpuError as error:
        screen.line(f"error: the bootstrap did not answer: {type(error).__name__}: {error}")
    if arguments.json:
        sys.stdout.flush()
        print(json.dumps(_summary(code == 0, engine, runs)), flush=True)
    return code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="Run a whole NGPU network on this machine and three tasks on it."
    )
    parser.add_argument("--json", action="store_true", help="make the last line one JSON object")
    parser.add_argument("--keep", action="store_true", help="leave everything running and say how to use it")
    parser.add_argument("--stop", action="store_true", help="stop what an earlier --keep left running")
    parser.add_argument(
        "--base", metavar="IMAGE", help=f"base of the workspace's image (default {image.DEFAULT_BASE}, else packed)"
    )
    return parser.parse_args()


class Demonstration:
    """One run: what it starts and makes, it stops and removes on leaving, unless it was told to keep it."""

    def __init__(self, screen: Screen, engine: str | None, arguments: argparse.Namespace) -> None:
        self._screen = screen
        self._engine = engine
        self._base: str | None = arguments.base
        self._folder = Path(tempfile.mkdtemp(prefix="ngpu-demo-"))
        self._images: image.BuiltImages | None = None
        self._network = LocalNetwork(self._folder / "network", nodes=NODES, docker=engine is not None, say=screen.step)
        self._workspace: Workspace | None = None
        self._kept = False

    def __enter__(self) -> "Demonstration":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._kept:
            return
        with _uninterrupted():
            failed = error is not None and not isinstance(error, Interrupted)
            self._screen.step("stopping")
            self._network.stop()
            if self._images is not None:
                try:
                    self._images.remove()
                except image.ImageError as problem:
                    self._screen.line(f"warning: {problem}")
            if failed:
                self._screen.line(f"the logs stay in {self._folder}")
            else:
                shutil.rmtree(self._folder, ignore_errors=True)

    def deploy(self) -> None:
        """Start the network and put the workspace on both nodes."""
        specification = (CHAT / "workspace.toml").read_text()
        if self._engine is not None:
            self._screen.step(f"Docker engine {self._engine} answers: the workspace runs in containers")
            # The id and everything made under it are this run's alone: two demonstrations do not meet.
            run_id = secrets.token_hex(4)
            self._images = image.build_chat_image(run_id, self._base, self._screen.step)
            specification = _with_source(specification, f'image = "{self._images.reference}"')
        else:
            self._screen.step("no Docker engine answers: the workspace runs as a registered model server")
            specification = _with_source(specification, f'service = "{PROJECT}/{MODEL}"')
        self._network.start()
        if self._engine is None:
            self._screen.step("starting a model server beside each node and registering it")
            self._network.start_model_servers(_model_server, CHAT, "/health")
        self._screen.step("adding the workspace")
        self._workspace = self._network.add_workspace(specification)
        self._network.wait_deployed(self._workspace)

    def run_tasks(self, runs: list[tasks.TaskRun]) -> None:
        """Run the three tasks; each that is done is added to *runs* with its receipt."""
        screen = self._screen
        with self._client() as client:
            for name, task in (
                ("a synchronous task: POST /user/chat", lambda: tasks.synchronous(client)),
                ("an asynchronous task: POST /user/schedulingTask, then GET /user/queryTask",
                 lambda: tasks.asynchronous(client, screen.step)),
                ("a streamed task: POST /proxy/8000/v1/chat/completions, server-sent events as they arrive",
                 lambda: tasks.streamed(client, screen.event)),
            ):  # fmt: skip
                self._network.check()
                screen.step(name)
                run = task()
                screen.answer(run)
                tasks.collect_receipt(client, run)
                runs.append(run)

    def judge(self, runs: Sequence[tasks.TaskRun]) -> int:
        """Show what came of the tasks, check one receipt offline, and return the exit code."""
        self._screen.tables(runs, [node.address for node in self._network.nodes])
        file = self._folder / f"receipt-{runs[0].task_id}.json"
        file.write_text(json.dumps(runs[0].receipt_file, indent=2) + "\n")
        self._screen.step(f"scripts/verify-receipt {file.name}  (offline, from the saved file alone)")
        verifier = image.REPOSITORY_ROOT / "scripts" / "verify_receipt.py"
        run = subprocess.run(
            [sys.executable, str(verifier), str(file)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        for line in (run.stdout + run.stderr).rstrip().splitlines():
            self._screen.line(f"          {line}")
        good = run.returncode == 0 and all(entry.verified for entry in runs)
        self._screen.step("every receipt is verified" if good else "NOT every receipt is verified")
        return 0 if good else 1

    def keep(self) -> None:
        """Leave everything running; say how to use it and how to stop it."""
        assert self._workspace is not None
        self._kept = True
        kept.remember(
            kept.Kept(
                processes=kept.describe(self._network.processes_in_stopping_order),
                folder=str(self._folder),
                images=tuple(self._images.made) if self._images else (),
                docker_host=image.docker_host(),
            )
        )
        url, token = self._network.url, self._workspace.token
        self._screen.line(f"\nrunning at  {url}\ntoken       {token}\n")
        body = """'{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24, "seed": 1}'"""
        stream = """'{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24, "stream": true}'"""
        wrapped = """'{"data": "{\\"messages\\": [{\\"role\\": \\"user\\", \\"content\\": \\"Hello\\"}]}"}'"""
        bearer = f"-H 'Authorization: Bearer {token}'"
        self._screen.line(f"curl -s {bearer} {url}/proxy/8000/v1/chat/completions -d {body}")
        self._screen.line(f"curl -sN {bearer} {url}/proxy/8000/v1/chat/completions -d {stream}")
        self._screen.line(f"curl -s {bearer} {url}/user/chat -H 'Content-Type: application/json' -d {wrapped}")
        self._screen.line(f"\nlogs: {self._folder}\nstop it with: scripts/demo --stop")

    def _client(self) -> Client:
        assert self._workspace is not None
        return Client(self._network.url, self._workspace.token)


def _model_server(port: int) -> list[str]:
    texts = [str(image.REPOSITORY_ROOT / name) for name in ("README.md", "docs")]
    return [sys.executable, "-m", "ngram_chat", "serve", "--port", str(port), "--texts", *texts]


def _with_source(specification: str, line: str) -> str:
    """Return the specification with *line* in place of the one that names its image."""
    lines = [line if text.startswith("image = ") else text for text in specification.splitlines()]
    return "\n".join(lines) + "\n"


def _summary(ok: bool, engine: str | None, runs: Sequence[tasks.TaskRun]) -> dict[str, Any]:
    return {
        "ok": ok,
        "engine": "none" if engine is None else "docker",
        "tasks": [
            {
                "task_id": run.task_id,
                "mode": run.mode,
                "node_addr": run.node_addr,
                "verified": run.verified,
                "wall_ms": run.wall_ms,
            }
            for run in runs
        ],
    }


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise `Interrupted` inside the block at the first SIGINT or SIGTERM."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Keep signals from breaking off the block: cleaning up has its own time limits."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
