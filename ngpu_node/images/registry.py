"""Asking a registry what an image is, before the engine fetches it.

The engine tells neither sizes before a download nor, always, why one failed; the registry does. Owns the few calls of
the distribution API that answer this: a manifest, the one for this platform, the configuration; with Basic or token
authentication as the registry demands. Layers are the engine's to fetch.

A registry is a host that a client named. So: no address of this machine's network unless the owner allows the host;
everything read is bounded and checked against its digest; credentials go out only when challenged, only to the
registry and to the token service it names, and never in clear unless the engine would do so too (`insecure`). What an
engine's own configuration lets it reach and this cannot (a proxy, a mirror) shows as `RegistryUnreachable`, and the
caller may leave the question to the engine.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import re
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import trio

from ngpu_daemon.addresses import IpAddress, is_public
from ngpu_daemon.metrics import software_version
from ngpu_daemon.outbound import AddressRefused, GuardedTransport, resolve
from ngpu_node.images.manifests import (
    ACCEPT,
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    Manifest,
    Platform,
    RemoteImage,
    check_digest,
    check_platform,
    choose,
    diff_ids,
)
from ngpu_node.images.problems import AddressNotAllowed, BadImage, RegistryDown, from_registry
from ngpu_protocol.image_references import DEFAULT_DOMAIN, ImageReference
from ngpu_protocol.workspace_secrets import RegistryCredentials

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 20.0
RESOLVE_TIMEOUT_S = 60.0
MAX_TOKEN_BYTES = 64 * 1024
MAX_ERROR_BYTES = 4096
MAX_REDIRECTS = 5

_HUB_HOST = "registry-1.docker.io"
_CHALLENGE = re.compile(r'([A-Za-z]+)="([^"]*)"')


class RegistryUnreachable(RegistryDown):
    """No answer came from the registry at all: it may be down, or only this program cannot get there."""


@dataclass(frozen=True, slots=True)
class InsecureRegistries:
    """The registries the engine talks to without TLS, or without checking it: its own configuration.

    Attributes:
        hosts: names with ports, as in references.
        networks: whoever lives there.
    """

    hosts: frozenset[str] = frozenset()
    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = (ipaddress.ip_network("127.0.0.0/8"),)

    @classmethod
    def of_engine(cls, info: Mapping[str, Any]) -> InsecureRegistries:
        """Return what the engine's `info` says."""
        config = info.get("RegistryConfig") or {}
        networks = []
        for text in config.get("InsecureRegistryCIDRs") or []:
            try:
                networks.append(ipaddress.ip_network(str(text)))
            except ValueError:
                continue
        indexes = config.get("IndexConfigs") or {}
        hosts = {str(name) for name, index in indexes.items() if not (index or {}).get("Secure", True)}
        return cls(frozenset(hosts), tuple(networks))

    def cover(self, domain: str, addresses: Sequence[IpAddress]) -> bool:
        """Tell whether *domain*, which leads to *addresses*, is one of them."""
        return domain in self.hosts or any(
            address.version == network.version and address in network
            for address in addresses
            for network in self.networks
        )


