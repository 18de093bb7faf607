"""What each path answers: the model's OpenAI-style interface, and a few plain endpoints that tests and benchmarks use.

- ``POST /v1/chat/completions``: ``messages``, ``model``, ``max_tokens``, ``temperature``, ``seed``, ``stream``
- ``POST /nlp/v1/chat/completions``: the same model as a vendor's clients call it (`vendor`)
- ``GET /v1/models``: ``ngram`` (trained) and ``fixed`` (a constant answer at once, for benchmarks)
- ``GET /ws``: WebSocket chat: a text message in, ``{"delta": …}`` messages out, then ``{"done": true, …}``
- ``GET /health``, ``GET /``: ``{"status": "ok"}``
- ``ANY /echo``: the request's body, as it arrives, under its own content type
- ``GET /bytes?n=``: *n* bytes, 0 to 255 repeated; with ``&chunked=1`` without a length
- ``POST /sum``: the body's SHA-256 and length
- ``GET /headers``: the request as it arrived: method, target, headers
- ``GET /events?n=&every_ms=``: *n* server-sent events, one each *every_ms*
"""

import asyncio
import hashlib
import json
import random
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from . import vendor, websocket
from .http_server import BodySink, Connection, Request
from .model import NgramModel

JSON = "application/json"
SSE = "text/event-stream"
MODELS = ("ngram", "fixed")
FIXED_ANSWER = ("Hello", " from", " a", " workspace", ".")
MAX_TOKENS = 2048
_MAX_JSON_BYTES = 1024 * 1024
_BLOCK = bytes(range(256)) * 256  # 64 KiB; position modulo 256 is the value, so any range can be checked


