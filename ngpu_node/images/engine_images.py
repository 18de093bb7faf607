"""The engine's calls about images, on trio: look, pull, load, remove.

Everything else the node asks of the engine goes through the SDK in threads (`engine.docker_engine`). Pulling does not:
it streams for minutes and must stop at once when nobody wants it any more, and an SDK's thread blocks in a read that
only shutting a private socket ends. Here cancelling closes the connection, upon which the engine stops downloading,
and a tar goes up as a stream.

Foreign errors end here: `EngineUnavailable` when the engine does not answer, `EngineFailed` with its words when it
says no.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from ngpu_node.engine.transport import CALL_TIMEOUT_S, engine_client
from ngpu_node.errors import EngineFailed, EngineUnavailable
from ngpu_protocol.image_references import ImageReference
from ngpu_protocol.workspace_secrets import RegistryCredentials

MAX_EVENT_BYTES = 1024 * 1024
_MAX_WORDS = 16 * 1024


class EngineImages:
    """The images of one engine; close with `aclose`."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> EngineImages:
        """Return those of the engine the environment leads to.

        Raises:
            EngineUnavailable: DOCKER_HOST is of a kind this cannot use.
        """
        return cls(engine_client(environ))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def info(self) -> dict[str, Any]:
        """Return what the engine says of itself."""
        found: dict[str, Any] = await self._json("GET", "/info")
        return found

    async def inspect(self, name: str) -> dict[str, Any] | None:
        """Return an image by reference or id; None when the engine has none such."""
        async with self._call("GET", f"/images/{name}/json", missing_is_fine=True) as response:
            return None if response.status_code == 404 else _object(await response.aread())

    async def ids(self) -> set[str]:
        """Return the ids of all images."""
        return _each(await self._json("GET", "/images/json", params={"all": "true"}), "Id")

    async def used_ids(self) -> set[str]:
        """Return the ids of the images that containers use, running or not, whoever made them."""
        return _each(await self._json("GET", "/containers/json", params={"all": "true"}), "ImageID")

    async def remote_digest(self, reference: ImageReference, credentials: RegistryCredentials | None) -> str:
        """Have the engine ask the registry, and return the digest of what *reference* names there."""
        found = await self._json("GET", f"/distribution/{reference}/json", headers=_login(reference, credentials))
        try:
            return str(found["Descriptor"]["digest"])
        except (KeyError, TypeError):
            raise EngineFailed(_UNEXPECTED) from None

    async def remove(self, reference: str) -> None:
        """Take *reference* from the engine, and the image with it if nothing else names or uses it."""
        async with self._call("DELETE", f"/images/{reference}", missing_is_fine=True):
            pass

    async def pull(
        self, reference: ImageReference, credentials: RegistryCredentials | None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the engine's events of a pull of *reference* until it ended; one with `error` tells of a failure.

        Closing the iterator early, or cancelling, makes the engine stop.
        """
        async with self._call(
            "POST",
            "/images/create",
            params={"fromImage": reference.name, "tag": reference.target},
            headers=_login(reference, credentials),
            timeout=httpx.Timeout(CALL_TIMEOUT_S, read=None),
        ) as response:
            async for event in _events(response):
                yield event

    async def load(self, tar: AsyncIterable[bytes]) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the engine's events while it loads images from *tar*.

        An error that *tar* raises comes out of this as it is; the engine then loads nothing.
        """
        async with self._call(
            "POST",
            "/images/load",
            params={"quiet": "false"},
            headers={"Content-Type": "application/x-tar"},
            content=tar,
            timeout=httpx.Timeout(CALL_TIMEOUT_S, read=None, write=None),
        ) as response:
            async for event in _events(response):
                yield event

    async def _json(self, method: str, path: str, **options: Any) -> Any:
        async with self._call(method, path, **options) as response:
            try:
                return json.loads(await response.aread())
            except ValueError:
                raise EngineFailed("the container engine sent something that is not JSON") from None

    @asynccontextmanager
    async def _call(
        self, method: str, path: str, *, missing_is_fine: bool = False, **options: Any
    ) -> AsyncIterator[httpx.Response]:
        try:
            async with self._client.stream(method, path, **options) as response:
                if response.status_code >= 400 and not (missing_is_fine and response.status_code == 404):
                    raise EngineFailed(_words(await response.aread()))
                yield response
        except (httpx.TransportError, httpx.StreamError) as error:
            said = str(error) or type(error).__name__
            raise EngineUnavailable(f"the container engine does not answer: {said}") from error
        except OSError as error:
            raise EngineUnavailable(f"the container engine does not answer: {error}") from error


def _login(reference: ImageReference, credentials: RegistryCredentials | None) -> dict[str, str]:
    login: dict[str, str] = {}
    if credentials is not None:
        login = {
            "serveraddress": reference.domain,
            "username": credentials.username,
            "password": credentials.password,
        }
    return {"X-Registry-Auth": base64.urlsafe_b64encode(json.dumps(login).encode()).decode()}


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    held = b""
    async for part in response.aiter_raw():
        *lines, held = (held + part).split(b"\n")
        if len(held) > MAX_EVENT_BYTES:
            raise EngineFailed("the container engine sent an endless line")
        for line in lines:
            if line.strip():
                yield _object(line)
    if held.strip():
        yield _object(held)


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        raise EngineFailed("the container engine sent something that is not JSON") from None
    return found if isinstance(found, dict) else {}


_UNEXPECTED = "the container engine's answer is not of the form its API describes"


def _each(found: Any, key: str) -> set[str]:
    try:
        return {str(one[key]) for one in found}
    except (KeyError, TypeError):
        raise EngineFailed(_UNEXPECTED) from None


def _words(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])[:_MAX_WORDS]
    except (ValueError, KeyError, TypeError):
        return body[:300].decode(errors="replace").strip() or "no reason given"
