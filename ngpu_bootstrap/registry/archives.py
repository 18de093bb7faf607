"""Images that clients give as the URL of a `docker save` file: fetched once here, to learn their SHA-256.

A revision whose `image_sha256` its client gave goes to nodes as it is. Without one the file could be another on each
node, so this bootstrap reads it once, through a filter that refuses addresses of its own network, and pins the sum;
only then is the revision assigned (`deployments`). Nothing of the file is kept. What can pass is tried again, ever more
rarely; what cannot is said in the deployments' view, and fails the revision where it is an update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import structlog
import trio

from ngpu_bootstrap.errors import Refusal
from ngpu_bootstrap.registry.rollout import Failure
from ngpu_bootstrap.registry.workspaces import Workspace, Workspaces
from ngpu_bootstrap.store.errors import StoreError
from ngpu_daemon.outbound import AddressRefused, without_query
from ngpu_protocol.identity import Address
from ngpu_protocol.workspaces import WorkspaceSpec

log = structlog.get_logger(__name__)

FETCHES_AT_ONCE = 2
MAX_REDIRECTS = 5
STALL_S = 60.0
WAITS_S = (5.0, 15.0, 60.0, 300.0)

_NOWHERE = Address("")


class ArchiveRefused(Exception):
    """The file cannot be had, now or later: a stable word and a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """How large a file is read, and for how long."""

    max_bytes: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Hindrance:
    """What a revision without a known sum waits for: a stable word and a sentence."""

    reason: str
    detail: str


def needs_sum(spec: WorkspaceSpec) -> bool:
    """Return whether nodes must not get *spec* yet."""
    return spec.image_url is not None and spec.image_sha256 is None


class Archives:
    """Reads the files that have no sum yet. Its `run` must be running.

    Args:
        transport: makes what connects, with its filter of addresses.
    """

    def __init__(
        self, workspaces: Workspaces, *, transport: Callable[[], httpx.AsyncBaseTransport], limits: ArchiveLimits
    ) -> None:
        self._workspaces = workspaces
        self._transport = transport
        self._limits = limits
        self._places = trio.CapacityLimiter(FETCHES_AT_ONCE)
        self._hindrances: dict[tuple[str, int], Hindrance] = {}
        self._changed = trio.Event()

    def look(self) -> None:
        """Look for files to read: a workspace has changed."""
        self._changed.set()

    def hindrance(self, spec: WorkspaceSpec) -> Hindrance:
        """Return what *spec*, which `needs_sum`, waits for."""
        return self._hindrances.get((spec.id, spec.revision), _QUEUED)

    async def run(self) -> None:
        """Read files as they come up; for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                wanted = {(one.id, one.wanted.revision): one for one in self._workspaces if needs_sum(one.wanted)}
                for key in self._hindrances.keys() - wanted.keys():
                    del self._hindrances[key]
                for key, workspace in wanted.items():
                    if key not in self._hindrances:
                        self._hindrances[key] = _QUEUED
                        nursery.start_soon(self._learn, workspace)
                await self._changed.wait()
                self._changed = trio.Event()

    async def _learn(self, workspace: Workspace) -> None:
        """Learn the sum of one revision's file, or why it cannot be had."""
        spec = workspace.wanted
        # shown, and logged, without its query, which often is a signature
        key, url = (spec.id, spec.revision), without_query(spec.image_url or "")
        attempt = 0
        while key in self._hindrances:
            try:
                async with self._places:
                    found = await self._read(key, url, await self._workspaces.url_of(spec))
                log.info("archive_read", workspace=spec.id, revision=spec.revision, sha256=found)
                await self._workspaces.pin(spec.id, spec.revision, sha256=found)
                return
            except AddressRefused as error:
                await self._give_up(key, "address_not_allowed", f"{url}: {error}")
                return
            except httpx.TooManyRedirects:
                await self._give_up(key, "image_unreachable", f"{url} redirects more than {MAX_REDIRECTS} times")
                return
            except ArchiveRefused as refused:
                await self._give_up(key, refused.reason, str(refused))
                return
            except (httpx.HTTPError, httpx.InvalidURL, trio.TooSlowError, StoreError, Refusal) as error:
                wait_s = WAITS_S[min(attempt, len(WAITS_S) - 1)]
                attempt += 1
                why = str(error) or type(error).__name__
                self._note(key, Hindrance("image_unreachable", f"{url}: {why}; trying again in {wait_s:g} s"))
                await trio.sleep(wait_s)
            except Exception as error:  # ours to mend: what one server answers must not end this bootstrap
                log.exception("archive_crashed", workspace=spec.id, revision=spec.revision)
                await self._give_up(key, "image_unreachable", f"{url}: it cannot be read: {type(error).__name__}")
                return

    async def _give_up(self, key: tuple[str, int], reason: str, detail: str) -> None:
        workspace_id, revision = key
        log.info("archive_refused", workspace=workspace_id, revision=revision, reason=reason, detail=detail)
        self._note(key, Hindrance(reason, detail))
        workspace = self._workspaces.get(workspace_id)
        if workspace is not None and workspace.is_rolling and workspace.wanted.revision == revision:
            await self._workspaces.roll_failed(workspace, Failure(_NOWHERE, reason, detail))

    async def _read(self, key: tuple[str, int], url: str, whole_url: str) -> str:
        checksum, read = hashlib.sha256(), 0
        timeout = httpx.Timeout(STALL_S)
        with trio.fail_after(self._limits.timeout_s):
            async with (
                httpx.AsyncClient(
                    transport=self._transport(), timeout=timeout, follow_redirects=True, max_redirects=MAX_REDIRECTS
                ) as client,
                client.stream("GET", whole_url, headers={"Accept-Encoding": "identity"}) as response,
            ):
                _check_status(url, response.status_code)
                total = int(response.headers.get("Content-Length", 0))
                self._check_size(url, total)
                async for piece in response.aiter_raw():
                    checksum.update(piece)
                    read += len(piece)
                    self._check_size(url, read)
                    share = f"{100 * read // total} %" if total else f"{read >> 20} MiB"
                    self._note(key, Hindrance("image_unpinned", f"the bootstrap reads {url} for its checksum: {share}"))
        return checksum.hexdigest()

    def _check_size(self, url: str, size: int) -> None:
        if size > self._limits.max_bytes:
            raise ArchiveRefused(
                "image_too_large", f"{url} has more than the {self._limits.max_bytes >> 20} MiB this bootstrap reads"
            )

    def _note(self, key: tuple[str, int], hindrance: Hindrance) -> None:
        if key in self._hindrances:
            self._hindrances[key] = hindrance


def _check_status(url: str, status: int) -> None:
    if status == 200:
        return
    if status in (408, 425, 429) or status >= 500:
        raise httpx.HTTPError(f"the server answered {status}")
    reason = {401: "image_denied", 403: "image_denied", 404: "image_missing", 410: "image_missing"}
    raise ArchiveRefused(reason.get(status, "image_unreachable"), f"{url}: the server answered {status}")


_QUEUED = Hindrance("image_unpinned", "the bootstrap is about to read the image's file for its checksum")
