"""Programs run inside a container, for a look at it: bounded in time and output, and never two at a time that hang.

A program of a client's image can hang for ever: by malice, or because a driver does. The engine's API starts one and
cannot stop it. So nobody waits for it beyond its time: the connection is closed, and the program is killed where this
process may (the same machine, and root); where it may not, the container it hangs in is asked nothing more until it has
ended. At most one is left in a container, which its own limit of processes holds too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import structlog
import trio

from ngpu_node.engine.transport import CALL_TIMEOUT_S
from ngpu_node.errors import EngineUnavailable

log = structlog.get_logger(__name__)

OUTPUT_BYTES = 16 * 1024
MAX_ANSWER_BYTES = 256 * 1024
#: For what follows when time is up: two short calls.
LAST_CALLS_S = 2.0
#: What is remembered of containers in which a program hangs.
MAX_HANGING = 256
_FRAME = struct.Struct(">BxxxL")


class Programs:
    """The programs of one engine's containers; *proc* is where this machine shows its processes."""

    def __init__(self, client: httpx.AsyncClient, *, proc: Path = Path("/proc")) -> None:
        self._client = client
        self._proc = proc
        #: by container: the program in it that was left
        self._hanging: dict[str, str] = {}

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def run(self, container_id: str, command: Sequence[str], *, user: str, timeout_s: float) -> tuple[int, str]:
        """Run one and return its exit code and the beginning of what it said.

        The exit code is -1 where the engine could not start it, it did not end in time, or an earlier one hangs still.

        Raises:
            EngineUnavailable: the engine does not answer.
        """
        before = self._hanging.get(container_id)
        if before is not None:
            if (await self._ask(f"/exec/{before}/json")).get("Running"):
                return -1, "an earlier program hangs in the container"
            self._hanging.pop(container_id, None)
        wish = {"AttachStdout": True, "AttachStderr": True, "Cmd": list(command), "User": user}
        made = await self._ask(f"/containers/{container_id}/exec", wish)
        program = str(made.get("Id") or "")
        if not program:
            return -1, str(made.get("message") or "the engine would not start it")[:300]
        output, ended = b"", False
        try:
            with trio.move_on_after(timeout_s):
                output = await self._output(program)
                ended = True
            if not ended:
                return -1, f"it did not end within {timeout_s:g} s"
            found = await self._ask(f"/exec/{program}/json")
            ended = not found.get("Running")
            exit_code = found.get("ExitCode")
            return (exit_code if isinstance(exit_code, int) and ended else -1), output.decode(errors="replace")
        finally:
            if not ended:
                with trio.move_on_after(LAST_CALLS_S, shield=True):
                    await self._leave(container_id, program)

    async def _output(self, program: str) -> bytes:
        """Return the beginning of what a program says, once it has ended or said more than is taken."""
        said, raw = b"", b""
        async with self._call("POST", f"/exec/{program}/start", {"Detach": False, "Tty": False}) as response:
            if response.status_code != 200:
                return (await response.aread())[:OUTPUT_BYTES]
            async for part in response.aiter_raw():
                raw += part
                while len(raw) >= _FRAME.size:
                    _, size = _FRAME.unpack_from(raw)
                    frame = raw[_FRAME.size : _FRAME.size + size]
                    if len(frame) < size and len(said) + len(frame) < OUTPUT_BYTES:
                        break  # the rest of it is on its way
                    said, raw = said + frame, raw[_FRAME.size + size :]
                    if len(said) >= OUTPUT_BYTES:
                        return said[:OUTPUT_BYTES]
        return said

    async def _leave(self, container_id: str, program: str) -> None:
        """Kill a program nobody waits for any more, or remember that it hangs."""
        try:
            found = await self._ask(f"/exec/{program}/json")
        except EngineUnavailable:
            found = {"Running": True}
        if not found.get("Running"):
            return
        killed = self._kill(found.get("Pid"), container_id)
        log.info("program_left", container=container_id[:12], killed=killed)
        self._hanging[container_id] = program
        while len(self._hanging) > MAX_HANGING:
            self._hanging.pop(next(iter(self._hanging)))

    def _kill(self, pid: Any, container_id: str) -> bool:
        """Kill the process *pid* if it is one of this container's: the engine may be on another machine."""
        if not isinstance(pid, int) or pid <= 1:
            return False
        with contextlib.suppress(OSError):
            if container_id in (self._proc / str(pid) / "cgroup").read_text():
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    async def _ask(self, path: str, wish: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the engine's answer, an error's `message` included; empty where it makes no sense."""
        async with self._call("POST" if wish is not None else "GET", path, wish) as response:
            data = b""
            async for part in response.aiter_raw():
                data += part
                if len(data) > MAX_ANSWER_BYTES:
                    return {}
        try:
            found = json.loads(data)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    @asynccontextmanager
    async def _call(self, method: str, path: str, wish: dict[str, Any] | None) -> AsyncIterator[httpx.Response]:
        # how long a program may be silent is its caller's to say
        timeout = httpx.Timeout(CALL_TIMEOUT_S, read=None if path.endswith("/start") else CALL_TIMEOUT_S)
        try:
            async with self._client.stream(method, path, json=wish, timeout=timeout) as response:
                yield response
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            said = str(error) or type(error).__name__
            raise EngineUnavailable(f"the container engine does not answer: {said}") from error
