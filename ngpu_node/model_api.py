"""The calls of programs on this machine, on a loopback port: model servers register, others use the network.

The calls and their shapes are those model servers were written for (`POST /api/v0/ai/model/register` and its
siblings); answers are `{"code": 0, "message": "ok"}`, errors a status and `{"code": 10xx, "message"}`. What looks at
other peers is `peer_calls`, what is run by them goes out through `gateway`.

Whoever can open a loopback connection may register: that is any program on this machine, and by way of a careless
browser any web page. Pages are kept out by three checks: the Host field must name this machine (a rebound DNS name
does not), an Origin field, which browsers add to what a page posts, must too, and what a browser says a page of another
site asked for (`Sec-Fetch-Site`), such as a picture in it, is refused whatever it is. No preflight is granted.

Plain functions on the HTTP server that is here anyway: an ASGI application would cost an idle node 20 MB.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from pydantic import BaseModel, Field, ValidationError

from ngpu_node.errors import CallRefused, StateUnavailable
from ngpu_node.gateway import BAD_JSON, BAD_PARAMETER, TARGETS, Gateway
from ngpu_node.peer_calls import PeerCalls
from ngpu_node.services import ModelServers, Registration, RegistrationRefused
from ngpu_protocol.http1 import Exchange, LimitError, header

MAX_BODY_BYTES = 256 * 1024
LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})

NOT_FOUND = 1003
NOT_WRITTEN = 1004

Short = Annotated[str, Field(max_length=2048)]
B = TypeVar("B", bound=BaseModel)


class _Model(BaseModel):
    model: Short
    api: Short = ""
    type: int = 0
    cid: Short = ""
    paths: list[Short] = Field(default_factory=list, max_length=256)

    def registration(self, project: str) -> Registration:
        return Registration(project, self.model, self.api, self.type, self.cid, tuple(self.paths))


class _Register(_Model):
    project: Short


class _Unregister(BaseModel):
    project: Short
    model: Short
    cid: Short = ""


class _Project(BaseModel):
    project: Short
    models: list[_Model] = Field(default_factory=list, max_length=256)


class _Peer(BaseModel):
    node_id: Annotated[str, Field(min_length=1, max_length=128)]


class ModelApi:
    """The handler of the loopback port."""

    def __init__(
        self, servers: ModelServers, identity: Callable[[], dict[str, Any]], peers: PeerCalls, gateway: Gateway
    ) -> None:
        """Answer from *servers*, *peers* and *gateway*; *identity* returns what `GET /api/v0/id` says."""
        self._servers = servers
        self._identity = identity
        self._peers = peers
        self._gateway = gateway
        self._calls: dict[tuple[str, str], Callable[[Exchange], Awaitable[Any]]] = {
            ("POST", "/api/v0/ai/model/register"): self._register,
            ("POST", "/api/v0/ai/model/unregister"): self._unregister,
            ("POST", "/api/v0/ai/project/register"): self._register_project,
            ("POST", "/api/v0/ai/project/unregister"): self._unregister_project,
            ("GET", "/api/v0/ai/projects/list"): self._projects,
            ("GET", "/api/v0/ai/projects/models"): self._models,
            ("GET", "/api/v0/ai/projects/peers"): self._peers_of,
            ("POST", "/api/v0/ai/project/peer"): self._models_of,
            ("GET", "/api/v0/id"): self._id,
            ("GET", "/api/v0/peers"): self._known_peers,
            ("GET", "/api/v0/swarm/peers"): self._connected_peers,
            ("POST", "/api/v0/peer"): self._peer,
            ("POST", "/api/v0/host/info"): self._host_info,
        }
        self._passed_on = {path + end for path in TARGETS for end in ("", "/proxy")}

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request (an `http1` handler)."""
        try:
            check_local(exchange)
            path = exchange.request.target.partition("?")[0]
            if exchange.request.method == "POST" and path in self._passed_on:
                await self._gateway.pass_on(exchange, path)
                return
            call = self._calls.get((exchange.request.method, path))
            if call is None:
                raise CallRefused(404, NOT_FOUND, f"no such call: {exchange.request.method} {path[:200]}")
            answer = await call(exchange)
        except CallRefused as refused:
            fields = [(b"retry-after", refused.retry_after.encode("ascii"))] if refused.retry_after else []
            await exchange.respond_json(refused.status, {"code": refused.code, "message": str(refused)}, fields)
            return
        except RegistrationRefused as refused:
            await exchange.respond_json(400, {"code": BAD_PARAMETER, "message": str(refused)})
            return
        except StateUnavailable as error:
            await exchange.respond_json(503, {"code": NOT_WRITTEN, "message": str(error)})
            return
        await exchange.respond_json(200, {"code": 0, "message": "ok"} if answer is None else answer)

    async def _register(self, exchange: Exchange) -> None:
        body = await _body(exchange, _Register)
        await self._servers.register(body.registration(body.project))

    async def _unregister(self, exchange: Exchange) -> None:
        body = await _body(exchange, _Unregister)
        if not self._servers.unregister(body.project, body.model, body.cid or None):
            raise CallRefused(404, NOT_FOUND, f"{body.project}/{body.model} is not registered here")

    async def _register_project(self, exchange: Exchange) -> None:
        body = await _body(exchange, _Project)
        if not body.models:
            raise CallRefused(400, BAD_PARAMETER, "models must name at least one model")
        await self._servers.register(*(one.registration(body.project) for one in body.models))

    async def _unregister_project(self, exchange: Exchange) -> None:
        body = await _body(exchange, _Project)
        if not self._servers.unregister(body.project):
            raise CallRefused(404, NOT_FOUND, f"{body.project} is not registered here")

    async def _projects(self, exchange: Exchange) -> Any:
        here = {copy.registration.project for copy in self._servers.copies()}
        there = {offered.project for offered in await self._gateway.models()}
        return {"data": sorted((here | there) - {""})[: _number(exchange)]}

    async def _models(self, exchange: Exchange) -> Any:
        project = _required(exchange, "project")
        here = {c.registration.model for c in self._servers.copies() if c.registration.project == project}
        there = {offered.model for offered in await self._gateway.models() if offered.project == project}
        return {"data": sorted(here | there)[: _number(exchange)]}

    async def _peers_of(self, exchange: Exchange) -> Any:
        project, model = _required(exchange, "project"), _required(exchange, "model")
        return await self._peers.peers_of(project, model, _number(exchange))

    async def _models_of(self, exchange: Exchange) -> Any:
        return await self._peers.models_of((await _body(exchange, _Peer)).node_id)

    async def _known_peers(self, exchange: Exchange) -> Any:
        return self._peers.known()

    async def _connected_peers(self, exchange: Exchange) -> Any:
        return self._peers.connected()

    async def _peer(self, exchange: Exchange) -> Any:
        return await self._peers.peer((await _body(exchange, _Peer)).node_id)

    async def _host_info(self, exchange: Exchange) -> Any:
        return await self._peers.host_info((await _body(exchange, _Peer)).node_id)

    async def _id(self, exchange: Exchange) -> Any:
        return self._identity()


