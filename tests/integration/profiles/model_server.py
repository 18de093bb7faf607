"""A model server with one behaviour a model, and a memory of what reached it.

It answers the calls of OpenAI's API as servers in the field do: streams of events, files named by their path, forms.
Registered with a node under several names; which one a request names decides what happens to it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from ngpu_protocol.http1 import Exchange, Headers, header
from tests.integration.whole_path.workspace import Workspace

JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8

MODELS: dict[str, int] = {
    "Llama3-8B": 0,
    "meta-org/Llama-9B": 0,
    "broken-stream": 0,
    "broken-event": 0,
    "error-event": 0,
    "slow-stream": 0,
    "SuperImage": 1,
    "SuperEdit": 2,
    "embedder": 0,
    "speaker": 0,
}
"""Model to its type, as it registers."""


@dataclass
class Seen:
    """One request as it reached the server."""

    target: str
    headers: Headers
    body: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.body).hexdigest()


@dataclass
class ModelServer(Workspace):
    """Serves as an `http1` handler.

    Attributes:
        photos: where pictures are written.
        seen: every request, in order.
        every_s: between two pieces of a stream.
    """

    photos: Path = Path("/nonexistent")
    seen: list[Seen] = field(default_factory=list)
    every_s: float = 0.01

    def forget(self) -> None:
        super().forget()
        self.seen = []

    async def do_v1(self, exchange: Exchange) -> None:
        body = await exchange.receive_all(1 << 28)
        self.seen.append(Seen(exchange.request.target, exchange.request.headers, body))
        call = exchange.request.path.removeprefix("/v1/")
        if call == "chat/completions":
            await self._chat(exchange, json.loads(body))
        elif call == "images/generations":
            document = json.loads(body)
            await self._pictures(exchange, int(document.get("n", 1)))
        elif call == "images/edits":
            await self._edit(exchange, body)
        elif call == "embeddings":
            data = [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}]
            usage = {"prompt_tokens": 1, "total_tokens": 1}
            await _json(exchange, {"object": "list", "data": data, "model": "embedder", "usage": usage})
        elif call == "completions":
            choices = [{"text": " there", "index": 0, "finish_reason": "stop", "logprobs": None}]
            await _json(
                exchange,
                {"id": "c", "object": "text_completion", "created": 1, "model": "Llama3-8B", "choices": choices},
            )
        elif call == "audio/speech":
            await exchange.respond(200, [(b"content-type", b"audio/mpeg")], b"ID3" + bytes(1000))
        elif call == "audio/transcriptions":
            await _json(exchange, {"text": "said"})
        else:
            await exchange.respond(404, [JSON], b'{"error":{"message":"no such call"}}')

    async def _chat(self, exchange: Exchange, asked: dict[str, Any]) -> None:
        model = asked["model"]
        if not asked.get("stream"):
            message = {"role": "assistant", "content": "\n\nHello there, how may I assist you today?"}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            await _json(
                exchange,
                {
                    "code": 0,
                    "message": "success",
                    "id": "chat-1",
                    "object": "chat.completion",
                    "created": 1677652288,
                    "model": model,
                    "choices": choices,
                },
            )
            return
        await exchange.send_head(200, [EVENTS])
        if model == "error-event":
            await exchange.send(b'data: {"error":{"message":"out of memory","type":"server_error","code":"oom"}}\n\n')
            await exchange.send(b"data: [DONE]\n\n")
            await exchange.end()
            return
        count = 100_000 if model == "slow-stream" else 5
        try:
            for number in range(count):
                await exchange.send(_chunk(model, f"word{number} "))
                await trio.sleep(self.every_s)
        except BaseException:
            self.left.set()
            raise
        if model == "broken-stream":
            await exchange.abort()
            return
        if model == "broken-event":
            await exchange.send(_chunk(model, "half")[:20])
            await exchange.abort()
            return
        await exchange.send(b"data: [DONE]\n\n")
        await exchange.end()

    async def _pictures(self, exchange: Exchange, count: int) -> None:
        names = []
        for number in range(count):
            path = self.photos / f"v{number}xxidnrc9ol7m80.png"
            path.write_bytes(PICTURE)
            names.append({"url": str(path)})
        document = {"code": 0, "message": "success", "created": 1589478378, "data": names}
        await _json(exchange, document)

    async def _edit(self, exchange: Exchange, body: bytes) -> None:
        media = header(exchange.request.headers, b"content-type") or b""
        if media.startswith(b"application/json"):
            await self._pictures(exchange, int(json.loads(body).get("n", 1)))
            return
        assert b'name="image"' in body
        await self._pictures(exchange, 1)


def _chunk(model: str, text: str) -> bytes:
    choices = [{"index": 0, "delta": {"content": text}, "finish_reason": None}]
    document = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": choices}
    return b"data: %b\n\n" % json.dumps(document).encode()


async def _json(exchange: Exchange, document: Any) -> None:
    await exchange.respond(200, [JSON], json.dumps(document).encode())
