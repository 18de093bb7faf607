"""What calling a model through the network costs: its first token, the even flow of tokens, memory, uploads.

    scripts/bench models [--seconds S] [--idle N] [--json FILE]

A model server in this process sends a token every 20 ms. The same streams are read from it directly, through a
bootstrap and one node, and through LiteLLM's proxy where it can be installed, real processes on loopback; the
difference is what is added.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import trio

from ngpu_protocol.http1 import Client, Exchange, serve_tcp, tcp_opener
from tests.bench.systems import CHAT_PATH, Missing, Systems
from tests.integration.profiles.rig import listed, register
from tests.integration.whole_path.rig import network

TOKEN_S = 0.02
LINES = ("[limits]", "streams_per_node = 1024", "[models]", "concurrency = 1024")
JSON = [(b"content-type", b"application/json")]
CHUNK = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"bench",'
    b'"choices":[{"index":0,"delta":{"content":"word "},"finish_reason":null}]}\n\n'
)
# What LiteLLM knows its upstream's model by (`systems`).
LITELLM_MODEL = "fixed"


async def model_server(exchange: Exchange) -> None:
    """Stream `max_tokens` tokens, `user` seconds apart; /v1/images/edits takes a body in and says how long it was."""
    if exchange.request.path == "/":
        await exchange.respond(200, [], b"ready")
        return
    size = 0
    body = bytearray()
    while data := await exchange.receive():
        size += len(data)
        if size < 10_000:
            body += data
    if exchange.request.path != CHAT_PATH:
        await exchange.respond_json(200, {"bytes": size})
        return
    asked = json.loads(body)
    await exchange.send_head(200, [(b"content-type", b"text/event-stream")])
    due = trio.current_time()
    for _ in range(asked["max_tokens"]):
        await exchange.send(CHUNK)
        due += float(asked.get("user", TOKEN_S))  # LiteLLM keeps it to itself
        await trio.sleep_until(due)
    await exchange.send(b"data: [DONE]\n\n")
    await exchange.end()


def asking(model: str, tokens: int, every_s: float) -> bytes:
    """Return the body of a call for a stream."""
    messages = [{"role": "user", "content": "x"}]
    fields = {"model": model, "messages": messages, "stream": True, "max_tokens": tokens, "user": str(every_s)}
    return json.dumps(fields).encode()


async def read_stream(
    client: Client, fields: list[tuple[bytes, bytes]], model: str, tokens: int
) -> tuple[float, list[float]]:
    """Return seconds to the first token, and each gap between tokens beyond the model's own."""
    body = asking(model, tokens, TOKEN_S)
    began = last = time.perf_counter()
    first, late = 0.0, []
    async with client.request("POST", CHAT_PATH, fields, body) as response:
        assert response.status == 200, await response.read(1000)
        while data := await response.receive():
            now = time.perf_counter()
            if not first:
                first = now - began
            elif b"[DONE]" not in data:
                late.append(abs(now - last - TOKEN_S * max(1, data.count(b"\n\n"))))
            last = now
    return first, late


def percentile(values: list[float], share: float) -> float:
    """Return the value below which *share* of *values* lies."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return every figure."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, Systems(Path(folder)) as systems:
        async with (
            trio.open_nursery() as nursery,
            network(Path(folder), model_server, bootstrap_lines=LINES, slots=1024) as net,
        ):
            bound = await nursery.start(partial(serve_tcp, model_server, host="127.0.0.1", port=0))
            port = bound[0].port
            await register(net.nodes[0], port, [("bench", "bench", 0)])
            await listed(net, "bench")
            assert net.client is not None
            direct = Client(tcp_opener("127.0.0.1", port), authority="direct", max_connections=1024)
            authority = net.client.authority.decode()
            host, _, own = authority.rpartition(":")
            ours = Client(tcp_opener(host, int(own)), authority=authority, max_connections=1024)
            token = [*JSON, (b"authorization", f"Bearer {net.token}".encode())]
            ways = {"direct": (direct, JSON, "bench"), "ngpu": (ours, token, "bench")}
            try:
                litellm = await trio.to_thread.run_sync(
                    partial(systems.litellm, f"http://127.0.0.1:{port}", arguments.cache)
                )
                _, _, at = litellm.endpoint.base_url.rpartition(":")
                through = Client(tcp_opener("127.0.0.1", int(at)), authority=f"127.0.0.1:{at}", max_connections=1024)
                ways["litellm"] = (through, JSON, LITELLM_MODEL)
            except Missing as error:
                print(f"without LiteLLM: {error}")
            for name, (client, fields, model) in ways.items():
                await read_stream(client, fields, model, 1)
                firsts = [(await read_stream(client, fields, model, 1))[0] for _ in range(arguments.calls)]
                figures[f"first_token_ms_{name}"] = statistics.median(firsts) * 1000
            for name in set(ways) - {"direct"}:
                added = figures[f"first_token_ms_{name}"] - figures["first_token_ms_direct"]
                figures["added_first_token_ms" + ("" if name == "ngpu" else f"_{name}")] = added
            for streams in (16, 64):
                for name, (client, fields, model) in ways.items():
                    late: list[float] = []

                    async def one(
                        client: Client = client, fields: Any = fields, model: str = model, late: list[float] = late
                    ) -> None:
                        late.extend((await read_stream(client, fields, model, int(arguments.seconds / TOKEN_S)))[1])

                    async with trio.open_nursery() as readers:
                        for _ in range(streams):
                            readers.start_soon(one)
                    figures[f"jitter_p99_ms_{streams}_{name}"] = percentile(late, 0.99) * 1000
            await idle_streams(arguments.idle, net.bootstrap.process, ours, token, figures)
            await upload(net.bootstrap.process, ours, token, figures)
            nursery.cancel_scope.cancel()
    return figures


def rss_mb(process: Any) -> float:
    """Return a process's memory now, in MB."""
    return int(Path(f"/proc/{process.pid}/status").read_text().partition("VmRSS:")[2].split()[0]) / 1000


