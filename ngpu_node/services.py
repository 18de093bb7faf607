"""Model servers that registered with this node: who they are, whether they live, and which one takes the next request.

A registration is a statement by some program on this machine, so it is checked before it counts: the target must be a
loopback address (or one the owner listed), only what answers HTTP is offered, and only the calls it registered for pass
(`model_paths`). What dies is withdrawn at once and offered again when it answers; one that is silent while it works on
calls has `BUSY_S` for it. Registrations survive restarts of the node: model servers register once, when they start.

Several copies of one model are told apart by `cid`; a request goes to the copy with the fewest attempts.
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import structlog
import trio

from ngpu_node.changes import Changes
from ngpu_node.deployments import Deployment, Deployments
from ngpu_node.errors import NodeConfigurationError, NodeError, StateUnavailable
from ngpu_node.model_lists import models_in
from ngpu_node.model_paths import MAX_DECLARED, ModelPaths, declared_path
from ngpu_node.probes import Silence, probe
from ngpu_node.upstreams import Upstream
from ngpu_protocol.control import DeploymentPhase, ServiceOffer
from ngpu_protocol.http1 import HttpError

log = structlog.get_logger(__name__)

HEALTH_INTERVAL_S = 5.0
LIST_EVERY_S = 60.0
LIST_TIMEOUT_S = 3.0
MAX_LIST_BYTES = 1024 * 1024
MAX_LISTED = 256
#: A program that computes may not answer anybody else meanwhile; one that hangs must not look busy for ever.
BUSY_S = 60.0
MAX_REGISTRATIONS = 1024
#: All of them must fit a heartbeat.
MAX_TEXT_BYTES = 256
MAX_TYPE = 255

#: What the numbers of the registration interface mean; it gives more room to later ones.
TYPES = {0: "text-to-text", 1: "text-to-image", 2: "image-edit"}


class RegistrationRefused(NodeError):
    """A registration that cannot be taken; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Registration:
    """One copy of a model, as it registered.

    Attributes:
        api: the URL of its main call.
        type: 0 text to text, 1 text to image, 2 image edit.
        cid: container id, or whatever else tells copies apart; may be empty.
        paths: what may be called of it besides the model interface, see `model_paths.declared_path`.
    """

    project: str
    model: str
    api: str
    type: int = 0
    cid: str = ""
    paths: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, str]:
        return self.project, self.model, self.cid