def check_local(exchange: Exchange) -> None:
    """Refuse a request that a web page, by a rebound name or across origins, had a browser make."""
    host = (header(exchange.request.headers, b"host") or b"").decode("latin-1")
    if _without_port(host).lower() not in LOOPBACK_NAMES:
        raise CallRefused(403, BAD_PARAMETER, "the Host field must be 127.0.0.1, localhost or [::1]")
    origin = header(exchange.request.headers, b"origin")
    if origin is not None:
        try:
            origin_host = urlsplit(origin.decode("latin-1")).netloc
        except ValueError:
            origin_host = ""
        if _without_port(origin_host).lower() not in LOOPBACK_NAMES:
            raise CallRefused(403, BAD_PARAMETER, "calls from web pages are refused")
    if header(exchange.request.headers, b"sec-fetch-site") in (b"cross-site", b"same-site"):
        raise CallRefused(403, BAD_PARAMETER, "calls from web pages are refused")


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


async def _body(exchange: Exchange, kind: type[B]) -> B:
    try:
        raw = await exchange.receive_all(MAX_BODY_BYTES)
    except LimitError:
        raise CallRefused(413, BAD_PARAMETER, f"the body is over {MAX_BODY_BYTES} bytes") from None
    try:
        return kind.model_validate(json.loads(raw))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors()[:5])
        raise CallRefused(400, BAD_PARAMETER, problems) from None
    except (ValueError, RecursionError):
        raise CallRefused(400, BAD_JSON, "the body is not JSON") from None


def _query(exchange: Exchange, name: str) -> str:
    values = parse_qs(exchange.request.target.partition("?")[2], max_num_fields=20).get(name)
    return values[0] if values else ""


def _required(exchange: Exchange, name: str) -> str:
    value = _query(exchange, name)
    if not 1 <= len(value) <= 256:
        raise CallRefused(400, BAD_PARAMETER, f"{name} is required, at most 256 characters")
    return value


def _number(exchange: Exchange) -> int:
    text = _query(exchange, "number")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 7 and int(text) else 100
