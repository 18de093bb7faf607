"""Model servers that registered with this node: who they are, whether they live, and which one takes the next request.

A registration is a statement by some program on this machine, so it is checked before it counts: the target must be a
loopback address (or one the owner listed), and only what answers HTTP is offered. What dies is withdrawn at once and
offered again when it answers. Registrations survive restarts of the node: model servers register once, when they
start.

Several copies of one model are told apart by `cid`; a request goes to the copy with the fewest attempts.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import structlog
import trio

from ngpu_node.changes import Changes
from ngpu_node.deployments import Deployment, Deployments
from ngpu_node.errors import NodeConfigurationError, NodeError
from ngpu_node.model_lists import models_in
from ngpu_node.probes import probe
from ngpu_node.upstreams import Upstream
from ngpu_protocol.control import DeploymentPhase, ServiceOffer
from ngpu_protocol.http1 import HttpError

log = structlog.get_logger(__name__)

HEALTH_INTERVAL_S = 5.0
LIST_EVERY_S = 60.0
LIST_TIMEOUT_S = 3.0
MAX_LIST_BYTES = 1024 * 1024
MAX_LISTED = 256
MAX_REGISTRATIONS = 1024
MAX_TEXT_CHARS = 256

#: What the numbers of the registration interface mean; it gives more room to later ones.
TYPES = {0: "text-to-text", 1: "text-to-image", 2: "image-edit"}


class RegistrationRefused(NodeError):
    """A registration that cannot be taken; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Registration:
    """One copy of a model, as it registered.

    Attributes:
        api: the URL of its main call; requests go to its host and port, on whatever path they ask for.
        type: 0 text to text, 1 text to image, 2 image edit.
        cid: container id, or whatever else tells copies apart; may be empty.
    """

    project: str
    model: str
    api: str
    type: int = 0
    cid: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.project, self.model, self.cid


class Copy:
    """A registered copy and what the last look at it showed.

    Attributes:
        lists: the models its `GET /v1/models` names; None where it has no such list.
        asked_at_s: when it was last asked for them.
    """

    def __init__(self, registration: Registration, host: str, port: int) -> None:
        self.registration = registration
        self.upstream = Upstream(host, port, max_connections=1024)
        self.healthy = False
        self.detail = "not checked yet"
        self.lists: tuple[str, ...] | None = None
        self.asked_at_s = -LIST_EVERY_S

    @property
    def remark(self) -> str:
        """What its owner should know of a healthy copy: that the server knows its model under another name."""
        if self.lists is None or self.registration.model in self.lists:
            return ""
        return f"the server lists {', '.join(self.lists[:3]) or 'no model'}, not {self.registration.model}"