class Copy:
    """A registered copy and what the last look at it showed.

    Attributes:
        lists: the models its `GET /v1/models` names; None where it has no such list.
        asked_at_s: when it was last asked for them.
        answered_at_s: when it last answered a look.
        looks: how many looks at it are under way.
    """

    def __init__(self, registration: Registration, host: str, port: int) -> None:
        self.registration = registration
        self.paths = ModelPaths(urlsplit(registration.api).path, registration.type, registration.paths)
        self.upstream = Upstream(host, port, max_connections=1024)
        self.healthy = False
        self.detail = "not checked yet"
        self.lists: tuple[str, ...] | None = None
        self.asked_at_s = -LIST_EVERY_S
        self.answered_at_s = -BUSY_S
        self.looks = 0

    def goes_on_as(self, copy: Copy) -> None:
        """Hand *copy*, another registration of the same server, what is known of it: it serves on meanwhile.

        When it was asked for its models is left out: the list may lie elsewhere now.
        """
        copy.upstream = self.upstream
        copy.healthy, copy.detail = self.healthy, self.detail
        copy.lists, copy.answered_at_s = self.lists, self.answered_at_s

    @property
    def place(self) -> tuple[str, int]:
        return self.upstream.host, self.upstream.port

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
        self._own_ports: frozenset[int] = frozenset()
        for registration in _load(path):
            try:
                self._copies[registration.key] = self._copy(registration)
            except RegistrationRefused as error:
                # The owner's list of hosts may have become shorter since.
                _log_dropped(registration, str(error))

    def keep_off(self, ports: Iterable[int]) -> None:
        """Take no registration of *ports*, this node's own on loopback, and drop those there are: who registered one
        would hand its calls to whoever calls the model."""
        self._own_ports = frozenset(ports)
        for copy in self.copies():
            try:
                self._target(copy.registration.api)
            except RegistrationRefused as error:
                _log_dropped(copy.registration, str(error))
                self._retire(copy.registration.key)

    # -- what registers ------------------------------------------------------------------------------------------------

    async def register(self, *registrations: Registration) -> list[Copy]:
        """Take *registrations*, all or none, replacing those with their project, model and cid, after a look at each
        server.

        Raises:
            RegistrationRefused: a field is empty or too long, a target is not allowed, or there are too many.
            StateUnavailable: they cannot be written down; nothing changed.
        """
        copies: dict[tuple[str, str, str], Copy] = {}
        for one in registrations:
            known = self._copies.get(one.key)
            # one that says again what it said keeps its connections, and its count of attempts
            copy = known if known is not None and known.registration == one else self._copy(one)
            if known is not None and known is not copy and known.place == copy.place:
                known.goes_on_as(copy)
            copies[one.key] = copy
        table = self._copies | copies
        if len(table) > MAX_REGISTRATIONS:
            raise RegistrationRefused(f"this node keeps at most {MAX_REGISTRATIONS} registrations")
        self._save(table)
        for key, copy in copies.items():
            known = self._copies.get(key)
            if known is not None and known.upstream is not copy.upstream:
                self._retired.append(known.upstream)
            self._copies[key] = copy
        try:
            async with trio.open_nursery() as nursery:
                for copy in copies.values():
                    nursery.start_soon(self._look, copy)
        finally:
            self._tell()  # also where whoever registers them left: they are registered, looked at or not
        for copy in copies.values():
            log.info(
                "model_registered",
                project=copy.registration.project,
                model=copy.registration.model,
                cid=copy.registration.cid,
                healthy=copy.healthy,
                detail=copy.detail,
            )
        return list(copies.values())

    def unregister(self, project: str, model: str | None = None, cid: str | None = None) -> int:
        """Forget the copies that match, all models of *project* when *model* is None; return how many there were.

        Raises:
            StateUnavailable: that cannot be written down; nothing changed.
        """
        keys = [
            key
            for key in self._copies
            if key[0] == project and (model is None or key[1] == model) and (not cid or key[2] == cid)
        ]
        if keys:
            self._save({key: copy for key, copy in self._copies.items() if key not in keys})
            for key in keys:
                self._retire(key)
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
                "paths": list(copy.registration.paths),
            }
            for copy in sorted(self._copies.values(), key=lambda copy: copy.registration.key)
        ]

    def healthy(self, project: str, model: str) -> list[Copy]:
        """Return the copies of a model that can take a request."""
        return [c for key, c in self._copies.items() if key[:2] == (project, model) and c.healthy]

    def offers(self) -> tuple[ServiceOffer, ...]:
        """Return what the heartbeat says: the healthy copies of each model."""
        alive = Counter(
            (one.project, one.model, one.type) for one in (c.registration for c in self._copies.values() if c.healthy)
        )
        return tuple(
            ServiceOffer(project=project, model=model, type=TYPES.get(kind, str(kind)), copies=copies)
            for (project, model, kind), copies in sorted(alive.items())
        )

    def _copy(self, registration: Registration) -> Copy:
        return Copy(_checked(registration), *self._target(registration.api))

    def _target(self, api: str) -> tuple[str, int]:
        if not api.isascii() or not api.isprintable() or " " in api:
            raise RegistrationRefused("api has characters that no URL has")  # and that urlsplit would leave out
        try:
            url = urlsplit(api)
            host, port = url.hostname, url.port
        except ValueError:
            raise RegistrationRefused(f"api is not a URL: {api[:256]!r}") from None
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
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped  # the same place, which Pythons differ about calling loopback
        listed = host in self._allowed or f"{host}:{port}" in self._allowed
        if not (address.is_loopback or listed) or port == 0:
            raise RegistrationRefused(
                f"{host} is not a loopback address: only servers on this machine may be registered, or hosts that the "
                "owner lists under model_hosts"
            )
        if address.is_loopback and port in self._own_ports:
            raise RegistrationRefused(f"port {port} is this node's own, and no model server")
        return str(address), port

    # -- health --------------------------------------------------------------------------------------------------------

    async def run(self, *, interval_s: float = HEALTH_INTERVAL_S) -> None:
        """Look at every copy now and then until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                seen = self._doubts.count
                for copy in self._copies.values():
                    if not copy.looks:  # one that hangs holds up nobody else's look
                        nursery.start_soon(self._look_again, copy)
                for upstream in [u for u in self._retired if u.running == 0]:
                    self._retired.remove(upstream)
                    await upstream.aclose()
                with trio.move_on_after(interval_s):
                    await self._doubts.beyond(seen)

    async def _look_again(self, copy: Copy) -> None:
        was_healthy = copy.healthy
        await self._look(copy)
        if copy.healthy == was_healthy or self._copies.get(copy.registration.key) is not copy:
            return
        log.info(
            "model_server_back" if copy.healthy else "model_server_gone",
            project=copy.registration.project,
            model=copy.registration.model,
            cid=copy.registration.cid,
            detail=copy.detail,
        )
        self._tell()

    async def _look(self, copy: Copy) -> None:
        copy.looks += 1
        try:
            problem = await probe(copy.upstream.host, copy.upstream.port)
            now_s = trio.current_time()
            if problem is None:
                copy.answered_at_s = now_s
            elif copy.healthy and is_only_busy(problem, copy.upstream.running, now_s - copy.answered_at_s):
                return
            copy.healthy = problem is None
            copy.detail = problem or ""
            if copy.healthy and now_s - copy.asked_at_s >= LIST_EVERY_S:
                copy.asked_at_s = now_s
                copy.lists = await _listed_by(copy)
        finally:
            copy.looks -= 1

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

        def route(method: str, target: str) -> tuple[Upstream | None, str] | None:
            ways = [
                (copy, way)
                for key, copy in self._copies.items()
                if key[:2] == (project, model) and (way := copy.paths.target(method, target)) is not None
            ]
            alive = [(copy.upstream, way) for copy, way in ways if copy.healthy]
            if alive:
                return min(alive, key=lambda way: way[0].running)
            return (None, target) if ways else None

        deployment.upstream = least_busy
        deployment.route = route
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

    def _save(self, table: Mapping[tuple[str, str, str], Copy]) -> None:
        document = {"registrations": [asdict(copy.registration) for copy in table.values()]}
        draft = self._path.with_suffix(".draft")
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(document, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
        except OSError as error:
            log.error("registrations_not_written", path=str(self._path), reason=str(error))
            raise StateUnavailable(f"the registrations cannot be written down: {error.strerror or error}") from None


def is_only_busy(problem: str, running: int, silent_s: float) -> bool:
    """Whether a healthy server with *problem* may have no hands free for a look, rather than hang."""
    return isinstance(problem, Silence) and running > 0 and silent_s < BUSY_S


async def _listed_by(copy: Copy) -> tuple[str, ...] | None:
    """Return the models a server lists, as OpenAI's `GET /v1/models` or the model interface has it; None without."""
    target = copy.paths.target("GET", "/v1/models")
    assert target is not None
    try:
        with trio.move_on_after(LIST_TIMEOUT_S):
            async with copy.upstream.client.request("GET", target, []) as response:
                if response.status != 200:
                    return None
                listed = models_in(await response.read(MAX_LIST_BYTES), MAX_LISTED)
                return None if listed is None else tuple(one.model for one in listed)
    except (HttpError, OSError) as error:
        log.debug("model_list_unread", port=copy.upstream.port, reason=str(error))
    return None