class InvalidField(ValueError):
    """A field of a request that cannot be used; *name* is its name."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class ChatApp:
    """The application behind every connection.

    Args:
        model: what answers under the name ``ngram``.
        token_delay_s: how long one token takes; 0 answers as fast as it can.
    """

    def __init__(self, model: NgramModel, *, token_delay_s: float) -> None:
        self._model = model
        self._token_delay_s = token_delay_s
        self._whole: dict[str, tuple[str, Callable[[Connection, Request, bytes], None]]] = {
            "/v1/chat/completions": ("POST", self._chat_completions),
            "/nlp/v1/chat/completions": ("POST", self._vendor_chat),
            "/v1/models": ("GET", self._models),
            "/health": ("GET", self._health),
            "/": ("GET", self._health),
            "/bytes": ("GET", self._bytes),
            "/headers": ("GET", self._headers),
            "/events": ("GET", self._events),
            "/ws": ("GET", self._websocket),
        }

    def open_sink(self, connection: Connection, request: Request) -> BodySink:
        """Return what takes this request's body and answers it."""
        if request.path == "/echo":
            return _Echo(connection, request)
        if request.path == "/sum":
            return _Sum(connection)
        method, handler = self._whole.get(request.path, ("", _not_found))
        allowed = request.method == method or (method == "GET" and request.method == "HEAD")
        return _Whole(connection, request, handler if allowed or not method else _method_not_allowed)

    # --- the model ----------------------------------------------------------------------------------------------

    def _chat_completions(self, connection: Connection, request: Request, body: bytes) -> None:
        try:
            call = _ChatCall(json.loads(body))
        except InvalidField as error:
            _respond_error(connection, 400, str(error), error.name)
            return
        except ValueError:
            _respond_error(connection, 400, "the body is not JSON", None)
            return
        pieces, delay_s = self._answer(call)
        if call.stream:
            connection.start_answer(200, SSE, length=None)
            connection.run(_stream_completion(connection, call, pieces, delay_s))
        elif delay_s == 0:
            connection.respond(200, _completion(call, pieces), JSON)
        else:
            connection.run(_late_answer(connection, _completion(call, pieces), len(pieces) * delay_s))

    def _vendor_chat(self, connection: Connection, request: Request, body: bytes) -> None:
        try:
            call = vendor.ChatCall(json.loads(body))
        except ValueError as error:
            reason = str(error) if isinstance(error, vendor.InvalidField) else "the body is not JSON"
            connection.respond(400, _dump(vendor.refusal(400, reason)), JSON)
            return
        rng = random.Random(secrets.randbits(64))
        pieces = list(
            self._model.pieces(call.prompt, max_pieces=call.max_pieces, temperature=call.temperature, rng=rng)
        )
        if call.stream:
            connection.start_answer(200, SSE, length=None)
            connection.run(_stream_vendor(connection, call, pieces, self._token_delay_s))
        else:
            connection.run(_late_answer(connection, _dump(call.answer(pieces)), len(pieces) * self._token_delay_s))

    def _answer(self, call: "_ChatCall") -> tuple[list[str], float]:
        """Return the answer's pieces and the seconds each takes."""
        if call.model == "fixed":
            return list(FIXED_ANSWER[: call.max_tokens]), 0.0
        rng = random.Random(call.seed if call.seed is not None else secrets.randbits(64))
        pieces = self._model.pieces(call.prompt, max_pieces=call.max_tokens, temperature=call.temperature, rng=rng)
        return list(pieces), self._token_delay_s

    def _models(self, connection: Connection, request: Request, body: bytes) -> None:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "ngpu-examples"} for name in MODELS]
        connection.respond(200, _dump({"object": "list", "data": data}), JSON)

    def _websocket(self, connection: Connection, request: Request, body: bytes) -> None:
        key = request.headers.get("sec-websocket-key")
        wants = request.headers.get("upgrade", "").lower() == "websocket"
        if not wants or not key or request.headers.get("sec-websocket-version") != "13":
            connection.respond(426, b"this path speaks WebSocket 13", "text/plain", "Upgrade: websocket\r\n")
            return
        accept = websocket.accept_value(key)
        lines = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n"
        connection.upgrade(lines, _WebSocketChat(connection, self._answer))

    # --- plain endpoints ----------------------------------------------------------------------------------------

    def _health(self, connection: Connection, request: Request, body: bytes) -> None:
        connection.respond(200, b'{"status":"ok"}', JSON)

    def _headers(self, connection: Connection, request: Request, body: bytes) -> None:
        document = {"method": request.method, "target": request.target, "headers": request.headers}
        connection.respond(200, _dump(document), JSON)

    def _bytes(self, connection: Connection, request: Request, body: bytes) -> None:
        count = request.query.get("n", "")
        if not (count.isascii() and count.isdigit()) or len(count) > 12:
            _respond_error(connection, 400, "n must be the number of bytes wanted, as in /bytes?n=1024", "n")
            return
        total = int(count)
        length = None if request.query.get("chunked") == "1" else total
        connection.start_answer(200, "application/octet-stream", length=length)
        if request.method == "HEAD":
            connection.finish()
        else:
            connection.run(_write_bytes(connection, total))

    def _events(self, connection: Connection, request: Request, body: bytes) -> None:
        try:
            count, every_s = int(request.query.get("n", "10")), int(request.query.get("every_ms", "100")) / 1000
        except ValueError:
            _respond_error(connection, 400, "n and every_ms must be whole numbers", "n")
            return
        connection.start_answer(200, SSE, length=None)
        connection.run(_write_events(connection, count, every_s))


class _ChatCall:
    """The fields of a chat completion request that mean something here, checked."""

    def __init__(self, document: Any) -> None:
        if not isinstance(document, dict):
            raise InvalidField("", "the body must be a JSON object")
        self.model = document.get("model", "ngram")
        if self.model not in MODELS:
            raise InvalidField("model", f"no model {self.model!r}; there are: {', '.join(MODELS)}")
        messages = document.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(entry, dict) for entry in messages):
            raise InvalidField("messages", "messages must be a list of at least one object with role and content")
        self.prompt = _text_of(messages[-1].get("content"))
        self.prompt_tokens = sum(len(_text_of(entry.get("content")).split()) for entry in messages)
        wanted = document.get("max_completion_tokens", document.get("max_tokens"))
        self.max_tokens = 64 if wanted is None else wanted
        if not isinstance(self.max_tokens, int) or not 1 <= self.max_tokens <= MAX_TOKENS:
            raise InvalidField("max_tokens", f"max_tokens must be a whole number from 1 to {MAX_TOKENS}")
        temperature = document.get("temperature")
        self.temperature = 1.0 if temperature is None else temperature
        if not isinstance(self.temperature, int | float) or not 0 <= self.temperature <= 2:
            raise InvalidField("temperature", "temperature must be a number from 0 to 2")
        self.seed = document.get("seed")
        if self.seed is not None and not isinstance(self.seed, int):
            raise InvalidField("seed", "seed must be a whole number")
        self.stream = document.get("stream") is True
        self.answer_id = "chatcmpl-" + secrets.token_hex(12)
        self.created = int(time.time())


