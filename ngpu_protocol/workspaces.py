"""What a client's workspace is: its image or registered service, how to run it, where, and the calls it answers.

Owns the specification and its validation, the same for the API, the command, a file and the wire. Nodes read it, so
it holds nothing secret: neither the workspace's token and owner, nor registry credentials and secret environment
variables, of which it says only that there are some (`has_registry_credentials`, `secret_env`). Their values travel
beside it, sealed to each node (`control.Desired`).

The fields named in `PLACEMENT_FIELDS` say where and how long a workspace runs, all others what runs there. A change
of the latter is a new revision; a change of the former moves replicas and restarts nothing (`runs_like`).

At the API and in files an unknown key is an error, since it is a mistyped one (`WorkspaceSpec.model_validate`); on
the wire it is a later version's and ignored (`WorkspaceSpec.from_wire`).
"""

from __future__ import annotations

import difflib
import json
import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.image_references import MAX_REFERENCE, parse_image_reference
from ngpu_protocol.job_terms import JobTerms

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

PLACEMENT_FIELDS = frozenset({"name", "replicas", "area", "group", "end_at", "image_digest", "deterministic", "models"})
"""Fields whose change leaves what runs as it is. `image_digest` is among them: it is filled in for a revision; and
`models`, which is for whoever looks for them."""

MAX_SCHEMA_CHARS = 32 * 1024
# What takes time in proportion to schema and body: no regular expressions, references and alternatives.
_SCHEMA_KEYWORDS = frozenset(
    {
        "type", "enum", "const", "properties", "required", "items", "additionalProperties", "minimum", "maximum",
        "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems", "minProperties",
        "maxProperties", "title", "description", "default", "examples", "format",
    }
)  # fmt: skip

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


def _environment_names(names: list[str]) -> list[str]:
    _environment(dict.fromkeys(names, ""))
    if len(set(names)) != len(names):
        raise ValueError("each name may appear once")
    return names


def _image(reference: str) -> str:
    parse_image_reference(reference)
    return reference


def _url(url: str) -> str:
    if re.fullmatch(r"https?://[^/?#@\s]+(?:[/?][^#\s]*)?", url) is None or not url.isascii() or not url.isprintable():
        raise ValueError("must be an http:// or https:// URL without user name, password and fragment")
    return url


def _volume_path(path: str) -> str:
    # Where a volume would hide the kernel's own files, or the whole image, it is a mistake at best.
    if not path.startswith("/") or path.endswith("/") or "//" in path or not path.isprintable() or ":" in path:
        raise ValueError("must be an absolute path below /, without a trailing /, // and :")
    if {".", ".."} & set(path.split("/")):
        raise ValueError("must not contain . or .. segments")
    if path.split("/")[1] in {"proc", "sys", "dev"}:
        raise ValueError("must not lie in /proc, /sys or /dev")
    return path


def _time_ms(value: object) -> object:
    # TOML has date-times of its own and JSON text has ISO 8601; inside, times are UTC milliseconds.
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError("must be a date-time such as 2030-01-31T18:00:00Z, or UTC milliseconds") from None
    if isinstance(value, datetime):
        return int((value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp() * 1000)
    return value


def _check_keywords(schema: object) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ValueError("holds something that is no schema")
    if unknown := sorted(set(schema) - _SCHEMA_KEYWORDS):
        raise ValueError(f"must not use {unknown[0]!r}: it is checked where all clients are served, by what is fast")
    for inner in (*dict(schema.get("properties", {})).values(), schema.get("items", True)):
        _check_keywords(inner)
    _check_keywords(schema.get("additionalProperties", True))


def _body_schema(schema: dict[str, Any]) -> dict[str, Any]:
    import jsonschema  # here, since few have one, and every command would wait for it

    text = json.dumps(schema)
    schema = json.loads(text)  # as JSON has it: what comes over the wire has tuples for arrays
    if len(text) > MAX_SCHEMA_CHARS:
        raise ValueError(f"must have at most {MAX_SCHEMA_CHARS} characters as JSON")
    _check_keywords(schema)
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        where = "/".join(str(part) for part in error.absolute_path)
        raise ValueError(f"is no JSON schema at /{where}: {error.message[:200]}") from None
    return schema


Port = Annotated[int, Field(strict=True, ge=1, le=65535)]
Path = Annotated[str, Field(max_length=2048), AfterValidator(_path)]
Argument = Annotated[str, Field(max_length=65536), AfterValidator(_no_nul)]
EnvironmentMap = Annotated[dict[str, Argument], AfterValidator(_environment)]
Label = Annotated[str, Field(max_length=64), AfterValidator(_printable)]
EndTime = Annotated[
    int,
    BeforeValidator(_time_ms),
    Field(strict=True, ge=0, le=2**53 - 1),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "format": "date-time"}]}),
]
Bytes = Annotated[int, Field(strict=True, ge=0, le=2**50)]


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
    job: JobTerms | None = Field(
        default=None,
        description="where the call only submits a job of the workspace's own: how the job is asked for and read; the "
        "answer is then the job's result",
    )

    body_schema: Annotated[dict[str, Any], AfterValidator(_body_schema)] | None = Field(
        default=None,
        description="JSON schema (draft 2020-12) of the body: a call that does not fit is told what is wrong at once",
    )

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is not given: most have neither, and nodes of before do not know the keys."""
        document: dict[str, Any] = handler(self)
        for name in ("job", "body_schema"):
            if document.get(name) is None:
                document.pop(name, None)
        return document


class Volume(BaseModel):
    """A directory of the workspace on each node that outlives its containers, for caches of models and the like."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")] = Field(
        description="names it within the workspace; other workspaces' volumes of this name are others"
    )
    path: Annotated[str, Field(min_length=2, max_length=1024), AfterValidator(_volume_path)] = Field(
        description="where the container finds it"
    )


