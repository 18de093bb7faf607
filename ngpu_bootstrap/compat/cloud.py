"""The cloud calls of existing NGPU clients: accounts, images, products, groups and workspaces at `/ngpu/api/v1/...`.

Answers are `{"result": ...}` with HTTP 200; errors have their status, `result_code` and `msg`. Every call but login
needs its session in the header `Token`. A workspace made here is one like any other: `workspace_id` of its making is
its token, which is shown this once; lists show the public id. The query of an image's URL often is a signature that
opens the file: it is kept sealed, as a workspace's is.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import trio
from pydantic import ValidationError

from ngpu_bootstrap.compat import passwords, rows
from ngpu_bootstrap.compat.forms import fields_of, flag_field, number_field, text_field
from ngpu_bootstrap.credentials import parse_token, reveal
from ngpu_bootstrap.errors import BadRequest, NotServed, Refusal, Unauthorized
from ngpu_bootstrap.front.answers import Answer, json_answer
from ngpu_bootstrap.front.guards import FailedTries, too_many_tries
from ngpu_bootstrap.registry.confided import Confided
from ngpu_bootstrap.registry.deployments import DeploymentTable
from ngpu_bootstrap.registry.workspaces import NewWorkspace, Workspace, Workspaces
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.docker_run import DockerRunError, parse_docker_run
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.gpu_models import canonical_gpu_model
from ngpu_protocol.http1 import Headers, header
from ngpu_protocol.workspace_secrets import WorkspaceSecrets, with_query
from ngpu_protocol.workspaces import describe_errors

BASE = "/ngpu/api/v1"
DISTRIBUTED, ON_ITS_WAY = 4, 1
_UNIT_S = {"hr": 3600, "hour": 3600, "day": 86_400, "week": 7 * 86_400, "month": 30 * 86_400}
_IMAGE_TEXTS = (
    "image_name",
    "type",
    "wget_url",
    "note",
    "action",
    "start_cmd",
    "stop_cmd",
    "port_mapping",
    "exception",
    "docker_image_id",
    "file_size",
    "file_path",
)
# What one user may have, so that no account fills the database.
MAX_OWNED = 1000
# Workspaces whose ports are kept at hand.
MAX_PUBLISHED = 10_000
# Passwords checked at once, and waiting for it.
_CHECKS, _WAITING = 2, 32

ReadBody = Callable[[int], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class CloudRequest:
    """A request under `BASE`. *client* is the address it comes from."""

    method: str
    path: str
    query: str | None
    headers: Headers = field(repr=False)
    client: str


class Cloud:
    """Answers the cloud calls.

    Args:
        failed_tries: whose passwords were wrong too often.
        session_s: how long a login lasts.
    """

    def __init__(
        self,
        *,
        store: Store,
        workspaces: Workspaces,
        deployments: DeploymentTable,
        confided: Confided,
        failed_tries: FailedTries,
        session_s: float,
        now_ms: Callable[[], int],
    ) -> None:
        self._store = store
        self._workspaces = workspaces
        self._deployments = deployments
        self._confided = confided
        self._failed_tries = failed_tries
        self._session_s = session_s
        self._now_ms = now_ms
        self._checks = trio.CapacityLimiter(_CHECKS)
        # the ports a workspace's containers were to publish, by workspace: clients call by these
        self._published: dict[str, Mapping[str, int]] = {}
        self._calls: dict[str, tuple[str, Callable[[rows.User, Mapping[str, Any]], Awaitable[Any]]]] = {
            "/cloud/image/list": ("GET", self._image_list),
            "/cloud/image/create": ("POST", self._image_create),
            "/cloud/product/list": ("GET", self._product_list),
            "/cloud/workspace/create": ("POST", self._workspace_create),
            "/cloud/workspace/list": ("GET", self._workspace_list),
            "/cloud/workspace/group/create": ("POST", self._group_create),
            "/cloud/workspace/group/selector": ("GET", self._group_selector),
        }

    async def port_of(self, workspace: str, port: str) -> str:
        """Return the workspace's own port for one that its `docker run` line published it on, else *port* itself.

        Looked up once for each workspace: it is written before anybody has the workspace's token, here or at a
        sibling, and never changes.
        """
        published = self._published.get(workspace)
        if published is None:
            published = await self._store.look_up(lambda connection: rows.published(connection, workspace))
            if len(self._published) >= MAX_PUBLISHED:
                self._published.clear()
            self._published[workspace] = published
        return str(published.get(port, port))

    async def answer(self, request: CloudRequest, read_body: ReadBody, limit: int) -> Answer:
        """Return the answer to a call.

        Raises:
            Refusal: what is wrong with it, or why it cannot be served.
        """
        path = request.path.removeprefix(BASE).rstrip("/")
        fields = fields_of(request.query, header(request.headers, b"content-type"), await read_body(limit))
        if path == "/user/login":
            _require_method(request, "POST")
            return _result(await self._login(fields, request.client))
        user = await self._user(request)
        deleted = path.removeprefix("/cloud/workspace/delete/")
        if deleted != path:
            _require_method(request, "GET", "DELETE")
            return _result(await self._workspace_delete(user, deleted))
        found = self._calls.get(path)
        if found is None:
            raise Refusal(404, "not_found", "nothing is served at this path; docs/api.md lists the cloud calls")
        method, call = found
        _require_method(request, method)
        return _result(await call(user, fields))

    # -- accounts

    async def _login(self, fields: Mapping[str, Any], client: str) -> Any:
        email = text_field(fields, "email", most=320, required=True)
        sent = text_field(fields, "password", most=128, required=True)
        if self._checks.statistics().tasks_waiting >= _WAITING:
            raise NotServed(503, "busy", "too many people log in at this moment; try again", retry_after_s=2)
        wait_s = self._failed_tries.take(client, time.monotonic())
        if wait_s:  # before the password is looked at: one that people think of can be guessed
            raise too_many_tries(wait_s)
        try:
            user = await self._store.look_up(lambda connection: rows.user_by_email(connection, email))
            stored = user.password if user is not None else None
            right = await trio.to_thread.run_sync(passwords.verify, stored, sent, limiter=self._checks)
        finally:
            self._failed_tries.give_back(client)  # one that was wrong is counted where it is refused
        if not right or user is None:
            raise Unauthorized("login_failed", "e-mail address or password is wrong")
        token = secrets.token_hex(32)
        now_ms = self._now_ms()
        expires_at_ms = now_ms + int(self._session_s * 1000)
        await self._store.chore(
            lambda connection: rows.begin_session(connection, _session_hash(token), user.id, now_ms, expires_at_ms)
        )
        return {"token": token}

    async def _user(self, request: CloudRequest) -> rows.User:
        token = (header(request.headers, b"token") or b"").decode("latin-1").strip()
        if not token:
            raise Unauthorized("token_missing", f"send the header Token with what POST {BASE}/user/login answered")
        hash, now_ms = _session_hash(token), self._now_ms()
        user = await self._store.look_up(lambda connection: rows.session_user(connection, hash, now_ms))
        if user is None:
            raise Unauthorized("token_unknown", "this login is unknown or has ended; log in again")
        return user

    # -- images, products, groups

    async def _image_list(self, user: rows.User, fields: Mapping[str, Any]) -> Any:
        images = await self._store.look_up(lambda connection: rows.images(connection, user.id))
        return [_image_view(image) for image in images]

    async def _image_create(self, user: rows.User, fields: Mapping[str, Any]) -> Any:
        document: dict[str, Any] = {name: text_field(fields, name, most=65_536) for name in _IMAGE_TEXTS}
        _specified(document)  # what cannot run is refused now, not when a workspace is made of it
        now_ms = self._now_ms()
        have = await self._store.look_up(lambda connection: rows.images(connection, user.id))
        _require_room(have, "images")
        document["wget_url"], _, query = document["wget_url"].strip().partition("?")
        if query:
            name = f"cloud image {secrets.token_hex(8)}"
            boxes = await self._confided.at_rest(WorkspaceSecrets(image_query=query), name, 0)
            document["wget_query"] = {"name": name, "boxes": {reader: box.hex() for reader, box in boxes.items()}}
        number = await self._store.chore(lambda connection: rows.add_image(connection, user.id, document, now_ms))
        return {"image_id": number}

    async def _product_list(self, user: rows.User, fields: Mapping[str, Any]) -> Any:
        return [{"id": number, **document} for number, document in await self._store.look_up(rows.products)]

    async def _group_create(self, user: rows.User, fields: Mapping[str, Any]) -> Any:
        name = text_field(fields, "workspace_group_name", most=64, required=True)
        _require_room(await self._store.look_up(lambda connection: rows.groups(connection, user.id)), "groups")
        now_ms = self._now_ms()
        number = await self._store.chore(lambda connection: rows.add_group(connection, user.id, name, now_ms))
        return {"workspace_group_id": number}

    async def _group_selector(self, user: rows.User, fields: Mapping[str, Any]) -> Any:
        groups = await self._store.look_up(lambda connection: rows.groups(connection, user.id))
        return [{"id": group.id, **group.document} for group in groups]

    # -- workspaces

    async def _workspace_create(self, user: rows.User, fields: Mapping[str, Any]) -> Any:
        image_id = number_field(fields, "image_id", least=1, most=2**53)
        images = await self._store.look_up(lambda connection: rows.images(connection, user.id))
        image = next((one for one in images if one.id == image_id), None)
        if image is None:
            raise Refusal(404, "image_unknown", f"you have no image {image_id}; /cloud/image/list shows those you have")
        product_id = number_field(fields, "product_id", least=1, most=2**53)
        products = dict(await self._store.look_up(rows.products))
        if product_id not in products:
            raise Refusal(404, "product_unknown", f"there is no product {product_id}; /cloud/product/list shows them")
        group = ""
        if flag_field(fields, "is_group"):
            group_id = number_field(fields, "workspace_group_id", least=1, most=2**53)
            groups = await self._store.look_up(lambda connection: rows.groups(connection, user.id))
            group = next((str(one.document["workspace_group_name"]) for one in groups if one.id == group_id), "")
            if not group:
                raise Refusal(404, "group_unknown", f"you have no group {group_id}")
        _require_room(await self._store.look_up(lambda connection: rows.workspaces(connection, user.id)), "workspaces")
        now_ms = self._now_ms()
        spec, published = _specified(self._whole(image.document))
        spec |= {
            "name": text_field(fields, "workspace_name", most=128, required=True),
            "owner": user.email[:128],
            "replicas": number_field(fields, "num", least=1, most=10_000, default=1),
            "area": text_field(fields, "area", most=64),
            "group": group,
            "egress": flag_field(fields, "public_net"),
        }
        if (lasts_s := _duration_s(fields)) is not None:
            spec["end_at"] = now_ms + lasts_s * 1000
        spec = _on_product(spec, products[product_id])
        try:
            new = NewWorkspace.model_validate(spec)
        except ValidationError as error:
            raise BadRequest("bad_workspace", f"this cannot be a workspace: {describe_errors(error)}") from None
        workspace, token = await self._workspaces.add(new)
        document = {"image_id": image_id, "product_id": product_id, "published": published}
        await self._store.chore(
            lambda connection: rows.add_workspace(connection, user.id, workspace.id, document, now_ms)
        )
        self._published[workspace.id] = published
        return {"workspace_id": reveal(token)}

    def _whole(self, image: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return an image's document with the query of its URL.

        Raises:
            Refusal: 409, it is sealed to a key that was replaced, or to other bootstraps of the database.
        """
        kept = image.get("wget_query")
        if kept is None:
            return image
        boxes = {reader: bytes.fromhex(box) for reader, box in kept["boxes"].items()}
        try:
            confided = self._confided.opened(boxes, kept["name"], 0)
        except MalformedError as error:
            raise Refusal(409, "secrets_unreadable", f"the query of wget_url: {error}; make the image anew") from None
        return {**image, "wget_url": with_query(str(image["wget_url"]), confided)}

    async def _workspace_list(self, user: rows.User, fields: Mapping[str, Any]) -> Any:
        wanted = _public_id(text_field(fields, "id", most=512))
        owned = await self._store.look_up(lambda connection: rows.workspaces(connection, user.id))
        found = [self._workspaces.get(one.id) for one in owned if wanted in ("", one.id)]
        return [await self._view(workspace) for workspace in found if workspace is not None]

    async def _workspace_delete(self, user: rows.User, text: str) -> Any:
        wanted = _public_id(text)
        owned = await self._store.look_up(lambda connection: rows.workspaces(connection, user.id))
        workspace = self._workspaces.get(wanted)
        if workspace is None or wanted not in {one.id for one in owned}:
            raise Refusal(404, "workspace_unknown", "you have no workspace of this id")
        view = await self._view(workspace)
        await self._workspaces.remove(wanted)
        await self._store.chore(lambda connection: rows.forget_workspace(connection, wanted))
        self._published.pop(wanted, None)
        return view

    async def _view(self, workspace: Workspace) -> dict[str, Any]:
        found = await self._deployments.deployed(workspace)
        ready = [one for one in found if one.state == "ready"]
        return {
            "id": workspace.id,
            "workspace_name": workspace.spec.name,
            "docker_state": DISTRIBUTED if ready else ON_ITS_WAY,
            "node_list": [{"nodeAddr": one.node, "rStatus": int(one.state == "ready")} for one in found],
        }


