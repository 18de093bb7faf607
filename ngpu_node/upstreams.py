"""Where a workspace's port is really served: an address, a pool of kept connections to it, and how busy it is.

Loopback or a container's own address; the connections are plain TCP and reused, so that a small request costs the
workspace no handshake. Whoever makes an upstream closes it.
"""

from __future__ import annotations

from ngpu_protocol.http1 import Client, tcp_opener

CONNECT_TIMEOUT_S = 5.0

#: Below the 5 s after which common servers (uvicorn, node) close a kept connection: a request that meets the closing
#: may or may not have been read, and only some may be sent again.
MAX_IDLE_S = 4.0


class Upstream:
    """One server. `running` counts the attempts that use it, for choosing the least busy of several."""

    def __init__(self, host: str, port: int, *, max_connections: int) -> None:
        """Make the pool; nothing is connected yet.

        Args:
            host: an IP address.
            max_connections: as many as attempts may run at once, or they would wait for each other here.
        """
        self.host = host
        self.port = port
        self.running = 0
        self.client = Client(
            tcp_opener(host, port),
            authority=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            max_connections=max_connections,
            max_idle_s=MAX_IDLE_S,
            open_timeout_s=CONNECT_TIMEOUT_S,
        )

    async def aclose(self) -> None:
        """Close the kept connections."""
        await self.client.aclose()

    def __repr__(self) -> str:
        return f"Upstream({self.host}:{self.port}, running={self.running})"