class _Whole:
    """Collects a small body, then hands it to a handler."""

    def __init__(
        self, connection: Connection, request: Request, handler: Callable[[Connection, Request, bytes], None]
    ) -> None:
        self._connection, self._request, self._handler = connection, request, handler
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= _MAX_JSON_BYTES:
            self._parts.append(data)

    def end(self) -> None:
        if self._size > _MAX_JSON_BYTES:
            _respond_error(self._connection, 413, "the body is larger than 1 MiB", None)
        else:
            self._handler(self._connection, self._request, b"".join(self._parts))


class _Echo:
    """Sends the body back as it arrives."""

    def __init__(self, connection: Connection, request: Request) -> None:
        self._connection = connection
        content_type = request.headers.get("content-type", "application/octet-stream")
        chunked = "transfer-encoding" in request.headers
        length = None if chunked else int(request.headers.get("content-length", "0"))
        connection.start_answer(200, content_type, length=length)

    def feed(self, data: bytes) -> None:
        self._connection.write(data)

    def end(self) -> None:
        self._connection.finish()


class _Sum:
    """Hashes the body without keeping it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._hash = hashlib.sha256()
        self._size = 0

    def feed(self, data: bytes) -> None:
        self._hash.update(data)
        self._size += len(data)

    def end(self) -> None:
        self._connection.respond(200, _dump({"sha256": self._hash.hexdigest(), "bytes": self._size}), JSON)


class _WebSocketChat:
    """One WebSocket: every text message is a prompt, or a JSON object with chat completion fields and ``prompt``."""

    def __init__(self, connection: Connection, answer: Callable[[_ChatCall], tuple[list[str], float]]) -> None:
        self._connection = connection
        self._answer = answer
        self._reader = websocket.FrameReader()
        self._prompts: asyncio.Queue[str] = asyncio.Queue(maxsize=64)
        self._task = asyncio.get_running_loop().create_task(self._talk())

    def feed(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                self._take(message)
        except (websocket.WebSocketError, UnicodeDecodeError) as error:
            code = error.code if isinstance(error, websocket.WebSocketError) else 1007
            self._end(code, str(error))
        except asyncio.QueueFull:
            self._end(1008, "too many prompts before their answers")

    def lost(self) -> None:
        self._task.cancel()

    def _take(self, message: websocket.Message) -> None:
        if message.opcode == websocket.PING:
            self._connection.write_raw(websocket.frame(websocket.PONG, message.payload))
        elif message.opcode == websocket.CLOSE:
            self._connection.write_raw(websocket.frame(websocket.CLOSE, message.payload[:2]))
            self._task.cancel()
            self._connection.close()
        elif message.opcode == websocket.TEXT:
            self._prompts.put_nowait(message.payload.decode("utf-8"))
        elif message.opcode == websocket.BINARY:
            self._connection.write_raw(websocket.frame(websocket.BINARY, message.payload))

    def _end(self, code: int, reason: str) -> None:
        self._connection.write_raw(websocket.close_frame(code, reason))
        self._task.cancel()
        self._connection.close()

    async def _talk(self) -> None:
        while True:
            prompt = await self._prompts.get()
            try:
                call = _ChatCall(_websocket_fields(prompt))
            except InvalidField as error:
                self._send({"error": str(error)})
                continue
            pieces, delay_s = self._answer(call)
            for piece in pieces:
                await asyncio.sleep(delay_s)
                self._send({"delta": piece})
                await self._connection.drain()
            self._send({"done": True, "tokens": len(pieces)})

    def _send(self, document: dict[str, Any]) -> None:
        self._connection.write_raw(websocket.frame(websocket.TEXT, _dump(document)))


def _websocket_fields(text: str) -> dict[str, Any]:
    """Return chat completion fields for a WebSocket message."""
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        return {"messages": [{"role": "user", "content": text}]}
    return {**document, "messages": [{"role": "user", "content": document.get("prompt", "")}]}


def _text_of(content: Any) -> str:
    """Return a message's text: a string, or OpenAI's list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    raise InvalidField("messages", "content must be a string or a list of text parts")