def _image_view(image: rows.Owned) -> dict[str, Any]:
    document = {name: image.document.get(name, "") for name in _IMAGE_TEXTS if name not in ("type", "wget_url")}
    created = datetime.fromtimestamp(image.created_at_ms / 1000, UTC)
    return {"id": image.id, **document, "created_at": f"{created:%Y-%m-%d %H:%M:%S}", "is_system": False}


def _specified(image: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the fields of a specification that an image's document means, and its published ports: outer to inner.

    Raises:
        BadRequest: it cannot run; the message names the flag or field.
    """
    fields: dict[str, Any] = {}
    published: dict[str, int] = {}
    start = str(image.get("start_cmd", "")).strip()
    if start:
        try:
            line = parse_docker_run(start)
        except DockerRunError as error:
            raise BadRequest("bad_start_cmd", f"start_cmd: {error}") from None
        fields |= line.fields
        published = {str(outer): inner for inner, outer in line.published.items()}
    for pair in filter(None, str(image.get("port_mapping", "")).replace(" ", "").split(",")):
        outer, separator, inner = pair.partition(":")
        inner = inner if separator else outer
        if not (_is_port(outer) and _is_port(inner)):
            raise BadRequest("bad_port_mapping", "port_mapping must be OUTER:INNER pairs, as in 8080:80,8081:81")
        published[outer] = int(inner)
        if int(inner) not in fields.setdefault("ports", []):
            fields["ports"] = [*fields["ports"], int(inner)]
    if url := str(image.get("wget_url", "")).strip():
        fields.pop("image", None)
        fields["image_url"] = url
    if not fields.get("image") and not url:
        raise BadRequest("image_missing", "give start_cmd, a docker run line with an image, or wget_url, a saved image")
    if not fields.get("ports"):
        raise BadRequest("ports_missing", "say which ports the image listens on: port_mapping, or -p in start_cmd")
    probe = {name: value for name, value in fields.items() if value is not None}
    try:
        NewWorkspace.model_validate({"name": "probe", **probe})
    except ValidationError as error:
        raise BadRequest("bad_image", f"this image cannot run: {describe_errors(error)}") from None
    return probe, published


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536


def _on_product(spec: dict[str, Any], product: Mapping[str, Any]) -> dict[str, Any]:
    """Return the specification with what a product gives: a GPU of its model, unless the image asks for some itself."""
    model = str(product.get("gpu_model") or product.get("gpu_name") or product.get("gpu_type") or "").strip()
    if not model:
        return spec
    return {"gpu_count": 1, **spec, "gpu_types": spec.get("gpu_types") or [canonical_gpu_model(model)]}


def _duration_s(fields: Mapping[str, Any]) -> int | None:
    """Return how long a workspace lives; None: until it is removed."""
    if not text_field(fields, "duration", most=20).strip():
        return None
    count = number_field(fields, "duration", least=1, most=10_000)
    unit = text_field(fields, "duration_unit", most=20).strip().lower().removesuffix("s") or "hr"
    unit = {"h": "hr"}.get(unit, unit)
    if unit not in _UNIT_S:
        raise BadRequest("bad_field", "duration_unit must be hr, day, week or month")
    return math.ceil(count * _UNIT_S[unit])


def _public_id(text: str) -> str:
    """Return the public id in *text*, which is one, or the token of the workspace."""
    text = text.strip()
    token = parse_token(text)
    return token.subject if token is not None else text[:64]


def _session_hash(token: str) -> bytes:
    return hashlib.sha256(b"ngpu cloud session\0" + token.encode("utf-8", "replace")).digest()


def _require_method(request: CloudRequest, *methods: str) -> None:
    if request.method not in methods:
        allowed = ", ".join(methods)
        raise Refusal(405, "method_not_allowed", f"this path takes {allowed}", headers={"Allow": allowed})


def _require_room(have: list[rows.Owned], what: str) -> None:
    if len(have) >= MAX_OWNED:
        raise Refusal(409, "too_many", f"you have {len(have)} {what}, the most one account may have; remove some")


def _result(value: Any) -> Answer:
    return json_answer(200, {"result": value})