async def idle_streams(count: int, process: Any, client: Client, fields: Any, figures: dict[str, Any]) -> None:
    """Measure what *count* open streams on which nothing comes add to the bootstrap."""
    body = asking("bench", 2, 3600)
    before = rss_mb(process)
    opened = 0
    all_open = trio.Event()

    async def hold() -> None:
        nonlocal opened
        async with client.request("POST", CHAT_PATH, fields, body) as response:
            await response.receive()
            opened += response.status == 200
            if opened == count:
                all_open.set()
            await trio.sleep_forever()

    with trio.move_on_after(30):
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(hold)
            await all_open.wait()
            figures["idle_streams_mb"] = rss_mb(process) - before
            nursery.cancel_scope.cancel()
    figures["idle_streams"] = opened


async def upload(process: Any, client: Client, fields: Any, figures: dict[str, Any]) -> None:
    """Measure a form of 20 MB whose model comes last."""
    parts = [("image", ("a.bin", bytes(20_000_000))), ("model", (None, b"bench"))]
    request = httpx.Request("POST", "http://x", files=parts)
    body, kind = request.read(), request.headers["content-type"].encode()
    headers = [*(pair for pair in fields if pair[0] != b"content-type"), (b"content-type", kind)]
    before, peak, rates = rss_mb(process), 0.0, []
    for _ in range(5):
        began = time.perf_counter()
        async with client.request("POST", "/v1/images/edits", headers, body) as response:
            assert json.loads(await response.read(1000)) == {"bytes": len(body)}
        rates.append(len(body) / 1e6 / (time.perf_counter() - began))
        peak = max(peak, rss_mb(process) - before)
    figures["upload_mb_per_s"] = statistics.median(rates)
    figures["upload_grown_mb"] = peak


WANTED = (
    ("added_first_token_ms", "added time to first token, c=1", 8.0, "ms"),
    ("added_jitter_ms_16", "added jitter p99, 16 streams of 50 tokens/s", 5.0, "ms"),
    ("idle_streams_mb", "500 idle streams", 60.0, "MB"),
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="scripts/bench models", description=__doc__)
    parser.add_argument("--calls", type=int, default=100, help="calls for the time to the first token")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each stream")
    parser.add_argument("--idle", type=int, default=500, help="idle streams")
    parser.add_argument("--cache", type=Path, default=Path("build/bench"), help="where LiteLLM's environment is kept")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    figures = trio.run(measure, arguments)
    for streams in (16, 64):
        for name in ("ngpu", "litellm"):
            if (own := figures.get(f"jitter_p99_ms_{streams}_{name}")) is not None:
                key = f"added_jitter_ms_{streams}" + ("" if name == "ngpu" else f"_{name}")
                figures[key] = own - figures[f"jitter_p99_ms_{streams}_direct"]
    for name, value in figures.items():
        print(f"{name:<32}{value:,.2f}")
    for name, words, limit, unit in WANTED:
        got = figures.get(name)
        print(f"{words}: under {limit:g} {unit} wanted, {'nothing' if got is None else f'{got:.2f}'} got")
    print(f"20 MB form: 40 MB/s wanted, {figures['upload_mb_per_s']:.0f} got")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