class Registry:
    """A client for the registries of clients' images."""

    def __init__(
        self,
        platform: Platform,
        *,
        insecure: InsecureRegistries = InsecureRegistries(),
        allow_private: Callable[[str], bool] = lambda domain: False,
    ) -> None:
        """Make one.

        Args:
            allow_private: whether the registry of this domain may be at an address of this machine's network.
        """
        self._platform = platform
        self._insecure = insecure
        self._allow_private = allow_private
        self._tls: dict[bool, ssl.SSLContext] = {}

    async def describe(self, reference: ImageReference, credentials: RegistryCredentials | None) -> RemoteImage:
        """Return what *reference* names at its registry, to be pinned by its digest.

        Raises:
            ImageProblem: one of `problems`, by what the registry said; `RegistryUnreachable` when it said nothing.
        """
        with trio.move_on_after(RESOLVE_TIMEOUT_S):
            return await self._describe(reference, credentials)
        raise RegistryDown(f"the registry {reference.domain} did not answer within {RESOLVE_TIMEOUT_S:g} s")

    async def _describe(self, reference: ImageReference, credentials: RegistryCredentials | None) -> RemoteImage:
        what = str(reference)
        async with self._session(reference, credentials) as session:
            data = await session.get("manifests", reference.target, MAX_MANIFEST_BYTES)
            if reference.digest is not None:
                check_digest(data, reference.digest, f"the manifest of {what}")
            digest = hashlib.sha256(data).digest()
            chosen = choose(data, self._platform, what)
            listed = isinstance(chosen, str)
            if isinstance(chosen, str):
                data = await session.get("manifests", chosen, MAX_MANIFEST_BYTES)
                check_digest(data, chosen, f"the manifest of {what}")
                manifest = choose(data, self._platform, what)
                if isinstance(manifest, str):
                    raise BadImage(f"{what} is a list of lists")
                chosen = manifest
            return RemoteImage(digest, chosen, await self._diff_ids(session, chosen, what, listed=listed))

    async def _diff_ids(self, session: _Session, manifest: Manifest, what: str, *, listed: bool) -> tuple[str, ...]:
        if manifest.config_size > MAX_CONFIG_BYTES:
            raise BadImage(f"the configuration of {what} has {manifest.config_size} bytes")
        config = await session.get("blobs", manifest.config, MAX_CONFIG_BYTES)
        check_digest(config, manifest.config, f"the configuration of {what}")
        if not listed:
            check_platform(config, self._platform, what)
        return diff_ids(config, what)

    @asynccontextmanager
    async def _session(
        self, reference: ImageReference, credentials: RegistryCredentials | None
    ) -> AsyncIterator[_Session]:
        domain = reference.domain
        host = _HUB_HOST if domain == DEFAULT_DOMAIN else domain
        url = httpx.URL(f"https://{host}")
        try:
            addresses = await resolve(url.host, url.port or 443)
        except (OSError, UnicodeError) as error:
            raise RegistryUnreachable(f"the registry {domain} cannot be found: {error}") from error
        insecure = self._insecure.cover(domain, addresses)
        private = self._allow_private(domain)

        def judge(name: str, address: IpAddress) -> bool:
            # The registry's own host may be private if the owner says so; whatever it refers to beyond must be public.
            return is_public(address) or (private and name == url.host)

        transport = GuardedTransport(judge, verify=self._context(verify=not insecure))
        async with httpx.AsyncClient(
            transport=transport,
            follow_redirects=True,
            max_redirects=MAX_REDIRECTS,
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            headers={"User-Agent": f"ngpu-node/{software_version()}"},
        ) as client:
            session = _Session(client, f"https://{host}", reference, credentials, insecure=insecure)
            if insecure:
                await session.find_scheme()
            yield session

    def _context(self, *, verify: bool) -> ssl.SSLContext:
        # 20 ms each, with all of the machine's authorities
        if verify not in self._tls:
            context = ssl.create_default_context()
            if not verify:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            self._tls[verify] = context
        return self._tls[verify]