def _completion(call: _ChatCall, pieces: list[str]) -> bytes:
    text = "".join(pieces)
    finish = "length" if len(pieces) >= call.max_tokens else "stop"
    return _dump(
        {
            "id": call.answer_id,
            "object": "chat.completion",
            "created": call.created,
            "model": call.model,
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish},
            ],
            "usage": {
                "prompt_tokens": call.prompt_tokens,
                "completion_tokens": len(pieces),
                "total_tokens": call.prompt_tokens + len(pieces),
            },
        }
    )


async def _late_answer(connection: Connection, answer: bytes, after_s: float) -> AsyncGenerator[None]:
    """Answer once the pieces would have been made: a client that waits sees the time the model takes."""
    await asyncio.sleep(after_s)
    yield
    connection.respond(200, answer, JSON)


async def _stream_vendor(
    connection: Connection, call: vendor.ChatCall, pieces: list[str], delay_s: float
) -> AsyncGenerator[None]:
    """Send one event a piece, then the finish reason, then ``[DONE]``."""
    for piece in pieces:
        if delay_s:
            await asyncio.sleep(delay_s)
        connection.write(b"data: " + _dump(call.event(piece)) + b"\n\n")
        yield
    connection.write(b"data: " + _dump(call.last_event(pieces)) + b"\n\ndata: [DONE]\n\n")
    connection.finish()


async def _stream_completion(
    connection: Connection, call: _ChatCall, pieces: list[str], delay_s: float
) -> AsyncGenerator[None]:
    """Send one event a piece, then the finish reason, then ``[DONE]``."""

    def event(delta: dict[str, str], finish: str | None) -> bytes:
        document = {
            "id": call.answer_id,
            "object": "chat.completion.chunk",
            "created": call.created,
            "model": call.model,
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        }
        return b"data: " + _dump(document) + b"\n\n"

    connection.write(event({"role": "assistant", "content": ""}, None))
    for piece in pieces:
        if delay_s:
            await asyncio.sleep(delay_s)
        connection.write(event({"content": piece}, None))
        yield
    connection.write(event({}, "length" if len(pieces) >= call.max_tokens else "stop") + b"data: [DONE]\n\n")
    connection.finish()


async def _write_bytes(connection: Connection, total: int) -> AsyncGenerator[None]:
    left = total
    while left > 0:
        connection.write(_BLOCK if left >= len(_BLOCK) else _BLOCK[:left])
        left -= len(_BLOCK)
        yield
    connection.finish()


async def _write_events(connection: Connection, count: int, every_s: float) -> AsyncGenerator[None]:
    for number in range(count):
        connection.write(b"id: %d\ndata: %d\n\n" % (number, number))
        yield
        await asyncio.sleep(every_s)
    connection.finish()


def _respond_error(connection: Connection, status: int, message: str, param: str | None) -> None:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    connection.respond(status, _dump({"error": error}), JSON)


def _not_found(connection: Connection, request: Request, body: bytes) -> None:
    _respond_error(connection, 404, f"nothing at {request.path}", None)


def _method_not_allowed(connection: Connection, request: Request, body: bytes) -> None:
    _respond_error(connection, 405, f"{request.method} is not for {request.path}", None)


def _dump(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