class ModelServers:
    """The registry of model servers, and the backend of deployments that name one of them."""

    def __init__(
        self, path: Path, deployments: Deployments, changes: Changes, *, allowed_hosts: Sequence[str] = ()
    ) -> None:
        """Load what was registered before.

        Args:
            path: the file registrations are kept in; made at the first one.
            allowed_hosts: addresses beyond loopback that may be registered, each `host` or `host:port`.

        Raises:
            NodeConfigurationError: *path* holds something else.
        """
        self._path = path
        self._deployments = deployments
        self._changes = changes
        self._allowed = frozenset(host.lower() for host in allowed_hosts)
        self._copies: dict[tuple[str, str, str], Copy] = {}
        self._registered = Changes()
        self._doubts = Changes()
        self._retired: list[Upstream] = []
        #: ports of this node's own on loopback: who registered one would hand its calls to whoever calls the model
        self.own_ports: set[int] = set()
        for registration in _load(path):
            try:
                self._copies[registration.key] = Copy(registration, *self._target(registration.api))
            except RegistrationRefused as error:
                # The owner's list of hosts may have become shorter since.
                log.warning(
                    "registration_dropped", project=registration.project, model=registration.model, reason=str(error)
                )

    # -- what registers ------------------------------------------------------------------------------------------------

    async def register(self, *registrations: Registration) -> list[Copy]:
        """Take *registrations*, all or none, replacing those with their project, model and cid, after a look at each
        server.

        Raises:
            RegistrationRefused: a field is empty or too long, a target is not allowed, or there are too many.
        """
        copies = {one.key: Copy(_checked(one), *self._target(one.api)) for one in registrations}
        if len(self._copies.keys() | copies.keys()) > MAX_REGISTRATIONS:
            raise RegistrationRefused(f"this node keeps at most {MAX_REGISTRATIONS} registrations")
        async with trio.open_nursery() as nursery:
            for copy in copies.values():
                nursery.start_soon(self._look, copy)
        for key, copy in copies.items():
            self._retire(key)
            self._copies[key] = copy
            log.info(
                "model_registered",
                project=copy.registration.project,
                model=copy.registration.model,
                cid=copy.registration.cid,
                healthy=copy.healthy,
                detail=copy.detail,
            )
        self._save()
        self._tell()
        return list(copies.values())

    def unregister(self, project: str, model: str | None = None, cid: str | None = None) -> int:
        """Forget the copies that match, all models of *project* when *model* is None; return how many there were."""
        keys = [
            key
            for key in self._copies
            if key[0] == project and (model is None or key[1] == model) and (not cid or key[2] == cid)
        ]
        for key in keys:
            self._retire(key)
        if keys:
            self._save()
            log.info("model_unregistered", project=project, model=model, cid=cid, copies=len(keys))
            self._tell()
        return len(keys)

    def _retire(self, key: tuple[str, str, str]) -> None:
        """Take a copy out; its kept connections are closed once its last attempt has ended."""
        copy = self._copies.pop(key, None)
        if copy is not None:
            self._retired.append(copy.upstream)

    def copies(self) -> list[Copy]:
        """Return every registered copy, dead ones included."""
        return list(self._copies.values())

    def described(self) -> list[dict[str, Any]]:
        """Return every copy, in plain values."""
        return [
            {
                "project": copy.registration.project,
                "model": copy.registration.model,
                "type": TYPES.get(copy.registration.type, str(copy.registration.type)),
                "cid": copy.registration.cid,
                "api": copy.registration.api,
                "healthy": copy.healthy,
                "detail": copy.detail or copy.remark,
                "running": copy.upstream.running,
                "lists": None if copy.lists is None else list(copy.lists),
            }
            for copy in sorted(self._copies.values(), key=lambda copy: copy.registration.key)
        ]

    def healthy(self, project: str, model: str) -> list[Copy]:
        """Return the copies of a model that can take a request."""
        return [c for key, c in self._copies.items() if key[:2] == (project, model) and c.healthy]

    def offers(self) -> tuple[ServiceOffer, ...]:
        """Return what the heartbeat says: the healthy copies of each model."""
        alive = sorted((c.registration for c in self._copies.values() if c.healthy), key=lambda r: r.key)
        return tuple(
            ServiceOffer(project=project, model=model, type=TYPES.get(kind, str(kind)), copies=len(list(group)))
            for (project, model, kind), group in itertools.groupby(alive, key=lambda r: (r.project, r.model, r.type))
        )

    def _target(self, api: str) -> tuple[str, int]:
        try:
            url = urlsplit(api)
            host, port = url.hostname, url.port
        except ValueError:
            raise RegistrationRefused(f"api is not a URL: {api[:MAX_TEXT_CHARS]!r}") from None
        if url.scheme != "http" or not host or len(api) > 2048:
            raise RegistrationRefused("api must be the URL of an HTTP call, http://127.0.0.1:<port>/<path>")
        if url.username is not None or url.password is not None:
            raise RegistrationRefused("api must not hold a user name or password")
        port = 80 if port is None else port
        if host == "localhost":
            host = "127.0.0.1"
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            raise RegistrationRefused("api must name its host by IP address, such as 127.0.0.1") from None
        listed = host in self._allowed or f"{host}:{port}" in self._allowed
        if not (address.is_loopback or listed) or port == 0:
            raise RegistrationRefused(
                f"{host} is not a loopback address: only servers on this machine may be registered, or hosts that the "
                "owner lists under model_hosts"
            )
        if address.is_loopback and port in self.own_ports:
            raise RegistrationRefused(f"port {port} is this node's own, and no model server")
        return str(address), port

    # -- health --------------------------------------------------------------------------------------------------------

    async def run(self, *, interval_s: float = HEALTH_INTERVAL_S) -> None:
        """Look at every copy now and then until cancelled."""
        while True:
            seen = self._doubts.count
            before = [(copy, copy.healthy) for copy in self._copies.values()]
            async with trio.open_nursery() as nursery:
                for copy, _ in before:
                    nursery.start_soon(self._look, copy)
            turned = [copy for copy, healthy in before if copy.healthy != healthy]
            for copy in turned:
                log.info(
                    "model_server_back" if copy.healthy else "model_server_gone",
                    project=copy.registration.project,
                    model=copy.registration.model,
                    cid=copy.registration.cid,
                    detail=copy.detail,
                )
            if turned:
                self._tell()
            for upstream in [u for u in self._retired if u.running == 0]:
                self._retired.remove(upstream)
                await upstream.aclose()
            with trio.move_on_after(interval_s):
                await self._doubts.beyond(seen)

    async def _look(self, copy: Copy) -> None:
        problem = await probe(copy.upstream.host, copy.upstream.port)
        copy.healthy = problem is None
        copy.detail = problem or ""
        now_s = trio.current_time()
        if copy.healthy and now_s - copy.asked_at_s >= LIST_EVERY_S:
            copy.asked_at_s = now_s
            copy.lists = await _listed_by(copy.upstream)

    def doubt(self) -> None:
        """Look at the copies now: one of them gave a request no answer.

        Only a look withdraws a copy: a request that makes a server hang up must not be able to.
        """
        self._doubts.announce()

    def _tell(self) -> None:
        self._registered.announce()
        self._changes.announce()

    # -- the backend of deployments ------------------------------------------------------------------------------------

    async def serve(self, deployment: Deployment) -> None:
        """Keep *deployment* ready for as long as a copy of its model is healthy (see `deployments.Backend`)."""
        assert deployment.spec.service is not None
        project, _, model = deployment.spec.service.partition("/")

        def least_busy(port: int) -> Upstream | None:
            copies = self.healthy(project, model)
            return min(copies, key=lambda c: c.upstream.running).upstream if copies else None

        deployment.upstream = least_busy
        while True:
            seen = self._registered.count
            was_ready = deployment.phase in (DeploymentPhase.READY, DeploymentPhase.UNHEALTHY)
            if self.healthy(project, model):
                self._deployments.set_phase(deployment, DeploymentPhase.READY)
            else:
                dead = [c.detail for c in self._copies.values() if c.registration.key[:2] == (project, model)]
                detail = (
                    f"the model server {project}/{model} does not answer: {dead[0]}"
                    if dead
                    else f"no model server registered as {project}/{model} on this node"
                )
                phase = DeploymentPhase.UNHEALTHY if was_ready else DeploymentPhase.STARTING
                self._deployments.set_phase(deployment, phase, detail)
            await self._registered.beyond(seen)

    # -- the file ------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        document = {"registrations": [asdict(copy.registration) for copy in self._copies.values()]}
        draft = self._path.with_suffix(".draft")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(document, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)


