"""A client's `docker run` line, read as a workspace: parsed with a table of flags, never executed.

Owns which flags mean something here. What they say becomes fields of a specification; a few flags say only how a person
runs a container at a terminal (`-d`, `--rm`, `-it`, `--name`, `--restart`) and are passed over; every other flag, and
every value that reaches beyond the container (a host's path, an address, the client's own environment), is refused by
its name. Pure.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

MAX_LINE_CHARS = 64 * 1024

_VOLUME_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_ENV = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_PORT = re.compile(
    r"(?:(?:(?P<address>[0-9.]+|\[[0-9a-fA-F:.]+\]):)?(?P<host>[0-9]{0,5}):)?(?P<port>[0-9]{1,5})(?:/tcp)?"
)
_SIZE = re.compile(r"(?P<number>[0-9]{1,15})(?P<unit>[bkmgt]?)b?", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SHELL = ";&|<>"
_WHY = {
    "--privileged": "workspaces run confined on other people's machines",
    "--network": "workspaces are called through the network's own path; give ports with -p",
    "--device": "GPUs are given with --gpus, other devices not at all",
    "--cap-add": "workspaces run without capabilities",
    "--mount": "give a named volume with -v NAME:/path",
    "--env-file": "give each variable with -e NAME=VALUE",
    "--entrypoint": "give the whole command after the image",
}


class DockerRunError(ValueError):
    """The line asks for something a workspace cannot have; the message names the flag."""


@dataclass(frozen=True, slots=True)
class DockerRun:
    """What a line says.

    Attributes:
        fields: of a workspace specification: image, and where given command, env, ports, volumes, gpu_count,
            shm_bytes, memory_bytes, cpus.
        published: the host's port the line publishes a port of the container on.
        passed_over: flags that mean nothing here.
    """

    fields: dict[str, Any]
    published: dict[int, int] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()


def parse_docker_run(line: str) -> DockerRun:
    """Return what the line `docker run …` asks for.

    Raises:
        DockerRunError: it is no such line, or asks for what a workspace cannot have.
    """
    parser = _Parser(_words(line))
    return parser.parse()


class _Parser:
    def __init__(self, words: list[str]) -> None:
        self._words = words
        self._fields: dict[str, Any] = {}
        self._published: dict[int, int] = {}
        self._passed_over: list[str] = []
        self._takers: dict[str, Callable[[str, str], None]] = {
            "--gpus": self._gpus,
            "-p": self._port,
            "--publish": self._port,
            "-e": self._env,
            "--env": self._env,
            "-v": self._volume,
            "--volume": self._volume,
            "--shm-size": lambda flag, value: self._set("shm_bytes", _size(flag, value)),
            "-m": lambda flag, value: self._set("memory_bytes", _size(flag, value)),
            "--memory": lambda flag, value: self._set("memory_bytes", _size(flag, value)),
            "--cpus": self._cpus,
            "--name": self._pass_over,
            "--restart": self._pass_over,
        }
        self._switches = {"-d", "--detach", "--rm", "-i", "--interactive", "-t", "--tty"}

    def parse(self) -> DockerRun:
        words = self._words
        while words and words[0].startswith("-") and words[0] != "-":
            word = words.pop(0)
            if word == "--":
                break
            if word.startswith("--"):
                self._long(word)
            else:
                self._short(word)
        if not words:
            raise DockerRunError("the line names no image")
        self._fields["image"] = words[0]
        if words[1:]:
            self._fields["command"] = words[1:]
        return DockerRun(self._fields, self._published, tuple(self._passed_over))

    def _long(self, word: str) -> None:
        flag, equals, value = word.partition("=")
        if flag in self._switches:
            if equals and value not in ("true", "false"):
                raise DockerRunError(f"{flag} takes no value")
            self._passed_over.append(flag)
            return
        taker = self._takers.get(flag)
        if taker is None:
            raise _refused(flag)
        taker(flag, value if equals else self._next(flag))

    def _short(self, word: str) -> None:
        """Read `-it`, `-p 1:2`, `-p1:2`, `-dp 1:2`: switches first, the last may take the rest as its value."""
        for place, letter in enumerate(word[1:], 1):
            flag = f"-{letter}"
            if flag in self._switches:
                self._passed_over.append(flag)
                continue
            taker = self._takers.get(flag)
            if taker is None:
                raise _refused(flag)
            taker(flag, word[place + 1 :].removeprefix("=") or self._next(flag))
            return

    def _next(self, flag: str) -> str:
        if not self._words:
            raise DockerRunError(f"{flag} lacks its value")
        return self._words.pop(0)

    def _set(self, name: str, value: Any) -> None:
        self._fields[name] = value

    def _pass_over(self, flag: str, value: str) -> None:
        self._passed_over.append(flag)

    def _gpus(self, flag: str, value: str) -> None:
        """Count the GPUs. `all` of the client's machine means one here: how many there are is the node's affair."""
        count = 0
        for part in _comma_parts(value.strip("\"'")):
            name, _, given = part.rpartition("=")
            if not name and given == "all":
                count = 1
            elif name in ("", "count") and given.isascii() and given.isdigit():
                count = int(given[:6])
            elif name == "device":
                count = len([one for one in given.split(",") if one])
            elif name != "capabilities":
                raise DockerRunError(f"{flag} {value}: write a number, all, or device=<ids>")
        if not 1 <= count <= 64:
            raise DockerRunError(f"{flag} {value}: 1 to 64 GPUs can be asked for")
        self._fields["gpu_count"] = count

    def _port(self, flag: str, value: str) -> None:
        found = _PORT.fullmatch(value)
        port = int(found["port"]) if found else 0
        host = int(found["host"] or 0) if found else 0
        if not 1 <= port <= 65535 or host > 65535:
            raise DockerRunError(f"{flag} {value}: write CONTAINER or HOST:CONTAINER, TCP, one port each")
        ports = self._fields.setdefault("ports", [])
        if port not in ports:
            ports.append(port)
        if host:
            self._published[port] = host

    def _env(self, flag: str, value: str) -> None:
        found = _ENV.fullmatch(value)
        if found is None:
            name = value.partition("=")[0][:64]
            raise DockerRunError(f"{flag} {name}: write NAME=VALUE; your own environment is not there")
        self._fields.setdefault("env", {})[found[1]] = found[2]

    def _volume(self, flag: str, value: str) -> None:
        parts = value.split(":")
        if len(parts) < 2:
            raise DockerRunError(f"{flag} {value}: name the volume: NAME:/path")
        if _VOLUME_NAME.fullmatch(parts[0]) is None:
            raise DockerRunError(f"{flag} {value}: paths of the host cannot be mounted; name a volume: NAME:/path")
        if len(parts) > 3 or (len(parts) == 3 and parts[2] != "rw"):
            raise DockerRunError(f"{flag} {value}: the only option of a volume is rw")
        self._fields.setdefault("volumes", []).append({"name": parts[0], "path": parts[1].rstrip("/") or "/"})

    def _cpus(self, flag: str, value: str) -> None:
        try:
            cpus = float(value)
        except ValueError:
            cpus = 0.0
        if not 0 < cpus <= 4096:
            raise DockerRunError(f"{flag} {value}: write a number of CPUs")
        self._fields["cpus"] = cpus


def _words(line: str) -> list[str]:
    """Return the words after `docker run`."""
    if len(line) > MAX_LINE_CHARS:
        raise DockerRunError(f"the line has {len(line)} characters; {MAX_LINE_CHARS} are enough")
    try:
        lexer = shlex.shlex(line.replace("\\\r\n", " ").replace("\\\n", " "), posix=True, punctuation_chars=_SHELL)
        lexer.whitespace_split, lexer.commenters = True, ""
        words = list(lexer)
    except ValueError as error:
        raise DockerRunError(f"the line cannot be split into words: {error}") from None
    if words[:1] == ["sudo"]:
        words = words[1:]
    for head in (["docker", "run"], ["docker", "container", "run"]):
        if words[: len(head)] == head:
            words = words[len(head) :]
            break
    else:
        raise DockerRunError("the line does not begin with `docker run`")
    for word in words:
        if (word and not word.strip(_SHELL)) or "$(" in word or "`" in word:
            raise DockerRunError(f"{word[:32]!r}: there is no shell; give one `docker run` line and nothing around it")
    return words


def _comma_parts(value: str) -> Iterator[str]:
    """Split `count=1,capabilities=gpu` and `device=0,1`: a part without `=` belongs to the one before."""
    parts: list[str] = []
    for part in value.replace('"', "").split(","):
        if parts and "=" in parts[-1] and "=" not in part:
            parts[-1] += "," + part
        else:
            parts.append(part)
    return iter(parts)


def _size(flag: str, value: str) -> int:
    found = _SIZE.fullmatch(value)
    size = int(found["number"]) * _UNITS[found["unit"].lower()] if found else 0
    if not 0 < size <= 2**50:
        raise DockerRunError(f"{flag} {value}: write a size such as 512m or 8g")
    return size


def _refused(flag: str) -> DockerRunError:
    known = {"-u": "--user", "--net": "--network", "-w": "--workdir", "-l": "--label", "-h": "--hostname"}
    why = _WHY.get(known.get(flag, flag))
    return DockerRunError(f"{flag[:64]} is not taken here" + (f": {why}" if why else ""))