class _Session:
    """One conversation with one registry about one repository."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        base: str,
        reference: ImageReference,
        credentials: RegistryCredentials | None,
        *,
        insecure: bool,
    ) -> None:
        self._client = client
        self._base = base
        self._reference = reference
        self._credentials = credentials
        self._insecure = insecure
        self._authorization: str | None = None

    async def find_scheme(self) -> None:
        """Go over to plain HTTP where an insecure registry speaks no TLS, as the engine does."""
        try:
            await self._client.get(f"{self._base}/v2/", follow_redirects=False)
        except httpx.TransportError as error:
            if isinstance(error, AddressRefused):
                raise self._refused(error) from error
            self._base = self._base.replace("https://", "http://", 1)

    async def get(self, kind: str, target: str, limit: int) -> bytes:
        """Return a manifest or blob of the repository, at most *limit* bytes."""
        url = f"{self._base}/v2/{self._reference.path}/{kind}/{target}"
        status, headers, data = await self._fetch(url, limit, self._authorization)
        if status == 401 and self._authorization is None:
            self._authorization = await self._answer_challenge(headers.get("www-authenticate", ""))
            if self._authorization is not None:
                status, headers, data = await self._fetch(url, limit, self._authorization)
        if status == 200:
            return data
        raise from_registry(
            status,
            _words(data),
            str(self._reference),
            logged_in=self._credentials is not None,
            after_s=_retry_after_s(headers),
        )

    async def _fetch(self, url: str, limit: int, authorization: str | None) -> tuple[int, httpx.Headers, bytes]:
        headers = {"Accept": ACCEPT}
        if authorization is not None:
            headers["Authorization"] = authorization
        try:
            async with self._client.stream("GET", url, headers=headers) as response:
                limit = limit if response.status_code == 200 else MAX_ERROR_BYTES
                data = bytearray()
                async for part in response.aiter_bytes(64 * 1024):
                    data += part
                    if len(data) > limit:
                        if response.status_code == 200:
                            raise BadImage(f"{self._reference}: the registry's answer is longer than {limit} bytes")
                        break
                return response.status_code, response.headers, bytes(data[:limit])
        except AddressRefused as error:
            raise self._refused(error) from error
        except (httpx.TransportError, httpx.DecodingError, httpx.TooManyRedirects, httpx.InvalidURL) as error:
            said = str(error) or type(error).__name__
            raise RegistryUnreachable(f"the registry {self._reference.domain} does not answer: {said}") from error

    def _refused(self, error: AddressRefused) -> AddressNotAllowed:
        return AddressNotAllowed(
            f"{self._reference}: {error}; this node's owner takes no images from there unless it is listed"
        )

    async def _answer_challenge(self, challenge: str) -> str | None:
        """Return the Authorization that *challenge* asks for; None when there is nothing to answer with."""
        scheme, _, rest = challenge.partition(" ")
        fields = {name.lower(): value for name, value in _CHALLENGE.findall(rest[:4096])}
        if scheme.lower() == "basic":
            return self._basic()
        if scheme.lower() != "bearer" or not fields.get("realm"):
            return None
        try:
            realm = httpx.URL(fields["realm"])
        except httpx.InvalidURL:
            raise BadImage(f"the registry {self._reference.domain} names a token service that is no URL") from None
        if realm.scheme != "https" and not (self._insecure and realm.scheme == "http"):
            raise BadImage(f"the registry {self._reference.domain} names a token service without TLS")
        query = {"scope": fields.get("scope") or f"repository:{self._reference.path}:pull"}
        if fields.get("service"):
            query["service"] = fields["service"]
        url = realm.copy_merge_params(query)
        status, headers, data = await self._fetch(str(url), MAX_TOKEN_BYTES, self._basic())
        if status != 200:
            raise from_registry(
                status,
                _words(data),
                str(self._reference),
                logged_in=self._credentials is not None,
                after_s=_retry_after_s(headers),
            )
        return f"Bearer {_token(data, self._reference.domain)}"

    def _basic(self) -> str | None:
        if self._credentials is None:
            return None
        pair = f"{self._credentials.username}:{self._credentials.password}"
        return "Basic " + base64.b64encode(pair.encode()).decode()


def _token(data: bytes, domain: str) -> str:
    try:
        answer = json.loads(data)
        token = answer.get("token") or answer["access_token"]
    except (ValueError, AttributeError, KeyError, RecursionError):
        token = None
    if not isinstance(token, str) or not token.isascii() or not token.isprintable() or " " in token:
        raise BadImage(f"the token service of {domain} gave no token")
    return token


def _words(data: bytes) -> str:
    """Return the message in an error's body, which should be `{"errors": [{"code", "message"}]}`."""
    try:
        error = json.loads(data)["errors"][0]
        return f"{error['code']}: {error['message']}"
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return "" if b"<" in data else data.decode(errors="replace")


def _retry_after_s(headers: httpx.Headers) -> float | None:
    value = headers.get("retry-after", "")
    if value.isascii() and value.isdigit():
        return float(value[:6])
    try:
        at, now = parsedate_to_datetime(value), parsedate_to_datetime(headers["date"])
        return max(0.0, (at - now).total_seconds())
    except (ValueError, TypeError, KeyError):
        return None