def _checked(registration: Registration) -> Registration:
    project, model = registration.project, registration.model
    if not project or not _is_short(project) or "/" in project:
        raise RegistrationRefused(f"project must be 1 to {MAX_TEXT_BYTES} bytes of printable text without /")
    if not model or not _is_short(model) or model != model.strip("/"):  # `org/model` is how many servers name theirs
        raise RegistrationRefused(f"model must be 1 to {MAX_TEXT_BYTES} bytes of printable text, no / at its ends")
    if not _is_short(registration.cid):
        raise RegistrationRefused(f"cid must be at most {MAX_TEXT_BYTES} bytes of printable text")
    if not 0 <= registration.type <= MAX_TYPE:
        raise RegistrationRefused(f"type must be 0 to {MAX_TYPE}")
    if len(registration.paths) > MAX_DECLARED:
        raise RegistrationRefused(f"paths may name {MAX_DECLARED}")
    try:
        for path in registration.paths:
            declared_path(path)
    except ValueError as error:
        raise RegistrationRefused(f"paths: {error}") from None
    return registration


def _is_short(text: str) -> bool:
    return text.isprintable() and len(text.encode()) <= MAX_TEXT_BYTES


def _log_dropped(registration: Registration, reason: str) -> None:
    log.warning("registration_dropped", project=registration.project, model=registration.model, reason=reason)


def _load(path: Path) -> Iterator[Registration]:
    try:
        document = json.loads(path.read_text())
        for entry in document["registrations"]:
            yield Registration(**{**entry, "paths": tuple(entry.get("paths", ()))})
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NodeConfigurationError(
            f"the registrations in {path} cannot be read ({error}): remove the file, model servers register again"
        ) from error