class ServedModel(BaseModel):
    """A model that the workspace answers for: bodies that name it may be sent to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_printable)] = Field(
        description="as requests name it"
    )
    project: Annotated[str, Field(max_length=256), AfterValidator(_printable)] = Field(
        default="", description="the family it belongs to"
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
    image: Annotated[str, Field(max_length=MAX_REFERENCE), AfterValidator(_image)] | None = Field(
        default=None,
        description="container image, host:5000/a/b:tag@sha256:…; exactly one of image, image_url and service",
    )
    image_url: Annotated[str, Field(max_length=2048), AfterValidator(_url)] | None = Field(
        default=None,
        description="URL of a container image as `docker save` writes it; exactly one of image, image_url and service",
    )
    has_image_query: Annotated[bool, Field(strict=True)] = Field(
        default=False, description="whether image_url is to be asked for with a query, which travels sealed"
    )
    image_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        default=None, description="SHA-256 of the file at image_url; none: the bootstrap fetches it once to find out"
    )
    image_digest: Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")] | None = Field(
        default=None, description="the one image this revision runs on every node; given by the bootstrap"
    )
    has_registry_credentials: Annotated[bool, Field(strict=True)] = Field(
        default=False, description="whether the image is pulled with credentials, which travel sealed"
    )
    service: Annotated[str, StringConstraints(pattern=r"^[^/\s]{1,128}/[^/\s](?:[^\s]{0,126}[^/\s])?$")] | None = Field(
        default=None,
        description="a registered model server, project/model (the model may hold slashes); exactly one of image, "
        "image_url and service",
    )
    command: list[Argument] = Field(
        default_factory=list, max_length=1024, description="arguments to run in place of the image's own"
    )
    env: EnvironmentMap = Field(default_factory=dict, max_length=1024, repr=False, description="environment variables")
    secret_env: Annotated[
        list[Annotated[str, Field(max_length=256)]], Field(max_length=256), AfterValidator(_environment_names)
    ] = Field(default_factory=list, description="environment variables whose values are secret and travel sealed")
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
    min_gpu_memory_bytes: Bytes = Field(default=0, description="memory each of those GPUs has at least")
    readiness_path: Path = Field(default="/", description="answers HTTP on the first port once the workspace serves")
    readiness_timeout_s: Annotated[float, Field(strict=True, gt=0, le=86400, allow_inf_nan=False)] = Field(
        default=600.0, description="time from the start of the container to that answer, after which it has failed"
    )
    memory_bytes: Annotated[int, Field(strict=True, ge=4 * 1024 * 1024, le=2**50)] | None = Field(
        default=None, description="memory limit; none: the node's default"
    )
    cpus: Annotated[float, Field(strict=True, gt=0, le=4096, allow_inf_nan=False)] | None = Field(
        default=None, description="CPU limit; none: the node's default"
    )
    shm_bytes: Bytes | None = Field(
        default=None, description="size of /dev/shm, part of the memory; none: the engine's default, 64 MiB"
    )
    volumes: list[Volume] = Field(default_factory=list, max_length=16, description="directories that are kept")
    egress: Annotated[bool, Field(strict=True)] = Field(
        default=False, description="whether the workspace may reach the outside; nodes' owners may refuse that"
    )
    replicas: Annotated[int, Field(strict=True, ge=1, le=10_000)] | None = Field(
        default=None, description="nodes to run an image on; none: every suitable one"
    )
    area: Label = Field(default="", description="runs only on nodes that say they are in this area; empty: anywhere")
    group: Label = Field(
        default="", description="workspaces of one group are listed together; nothing else follows from it"
    )
    models: list[ServedModel] = Field(
        default_factory=list, max_length=256, description="models it answers for, found by name in a request's body"
    )
    end_at: EndTime | None = Field(
        default=None,
        description="when it stops for good, as a date-time or UTC milliseconds; none: never",
    )

    deterministic: Annotated[bool, Field(strict=True)] = Field(
        default=False,
        description="the same request gets the same answer, byte for byte, on every node with the same GPU models, and "
        "changes nothing else: some tasks are run again on another node, at no cost to the client, and compared",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if [self.image, self.image_url, self.service].count(None) != 2:
            raise ValueError("give exactly one of image, image_url and service")
        if self.image_sha256 is not None and self.image_url is None:
            raise ValueError("image_sha256: is that of the file at image_url; pin an image by reference with @sha256:")
        if self.has_image_query and self.image_url is None:
            raise ValueError("has_image_query: only an image_url has any")
        if self.has_registry_credentials and self.image is None:
            raise ValueError("has_registry_credentials: only an image from a registry has any")
        if len(set(self.ports)) != len(self.ports):
            raise ValueError("ports: each port may appear once")
        if twice := sorted(set(self.env) & set(self.secret_env)):
            raise ValueError(f"secret_env: {twice[0][:64]} is in env too")
        for what in ("name", "path"):
            if len({getattr(volume, what) for volume in self.volumes}) != len(self.volumes):
                raise ValueError(f"volumes: each {what} may appear once")
        if self.min_gpu_memory_bytes and not self.gpu_count:
            raise ValueError("min_gpu_memory_bytes: says nothing without a gpu_count")
        if self.shm_bytes is not None and self.memory_bytes is not None and self.shm_bytes > self.memory_bytes:
            raise ValueError("shm_bytes: is part of memory_bytes and cannot be more")
        names = [api.name for api in self.apis]
        if len(set(names)) != len(names):
            raise ValueError("apis: each name may appear once")
        for api in self.apis:
            if api.port not in self.ports:
                raise ValueError(f"apis: {api.name} uses port {api.port}, which is not among ports {self.ports}")
        return self

    @property
    def is_image(self) -> bool:
        """Whether it runs as a container, rather than on a registered model server."""
        return self.service is None

    @property
    def has_secrets(self) -> bool:
        """Whether a node needs the sealed values that go with it."""
        return self.has_registry_credentials or self.has_image_query or bool(self.secret_env)

    def runs_like(self, other: WorkspaceSpec) -> bool:
        """Return whether what runs for *other* may go on running for this one, unchanged.

        A digest filled in later agrees with any; two digests agree if they are one.
        """
        if self.image_digest and other.image_digest and self.image_digest != other.image_digest:
            return False
        return self.model_dump(exclude=set(PLACEMENT_FIELDS)) == other.model_dump(exclude=set(PLACEMENT_FIELDS))

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


def _meant(key: str) -> str:
    """Return which key of a specification *key* was most likely meant to be, in words; empty where none is close."""
    close = difflib.get_close_matches(key.lower(), WorkspaceSpec.model_fields, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def describe_errors(error: ValidationError) -> str:
    """Return one line naming each wrong field and what is wrong with it, without the values, which may be secret."""
    shown = error.errors(include_url=False, include_input=False, include_context=False)
    parts = []
    for item in shown[:5]:
        where = ".".join(str(part)[:64] for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            of_workspace = len(item["loc"]) == 1 and error.title in ("NewWorkspace", "WorkspaceSpec")
            message = "is not a known key" + (_meant(str(item["loc"][0])) if of_workspace else "")
        parts.append(f"{where}: {message}" if where else message)
    if len(shown) > 5:
        parts.append(f"and {len(shown) - 5} more")
    return "; ".join(parts)
