"""A peer to freeze and to kill: prints its address, echoes, and drips (one byte, then silence)."""

from __future__ import annotations

import trio

from ngpu_protocol.p2p import P2PStream
from tests.integration.p2p.peers import ECHO, echo, host

DRIP = "/test/drip/1.0.0"


async def drip(stream: P2PStream) -> None:
    await stream.send_all(b"x")
    await trio.sleep_forever()


async def main() -> None:
    async with host({ECHO: echo, DRIP: drip}) as running:
        print(running.addresses[0], flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main)
