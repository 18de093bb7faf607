"""How fast the HTTP/1.1 server and client are, on loopback, with a bounded load.

    python tests/bench/http1_server.py [--seconds 2] [--json FILE]

Measures requests/s, p50 and p99 for a constant answer (plain, through our own proxy, behind ASGI) at 1 and 64
connections, and the speed of a 100 MB body each way. The generator is a process of its own: one epoll loop that sends
a fixed request and counts the bytes of a fixed answer, so that it costs little beside the server. Beside wall time it
prints the server's CPU time per request, which other load on the machine disturbs less.
"""

import argparse
import json
import multiprocessing
import select
import socket
import statistics
import sys
import time
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import trio

from ngpu_protocol.http1 import (
    AsgiHandler,
    Client,
    Exchange,
    Handler,
    end_to_end,
    serve_tcp,
    tcp_opener,
    trailers_end_to_end,
)

_BODY = b'{"prompt":"hello","max_tokens":16}'
_ANSWER = b'{"answer":"a constant one","tokens":16}'
_REQUEST = (
    b"POST /proxy/8000/v1/completions?trace=1 HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nAccept: */*\r\n"
    b"Accept-Encoding: gzip, deflate\r\nUser-Agent: bench\r\nAuthorization: Bearer 1-abcdefghijklmnopqrstuvwx\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
) % (len(_BODY), _BODY)
_BULK_BYTES = 100 * 1000 * 1000


async def constant(exchange: Exchange) -> None:
    """Read the body, answer a constant."""
    await exchange.receive_all(100_000)
    await exchange.respond(200, [(b"content-type", b"application/json"), (b"server", b"ngpu")], _ANSWER)


async def bulk(exchange: Exchange) -> None:
    """Echo the body as it comes."""
    await exchange.send_head(200, [(b"content-type", b"application/octet-stream")])
    while data := await exchange.receive():
        await exchange.send(data)
    await exchange.end()


def proxy_to(port: int) -> Handler:
    """Return a handler that passes requests on to *port*, as a daemon would."""
    client = Client(tcp_opener("127.0.0.1", port), max_connections=64)

    async def proxy(exchange: Exchange) -> None:
        request = exchange.request
        body = await exchange.receive_all(100_000)
        async with client.request(request.method, request.target, end_to_end(request.headers), body) as response:
            await exchange.send_head(response.status, end_to_end(response.headers), more=response.buffered)
            async for piece in response.body():
                await exchange.send(piece, more=response.ended)
            await exchange.end(trailers_end_to_end(response.trailers))

    return proxy


async def _asgi_app(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(_ANSWER))]})
    await send({"type": "http.response.body", "body": _ANSWER})


def _serve(kind: str, upstream: int, pipe: Connection) -> None:
    handler = {
        "constant": lambda: constant,
        "bulk": lambda: bulk,
        "proxy": lambda: proxy_to(upstream),
        "asgi": lambda: AsgiHandler(_asgi_app),
    }[kind]()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(partial(serve_tcp, handler, host="127.0.0.1"))
            pipe.send(addresses[0].port)
            while (await trio.to_thread.run_sync(pipe.recv)) == "cpu":
                pipe.send(time.process_time())
            nursery.cancel_scope.cancel()

    trio.run(main)


class _Server:
    """A server in a process of its own."""

    def __init__(self, kind: str, upstream: int = 0) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=_serve, args=(kind, upstream, theirs), daemon=True)
        self._process.start()
        self.port: int = self._pipe.recv()

    def cpu_s(self) -> float:
        self._pipe.send("cpu")
        return float(self._pipe.recv())

    def stop(self) -> None:
        self._pipe.send("stop")
        self._process.join(5)


def load(port: int, connections: int, seconds: float) -> list[float]:
    """Keep *connections* busy for *seconds*; return each request's latency in seconds."""
    probe = socket.create_connection(("127.0.0.1", port))
    probe.sendall(_REQUEST)
    time.sleep(0.2)
    answer_bytes = len(probe.recv(65536))
    probe.close()
    poll = select.epoll()
    sockets: dict[int, socket.socket] = {}
    started: dict[int, float] = {}
    missing: dict[int, int] = {}
    latencies: list[float] = []
    for _ in range(connections):
        one = socket.create_connection(("127.0.0.1", port))
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sockets[one.fileno()] = one
        poll.register(one.fileno(), select.EPOLLIN)
        started[one.fileno()] = time.perf_counter()
        missing[one.fileno()] = answer_bytes
        one.sendall(_REQUEST)
    end = time.perf_counter() + seconds
    while True:
        now = time.perf_counter()
        if now >= end:
            break
        for number, _ in poll.poll(0.5):
            got = len(sockets[number].recv(65536))
            if not got:
                raise RuntimeError("the server closed a connection")
            missing[number] -= got
            if missing[number] > 0:
                continue
            now = time.perf_counter()
            latencies.append(now - started[number])
            missing[number] = answer_bytes
            started[number] = now
            sockets[number].send(_REQUEST)
    for one in sockets.values():
        one.close()
    return latencies


def measure(name: str, server: _Server, connections: int, seconds: float) -> dict[str, Any]:
    """Return one row of the table."""
    load(server.port, connections, 0.7)  # warm
    before = server.cpu_s()
    latencies = sorted(load(server.port, connections, seconds))
    cpu_s = server.cpu_s() - before
    return {
        "case": name,
        "connections": connections,
        "requests_per_s": round(len(latencies) / seconds),
        "p50_ms": round(statistics.median(latencies) * 1000, 3),
        "p99_ms": round(latencies[int(len(latencies) * 0.99)] * 1000, 3),
        "server_cpu_us_per_request": round(cpu_s / len(latencies) * 1e6, 1),
    }


def measure_bulk(server: _Server) -> dict[str, Any]:
    """Return the row of a 100 MB body echoed by *server* to our own client."""

    async def pieces() -> Any:
        piece = bytes(65536)
        for _ in range(_BULK_BYTES // len(piece)):
            yield piece

    async def main() -> tuple[float, int]:
        client = Client(tcp_opener("127.0.0.1", server.port))
        start = time.perf_counter()
        received = 0
        async with client.request("POST", "/", body=pieces()) as response:
            async for piece in response.body():
                received += len(piece)
        return time.perf_counter() - start, received

    elapsed_s, received = trio.run(main)
    return {"case": "100 MB echoed", "connections": 1, "mb_per_s": round(received / elapsed_s / 1e6)}


def main() -> int:
    """Run all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="load time of each case")
    parser.add_argument("--case", action="append", help="only these: constant, proxy, asgi, bulk")
    parser.add_argument("--json", help="also write the rows to this file")
    arguments = parser.parse_args()
    cases = arguments.case or ["constant", "proxy", "asgi", "bulk"]
    rows = []
    upstream = _Server("constant")
    for kind in cases:
        server = upstream if kind == "constant" else _Server(kind, upstream.port)
        if kind == "bulk":
            rows.append(measure_bulk(server))
        else:
            rows.extend(measure(kind, server, connections, arguments.seconds) for connections in (1, 64))
        if server is not upstream:
            server.stop()
    upstream.stop()
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)
    return 0


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.exit(main())
