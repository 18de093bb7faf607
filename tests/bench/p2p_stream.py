"""What a message and a megabyte cost over one libp2p connection: ours, and py-libp2p's own stack for comparison.

Run it by hand, on an idle machine: ``python -m tests.bench.p2p_stream [--json FILE] [--skip-library]``. Both ends run
in processes of their own, so that each has a core. It prints, for each stack: echoes of 1 KiB on open streams at 1,
16 and 64 streams at once (per second, and processor time of both ends per echo), opening a stream with one echo, and
100 MB one way with the peak memory of both ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import trio
from libp2p import new_host
from libp2p.crypto.secp256k1 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from multiaddr import Multiaddr

from ngpu_protocol.identity import Account
from ngpu_protocol.networks import network_named
from ngpu_protocol.p2p import open_host

ECHO, SINK = "/bench/echo/1.0.0", "/bench/sink/1.0.0"
MESSAGE = b"x" * 1024
BULK_BYTES = 100_000_000
LIMIT_S = 60


class Wire(Protocol):
    """The little of a stream that is needed here."""

    async def send(self, data: bytes) -> None: ...
    async def receive(self) -> bytes: ...
    async def close(self) -> None: ...


class OurWire:
    def __init__(self, stream: Any) -> None:
        self.send = stream.send_all
        self.receive = stream.receive_some
        self.close = stream.aclose


class LibraryWire:
    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.send = stream.write
        self.close = stream.close

    async def receive(self) -> bytes:
        try:
            return await self._stream.read(65536)
        except Exception:
            return b""


async def echo(wire: Wire) -> None:
    while data := await wire.receive():
        await wire.send(data)


async def sink(wire: Wire) -> None:
    got = 0
    while got < BULK_BYTES and (data := await wire.receive()):
        got += len(data)
    await wire.send(json.dumps([got, peak_mb(), cpu_s()]).encode() + b"\n")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextlib.asynccontextmanager
async def ours(listen: bool) -> AsyncIterator[tuple[str, Callable[[str, str], Awaitable[Wire]]]]:
    addresses = ["/ip4/127.0.0.1/tcp/0"] if listen else []

    async def serve_echo(stream: Any) -> None:
        await echo(OurWire(stream))

    async def serve_sink(stream: Any) -> None:
        await sink(OurWire(stream))

    async with open_host(
        Account.from_key(os.urandom(32)),
        listen=addresses,
        network=network_named("local"),
        handlers={ECHO: serve_echo, SINK: serve_sink},
    ) as host:

        async def dial(address: str, protocol: str) -> Wire:
            peer = await host.connect(address, timeout_s=5)
            return OurWire(await host.open_stream(peer, protocol, timeout_s=5))

        yield (host.addresses[0] if listen else ""), dial


@contextlib.asynccontextmanager
async def library(listen: bool) -> AsyncIterator[tuple[str, Callable[[str, str], Awaitable[Wire]]]]:
    key_pair = create_new_key_pair(os.urandom(32))
    noise = Noise(key_pair, noise_privkey=create_x25519_key_pair().private_key)
    host: Any = new_host(key_pair=key_pair, sec_opt={NOISE: noise})

    async def serve_echo(stream: Any) -> None:
        await echo(LibraryWire(stream))

    async def serve_sink(stream: Any) -> None:
        await sink(LibraryWire(stream))

    host.set_stream_handler(ECHO, serve_echo)
    host.set_stream_handler(SINK, serve_sink)
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")] if listen else []):

        async def dial(address: str, protocol: str) -> Wire:
            info = info_from_p2p_addr(Multiaddr(address))
            await host.connect(info)
            return LibraryWire(await host.new_stream(info.peer_id, [protocol]))

        yield (str(host.get_addrs()[0]) if listen else ""), dial
        await host.close()


STACKS = {"ours": ours, "library": library}


async def serve(stack: str) -> None:
    async with STACKS[stack](True) as (address, _):
        print(address, flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)  # until the parent goes
        os._exit(0)


async def echo_once(wire: Wire) -> None:
    await wire.send(MESSAGE)
    got = 0
    while got < len(MESSAGE):
        data = await wire.receive()
        if not data:
            raise ConnectionError("the echo ended early")
        got += len(data)


def child_cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start_server(stack: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.bench.p2p_stream", "--serve", stack]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


async def measure(stack: str) -> dict[str, float]:
    server = start_server(stack)
    result: dict[str, float] = {}
    try:
        assert server.stdout is not None
        address = await trio.to_thread.run_sync(server.stdout.readline)
        async with STACKS[stack](False) as (_, dial):
            for streams, rounds in ((1, 2000), (16, 400), (64, 100)):
                wires = [await dial(address.strip(), ECHO) for _ in range(streams)]

                async def worker(wire: Wire, rounds: int = rounds) -> None:
                    for _ in range(rounds):
                        await echo_once(wire)

                for wire in wires:
                    await echo_once(wire)
                cpu, began = cpu_s() + child_cpu_s(server.pid), time.perf_counter()
                async with trio.open_nursery() as nursery:
                    for wire in wires:
                        nursery.start_soon(worker, wire)
                took = time.perf_counter() - began
                cpu = cpu_s() + child_cpu_s(server.pid) - cpu
                result[f"echo_per_s_c{streams}"] = round(streams * rounds / took)
                result[f"echo_cpu_us_c{streams}"] = round(cpu / (streams * rounds) * 1e6, 1)
                for wire in wires:
                    await wire.close()
            began = time.perf_counter()
            for _ in range(100):
                wire = await dial(address.strip(), ECHO)
                await echo_once(wire)
                await wire.close()
            result["open_and_echo_ms"] = round((time.perf_counter() - began) * 10, 2)

            wire = await dial(address.strip(), SINK)
            block = b"y" * 1_000_000
            began = time.perf_counter()
            for _ in range(BULK_BYTES // len(block)):
                await wire.send(block)
            got, peak, _ = json.loads(await wire.receive())
            assert got == BULK_BYTES, f"{got} bytes arrived"
            result["bulk_mb_per_s"] = round(BULK_BYTES / 1e6 / (time.perf_counter() - began), 1)
            result["peak_receiver_mb"], result["peak_sender_mb"] = round(peak), round(peak_mb())
    finally:
        server.kill()
        server.wait()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", choices=STACKS, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=STACKS, help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--skip-library", action="store_true", help="measure ours only")
    options = parser.parse_args()
    if options.serve:
        trio.run(serve, options.serve)
        return
    if options.measure:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(trio.run(measure, options.measure)), flush=True)
        os._exit(0)
    results: dict[str, dict[str, float]] = {}
    for stack in ("ours",) if options.skip_library else ("library", "ours"):
        # A process each, so that one stack's peak memory is not the other's.
        run = subprocess.run(
            [sys.executable, "-m", "tests.bench.p2p_stream", "--measure", stack],
            stdout=subprocess.PIPE,
            text=True,
            timeout=LIMIT_S,
            check=True,
        )
        results[stack] = json.loads(run.stdout)
    for figure in results["ours"]:
        print(f"{figure:22}" + "".join(f"{stack:>10} {results[stack][figure]:>10}" for stack in results))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
