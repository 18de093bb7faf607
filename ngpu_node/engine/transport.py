"""An HTTP client of the container engine's API, on trio: for what must end the moment nobody wants it any more.

The SDK's calls block a thread each, until the engine has answered. What may hang (a program inside a container) or
lasts for minutes (a pull) goes this way: cancelling closes the connection.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path

import httpx

from ngpu_node.errors import EngineUnavailable

DEFAULT_SOCKET = "/var/run/docker.sock"
CALL_TIMEOUT_S = 60.0


def engine_client(environ: Mapping[str, str] = os.environ) -> httpx.AsyncClient:
    """Return a client of the engine DOCKER_HOST, DOCKER_TLS_VERIFY and DOCKER_CERT_PATH lead to, as the SDK finds it.

    Raises:
        EngineUnavailable: DOCKER_HOST is of a kind this cannot use.
    """
    host = environ.get("DOCKER_HOST") or f"unix://{DEFAULT_SOCKET}"
    scheme, _, rest = host.partition("://")
    if scheme == "unix":
        return _client(httpx.AsyncHTTPTransport(uds=rest or DEFAULT_SOCKET), "http://engine")
    if scheme not in ("tcp", "http", "https"):
        raise EngineUnavailable(f"DOCKER_HOST is {host}: use unix:// or tcp://")
    if scheme == "https" or environ.get("DOCKER_TLS_VERIFY"):
        certificates = environ.get("DOCKER_CERT_PATH") or str(Path.home() / ".docker")
        try:
            context = ssl.create_default_context(cafile=str(Path(certificates, "ca.pem")))
            context.load_cert_chain(Path(certificates, "cert.pem"), Path(certificates, "key.pem"))
        except (OSError, ssl.SSLError) as error:
            raise EngineUnavailable(f"DOCKER_CERT_PATH={certificates}: {error}") from error
        return _client(httpx.AsyncHTTPTransport(verify=context, trust_env=False), f"https://{rest}")
    return _client(httpx.AsyncHTTPTransport(trust_env=False), f"http://{rest}")


def _client(transport: httpx.AsyncBaseTransport, base_url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=transport, base_url=base_url, timeout=CALL_TIMEOUT_S)
