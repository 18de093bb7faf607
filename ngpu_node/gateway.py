"""Calls of programs on this machine that other nodes are to run: passed on to a bootstrap, under the owner's token.

A node signs no orders, so it cannot have anything run elsewhere by itself. What it can do is be the owner's client: the
calls of the model servers' interface become calls of the same models on the bootstrap's HTTP interface, and the answer
comes back as it is, streamed where it streams. Without `[gateway]` in the configuration nothing leaves the machine.

Errors are in the interface's form, a status and `{"code", "message"}`:

| code | means |
|---|---|
| 1001 | a parameter is wrong, says this node or the bootstrap |
| 1002 | the body is not JSON, or no form |
| 1005 | no answer in time |
| 1007 | the model failed |
| 1017 | nobody can take it: no node has the model, all failed, or the bootstrap is out of reach |
| 1018 | the stream broke |
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog
import trio

from ngpu_node.errors import CallRefused
from ngpu_node.form_fields import FormBroken, form_fields
from ngpu_protocol.http1 import Exchange, LimitError, header

log = structlog.get_logger(__name__)

BAD_PARAMETER = 1001
BAD_JSON = 1002
TOO_LATE = 1005
MODEL_FAILED = 1007
NOBODY = 1017
STREAM_BROKE = 1018

MAX_JSON_BYTES = 32 * 1024 * 1024
MAX_FORM_BYTES = 64 * 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024
MAX_LIST_BYTES = 4 * 1024 * 1024
AT_ONCE = 16
CONNECT_S = 10.0
# The bootstrap has its own limit for a task and answers when that has passed.
ANSWER_S = 900.0
LIST_S = 5.0
LIST_FRESH_S = 5.0

TARGETS: Mapping[str, str] = {
    "/api/v0/chat/completion": "/v1/chat/completions",
    "/api/v0/image/gen": "/v1/images/generations",
    "/api/v0/image/edit": "/v1/images/edits",
}
"""Which call of the bootstrap each of the interface's calls becomes; with `/proxy` behind it, on a node it chooses."""

NODE_HEADER = "Ngpu-Node"
_CODES = {400: BAD_PARAMETER, 413: BAD_PARAMETER, 415: BAD_PARAMETER, 422: BAD_PARAMETER}
_CODES |= {408: TOO_LATE, 504: TOO_LATE, 500: MODEL_FAILED, 502: MODEL_FAILED}
_CODES |= {401: NOBODY, 403: NOBODY, 404: NOBODY, 429: NOBODY, 503: NOBODY}


@dataclass(frozen=True)
class OfferedModel:
    """A model the bootstrap lists."""

    project: str
    model: str


