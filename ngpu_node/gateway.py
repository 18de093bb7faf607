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
from typing import Any

import structlog
import trio

from ngpu_node.errors import CallRefused
from ngpu_node.form_fields import FormBroken, form_fields
from ngpu_node.model_lists import ListedModel, models_in
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
# Bodies that are held at once, all together: `AT_ONCE` of the largest would be a gigabyte.
MAX_HELD_BYTES = 256 * 1024 * 1024
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
        self._held_bytes = 0
        self._listed: tuple[ListedModel, ...] = ()
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
            raise _busy(f"{AT_ONCE} calls are passed on already, the most at once")
        self._running += 1
        held = bytearray()
        try:
            headers, body = await self._request(exchange, held, wants_node=not chosen_here)
            async with self._asked("POST", target, headers, body) as response:
                await _answer(exchange, response)
        finally:
            self._running -= 1
            self._held_bytes -= len(held)

    async def models(self) -> tuple[ListedModel, ...]:
        """Return what the bootstrap lists, a few seconds old at most; nothing where it cannot be asked."""
        now_s = trio.current_time()
        if self._url is None or now_s - self._listed_at_s < LIST_FRESH_S:
            return self._listed
        self._listed_at_s = now_s
        try:
            with trio.fail_after(LIST_S):
                async with self._asked("GET", "/v1/models", {}, b"") as response:
                    self._listed = models_in(await _read(response, MAX_LIST_BYTES)) or ()
        except (CallRefused, trio.TooSlowError) as error:
            log.info("gateway_models_unknown", reason=str(error) or "no answer in time")
            self._listed = ()
        return self._listed

    async def _request(
        self, exchange: Exchange, held: bytearray, *, wants_node: bool
    ) -> tuple[dict[str, str], bytes | bytearray]:
        """Return the fields and the body of the call to the bootstrap; *held* is what counts of it until the end."""
        content_type = (header(exchange.request.headers, b"content-type") or b"application/json").decode("latin-1")
        if not content_type.isascii():
            raise CallRefused(400, BAD_PARAMETER, "the Content-Type is not ASCII")
        is_form = content_type.lower().startswith("multipart/form-data")
        await self._hold(exchange, held, MAX_FORM_BYTES if is_form else MAX_JSON_BYTES)
        body: bytes | bytearray = held
        if is_form:
            try:
                node = form_fields(content_type, bytes(held), ("node_id",)).get("node_id", "")
            except FormBroken as error:
                raise CallRefused(400, BAD_JSON, f"the body is no form: {error}") from None
        else:
            try:
                document = json.loads(held)
            except (ValueError, RecursionError):
                document = None
            if not isinstance(document, dict):
                raise CallRefused(400, BAD_JSON, "the body is not a JSON object")
            node = document.pop("node_id", None)
            if node is not None:  # a word to this node, which a strict model server would refuse
                body = json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")
        headers = {"Content-Type": content_type}
        if wants_node:
            if not isinstance(node, str) or not 1 <= len(node) <= 128 or not (node.isascii() and node.isalnum()):
                raise CallRefused(
                    400, BAD_PARAMETER, "node_id is required: a peer's id, as /api/v0/ai/projects/peers lists them"
                )
            headers[NODE_HEADER] = node
        return headers, body

    async def _hold(self, exchange: Exchange, held: bytearray, limit: int) -> None:
        """Read the body of a call into *held*."""
        exchange.max_body_bytes = limit
        try:
            while data := await exchange.receive():
                held += data
                self._held_bytes += len(data)
                if self._held_bytes > MAX_HELD_BYTES:
                    raise _busy(f"calls with over {MAX_HELD_BYTES} bytes are passed on already, the most at once")
        except LimitError:
            raise CallRefused(413, BAD_PARAMETER, f"the body is over {limit} bytes") from None

    @asynccontextmanager
    async def _asked(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes | bytearray
    ) -> AsyncIterator[Any]:
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
        # as it comes: unpacked here, an answer would be longer than it says, and late
        fields = {**headers, "Authorization": f"Bearer {self._token}", "Accept-Encoding": "identity"}
        request = self._client.build_request(method, target, headers=fields, content=bytes(body))
        try:
            response = await self._client.send(request, stream=True)
        except httpx.TimeoutException:
            raise CallRefused(504, TOO_LATE, f"the bootstrap did not answer within {ANSWER_S:g} s") from None
        except httpx.HTTPError as error:
            log.info("gateway_out_of_reach", url=self._url, reason=str(error) or type(error).__name__)
            raise CallRefused(503, NOBODY, "the bootstrap named under [gateway] does not answer") from None
        try:
            if response.status_code != 200:
                raise _refusal(response, await _read(response, MAX_ERROR_BYTES))
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


def _busy(message: str) -> CallRefused:
    return CallRefused(429, NOBODY, f"{message}; try again later", retry_after="1")


def _refusal(response: Any, body: bytes) -> CallRefused:
    """Return an error of the bootstrap's in the words of this interface."""
    status = response.status_code
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
    retry_after = response.headers.get("retry-after", "")
    return CallRefused(
        status if status >= 400 else 502,
        _CODES.get(status, MODEL_FAILED),
        message,
        retry_after=retry_after if retry_after.isascii() and retry_after.isdigit() else "",
    )