async def _listed_by(upstream: Upstream) -> tuple[str, ...] | None:
    """Return the models a server lists, as OpenAI's `GET /v1/models` or the model interface has it; None without."""
    try:
        with trio.move_on_after(LIST_TIMEOUT_S):
            async with upstream.client.request("GET", "/v1/models", []) as response:
                if response.status != 200:
                    return None
                listed = models_in(await response.read(MAX_LIST_BYTES), MAX_LISTED)
                return None if listed is None else tuple(one.model for one in listed)
    except (HttpError, OSError) as error:
        log.debug("model_list_unread", port=upstream.port, reason=str(error))
    return None


def _checked(registration: Registration) -> Registration:
    for name in ("project", "model"):
        value = getattr(registration, name)
        if not value or len(value) > MAX_TEXT_CHARS or "/" in value or not value.isprintable():
            raise RegistrationRefused(f"{name} must be 1 to {MAX_TEXT_CHARS} printable characters without /")
    if len(registration.cid) > MAX_TEXT_CHARS or registration.type < 0:
        raise RegistrationRefused("cid is too long, or type is negative")
    return registration


def _load(path: Path) -> Iterator[Registration]:
    try:
        document = json.loads(path.read_text())
        for entry in document["registrations"]:
            yield Registration(**entry)
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NodeConfigurationError(
            f"the registrations in {path} cannot be read ({error}): remove the file, model servers register again"
        ) from error