class Gateway:
    """The owner's way to a bootstrap.

    Args:
        url: of the bootstrap's HTTP interface, without a path; None: nothing is passed on.
        token: the owner's workspace token.
    """

    def __init__(self, url: str | None, token: str) -> None:
        self._url = url
        self._token = token
        self._client: Any = None
        self._running = 0
        self._listed: tuple[OfferedModel, ...] = ()
        self._listed_at_s = -LIST_FRESH_S

    async def aclose(self) -> None:
        """Close the kept connections."""
        if self._client is not None:
            await self._client.aclose()

    async def pass_on(self, exchange: Exchange, path: str) -> None:
        """Answer the call *path*, one of `TARGETS` with or without `/proxy`, with what the bootstrap answers.

        Raises:
            CallRefused: nothing was answered yet, and why.
        """
        chosen_here = path.endswith("/proxy")
        target = TARGETS[path.removesuffix("/proxy")]
        if self._running >= AT_ONCE:
            raise CallRefused(429, NOBODY, f"{AT_ONCE} calls are passed on already, the most at once; try again later")
        self._running += 1
        try:
            headers, body = await self._request(exchange, wants_node=not chosen_here)
            async with self._asked("POST", target, headers, body) as response:
                await _answer(exchange, response)
        finally:
            self._running -= 1

    async def models(self) -> tuple[OfferedModel, ...]:
        """Return what the bootstrap lists, a few seconds old at most; nothing where it cannot be asked."""
        now_s = trio.current_time()
        if self._url is None or now_s - self._listed_at_s < LIST_FRESH_S:
            return self._listed
        self._listed_at_s = now_s
        try:
            with trio.fail_after(LIST_S):
                async with self._asked("GET", "/v1/models", {}, b"") as response:
                    self._listed = _models_in(await _read(response, MAX_LIST_BYTES))
        except (CallRefused, trio.TooSlowError) as error:
            log.info("gateway_models_unknown", reason=str(error) or "no answer in time")
            self._listed = ()
        return self._listed

    async def _request(self, exchange: Exchange, *, wants_node: bool) -> tuple[dict[str, str], bytes]:
        """Return the fields and the body of the call to the bootstrap."""
        content_type = (header(exchange.request.headers, b"content-type") or b"application/json").decode("latin-1")
        is_form = content_type.lower().startswith("multipart/form-data")
        limit = MAX_FORM_BYTES if is_form else MAX_JSON_BYTES
        try:
            body = await exchange.receive_all(limit)
        except LimitError:
            raise CallRefused(413, BAD_PARAMETER, f"the body is over {limit} bytes") from None
        if is_form:
            try:
                node = form_fields(content_type, body, ("node_id",)).get("node_id", "")
            except FormBroken as error:
                raise CallRefused(400, BAD_JSON, f"the body is no form: {error}") from None
        else:
            try:
                document = json.loads(body)
            except (ValueError, RecursionError):
                raise CallRefused(400, BAD_JSON, "the body is not JSON") from None
            if not isinstance(document, dict):
                raise CallRefused(400, BAD_JSON, "the body is not a JSON object")
            node = document.pop("node_id", "")
            body = json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")
        headers = {"Content-Type": content_type}
        if wants_node:
            if not isinstance(node, str) or not 1 <= len(node) <= 128 or not node.isalnum():
                raise CallRefused(
                    400, BAD_PARAMETER, "node_id is required: a peer's id, as /api/v0/ai/projects/peers lists them"
                )
            headers[NODE_HEADER] = node
        return headers, body

    @asynccontextmanager
    async def _asked(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> AsyncIterator[Any]:
        """Yield the bootstrap's answer, its body not read yet.

        Raises:
            CallRefused: there is none, or it is an error.
        """
        if self._url is None:
            raise CallRefused(
                503,
                NOBODY,
                "this node passes no calls on: its owner may name a bootstrap and a token under [gateway] in its "
                "configuration",
            )
        # Loaded at the first call: a node that passes nothing on pays nothing for it.
        import httpx

        if self._client is None:
            self._client = httpx.AsyncClient(
                base_url=self._url,
                timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
                limits=httpx.Limits(max_connections=AT_ONCE + 1, max_keepalive_connections=4),
                trust_env=False,
            )
        fields = {**headers, "Authorization": f"Bearer {self._token}"}
        request = self._client.build_request(method, target, headers=fields, content=body)
        try:
            response = await self._client.send(request, stream=True)
        except httpx.TimeoutException:
            raise CallRefused(504, TOO_LATE, f"the bootstrap did not answer within {ANSWER_S:g} s") from None
        except httpx.HTTPError as error:
            log.info("gateway_out_of_reach", url=self._url, reason=str(error) or type(error).__name__)
            raise CallRefused(503, NOBODY, "the bootstrap named under [gateway] does not answer") from None
        try:
            if response.status_code != 200:
                raise _refusal(response.status_code, await _read(response, MAX_ERROR_BYTES))
            yield response
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await response.aclose()


async def _answer(exchange: Exchange, response: Any) -> None:
    """Pass a good answer on, as it comes. A part never looks whole: a stream of events that breaks ends with one that
    says so and without `[DONE]`, anything else is cut."""
    import httpx

    content_type = response.headers.get("content-type", "application/json")
    fields = [(b"content-type", content_type.encode("latin-1", "replace"))]
    if "content-length" in response.headers and "content-encoding" not in response.headers:
        fields.append((b"content-length", response.headers["content-length"].encode("ascii", "replace")))
    if (task_id := response.headers.get("ngpu-task-id")) is not None:
        fields.append((b"ngpu-task-id", task_id.encode("ascii", "replace")))
    await exchange.send_head(200, fields)
    try:
        async for piece in response.aiter_bytes():
            await exchange.send(piece)
    except httpx.HTTPError as error:
        log.info("gateway_stream_broke", reason=str(error) or type(error).__name__)
        if content_type.startswith("text/event-stream"):
            event = {"code": STREAM_BROKE, "message": "the stream from the bootstrap broke"}
            await exchange.send(b"data: " + json.dumps(event).encode() + b"\n\n")
        else:
            await exchange.abort()
            return
    await exchange.end()


async def _read(response: Any, most: int) -> bytes:
    import httpx

    found = b""
    try:
        async for piece in response.aiter_bytes():
            found += piece
            if len(found) > most:
                break
    except httpx.HTTPError:
        pass  # what came will do: it is only words
    return found[:most]


def _refusal(status: int, body: bytes) -> CallRefused:
    """Return an error of the bootstrap's in the words of this interface."""
    message = f"the bootstrap answered {status}"
    try:
        document = json.loads(body)
        words = document.get("message") or document.get("error")
        words = words.get("message") if isinstance(words, dict) else words
        if isinstance(words, str) and words:
            message = words[:1000]
    except (ValueError, RecursionError, AttributeError):
        pass
    if status in (401, 403):
        message = f"the bootstrap does not take the owner's token: {message}"
    return CallRefused(status if status >= 400 else 502, _CODES.get(status, MODEL_FAILED), message)


def _models_in(body: bytes) -> tuple[OfferedModel, ...]:
    """Return the models of a list as `GET /v1/models` has it; what is none is left out."""
    try:
        document = json.loads(body)
        entries = document["data"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return ()
    found = []
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        project = entry.get("project", document.get("project", ""))
        model = entry.get("model", entry.get("id"))
        if isinstance(project, str) and isinstance(model, str) and model:
            found.append(OfferedModel(project, model))
    return tuple(found)
