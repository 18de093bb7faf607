"""What a client's workspace is: its image or registered service, how to run it, and the calls it answers.

Owns the specification and its validation, the same for the API, the command and the wire. Where a workspace runs is
decided elsewhere, and its secret token and owner are never part of the specification: nodes read it.

At the API and in files an unknown key is an error, since it is a mistyped one (`WorkspaceSpec.model_validate`); on
the wire it is a later version's and ignored (`WorkspaceSpec.from_wire`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from ngpu_protocol.errors import MalformedError

RESERVED_API_NAMES = frozenset(
    {
        "schedulingTask",
        "queryTask",
        "queryTaskList",
        "queryNodes",
        "getTasksFromNode",
        "getDetailed",
        "getTask",
        "getTasks",
        "getNodes",
        "getNode",
        "getBalance",
        "newAccount",
        "nodeRegister",
        "login",
    }
)
"""Names under ``/user/`` that the gateway answers itself."""

_MAX_TEXT = 4096
_NAME_IN_PATH = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# A path that climbs, however it is spelled: servers differ in whether they decode %2f before they resolve dots.
_DOT_SEGMENT = re.compile(r"(?:/|%2f|%5c)(?:\.|%2e){1,2}(?:/|%2f|%5c|$)", re.IGNORECASE)


def _api_name(name: str) -> str:
    if _NAME_IN_PATH.fullmatch(name) is None:
        raise ValueError("use 1 to 64 letters, digits and underscores, beginning with a letter")
    if name in RESERVED_API_NAMES:
        raise ValueError(f"{name} is a call of the gateway itself; choose another name")
    return name


def _path(path: str) -> str:
    if not path.startswith("/") or path.startswith("//"):
        raise ValueError("must begin with one /, without a scheme or host")
    if not path.isascii() or not path.isprintable() or " " in path or "#" in path or "\\" in path:
        raise ValueError("must be printable ASCII without spaces, # and \\; percent-encode anything else")
    if _DOT_SEGMENT.search(path.partition("?")[0]):
        raise ValueError("must not contain . or .. segments")
    return path


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must not contain control characters")
    return text


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain a NUL character")
    return text


def _environment(env: dict[str, str]) -> dict[str, str]:
    for name in env:
        if _ENV_NAME.fullmatch(name) is None:
            raise ValueError(f"{name[:64]!r} is not a name of an environment variable")
    return env


Port = Annotated[int, Field(strict=True, ge=1, le=65535)]
Path = Annotated[str, Field(max_length=2048), AfterValidator(_path)]
Argument = Annotated[str, Field(max_length=65536), AfterValidator(_no_nul)]
EnvironmentMap = Annotated[dict[str, Argument], AfterValidator(_environment)]


class Api(BaseModel):
    """A call the workspace answers under ``/user/<name>``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(_api_name)] = Field(description="the name in /user/<name>")
    method: Annotated[str, StringConstraints(pattern=r"^[A-Z]{1,16}$")] = Field(
        default="POST", description="the HTTP method the workspace is called with"
    )
    path: Path = Field(description="the path in the workspace, with a query if it always has one")
    port: Port = Field(description="one of the workspace's ports")
    mode: Literal["sync", "async"] = Field(
        default="sync", description="sync: the answer is the workspace's; async: a task id, to be polled"
    )


class WorkspaceSpec(BaseModel):
    """One revision of a workspace. Frozen; a change is a new revision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,18}$")] = Field(
        description="the public id: a number, as text"
    )
    revision: Annotated[int, Field(strict=True, ge=1, le=2**32 - 1)] = Field(
        default=1, description="counts the changes from 1"
    )
    name: Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_printable)] = Field(
        description="for people"
    )
    image: Annotated[str, StringConstraints(pattern=r"^\S+$", max_length=_MAX_TEXT)] | None = Field(
        default=None, description="container image; exactly one of image and service"
    )
    service: Annotated[str, StringConstraints(pattern=r"^[^/\s]{1,128}/[^/\s]{1,128}$")] | None = Field(
        default=None, description="a registered model server, project/model; exactly one of image and service"
    )
    command: list[Argument] = Field(
        default_factory=list, max_length=1024, description="arguments to run in place of the image's own"
    )
    env: EnvironmentMap = Field(default_factory=dict, max_length=1024, repr=False, description="environment variables")
    ports: list[Port] = Field(
        min_length=1, max_length=64, description="ports the workspace listens on; the first is the default"
    )
    apis: list[Api] = Field(default_factory=list, max_length=256, description="calls offered under /user/<name>")
    concurrency: Annotated[int, Field(strict=True, ge=1, le=4096)] = Field(
        default=4, description="tasks at once on one node"
    )
    request_timeout_s: Annotated[float, Field(strict=True, gt=0, le=86400, allow_inf_nan=False)] = Field(
        default=300.0, description="time limit of one task"
    )
    gpu_count: Annotated[int, Field(strict=True, ge=0, le=64)] = Field(default=0, description="GPUs it holds on a node")
    gpu_types: list[Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_printable)]] = Field(
        default_factory=list, max_length=64, description="GPU models it runs on, preferred first; empty: any"
    )
    readiness_path: Path = Field(default="/", description="answers HTTP on the first port once the workspace serves")
    memory_bytes: Annotated[int, Field(strict=True, ge=4 * 1024 * 1024, le=2**50)] | None = Field(
        default=None, description="memory limit; none: the node's default"
    )
    cpus: Annotated[float, Field(strict=True, gt=0, le=4096, allow_inf_nan=False)] | None = Field(
        default=None, description="CPU limit; none: the node's default"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.image is None) == (self.service is None):
            raise ValueError("give exactly one of image and service")
        if len(set(self.ports)) != len(self.ports):
            raise ValueError("ports: each port may appear once")
        names = [api.name for api in self.apis]
        if len(set(names)) != len(names):
            raise ValueError("apis: each name may appear once")
        for api in self.apis:
            if api.port not in self.ports:
                raise ValueError(f"apis: {api.name} uses port {api.port}, which is not among ports {self.ports}")
        return self

    def api(self, name: str) -> Api | None:
        """Return the call named *name*, or None."""
        return next((api for api in self.apis if api.name == name), None)

    @classmethod
    def from_wire(cls, document: object) -> WorkspaceSpec:
        """Return the specification in a peer's map, unknown keys ignored.

        Raises:
            MalformedError: if it is not one.
        """
        try:
            return cls.model_validate(document, extra="ignore")
        except ValidationError as error:
            raise MalformedError("workspace", describe_errors(error)) from None

    def to_wire(self) -> dict[str, Any]:
        """Return the map that `from_wire` reads, for msgpack or JSON."""
        return self.model_dump()


def describe_errors(error: ValidationError) -> str:
    """Return one line naming each wrong field and what is wrong with it, without the values, which may be secret."""
    shown = error.errors(include_url=False, include_input=False, include_context=False)
    parts = []
    for item in shown[:5]:
        where = ".".join(str(part)[:64] for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {message}" if where else message)
    if len(shown) > 5:
        parts.append(f"and {len(shown) - 5} more")
    return "; ".join(parts)
