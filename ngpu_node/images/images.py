"""The images of one node: had when a deployment wants one, and gone when their room is needed.

Owns the way from a wish to an image on the engine: what the owner allows, what is here already and who may use it,
what the registry says, the pull itself and its end, tries after failures. Room on the disk, and what goes so that
there is some, are `room`'s. Fetches of one image are
one, however many deployments wait for it; the last that leaves ends it. What an image is pulled as is always
`repository@sha256:…`, so that a tag moving in between changes nothing, and no tag of the owner's is touched.

    ensure(wish) -> is it here, and may this workspace use it? -> what does the registry say? -> make room -> pull ->
    does the engine have that digest? -> held until `release`
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any

import structlog
import trio

from ngpu_daemon.outbound import without_query
from ngpu_node.config import ImageSettings
from ngpu_node.errors import EngineFailed, EngineUnavailable
from ngpu_node.images.archive import for_engine, gunzipped
from ngpu_node.images.disk import FreeBytes, free_bytes_at, room_for_archive, room_for_pull
from ngpu_node.images.download import Download
from ngpu_node.images.engine_images import EngineImages
from ngpu_node.images.manifests import Platform, RemoteImage
from ngpu_node.images.problems import (
    BadArchive,
    BadImage,
    ImageMissing,
    ImageProblem,
    NoPin,
    OutOfSpace,
    PinConflict,
    PullBroke,
    RegistryNotAllowed,
    Stalled,
    TookTooLong,
    TooLarge,
    WrongChecksum,
    from_engine,
)
from ngpu_node.images.progress import Progress, PullProgress
from ngpu_node.images.registry import InsecureRegistries, Registry, RegistryUnreachable
from ngpu_node.images.retrying import wait_before_retry
from ngpu_node.images.room import DiskRoom
from ngpu_node.images.shelf import Entry, Shelf, is_pinned, prove
from ngpu_protocol.image_references import ImageReference, parse_image_reference
from ngpu_protocol.workspace_secrets import NO_SECRETS, RegistryCredentials, WorkspaceSecrets, with_query
from ngpu_protocol.workspaces import WorkspaceSpec

log = structlog.get_logger(__name__)

TELL_INTERVAL_S = 0.5
WATCH_INTERVAL_S = 0.5
PRESSURE_INTERVAL_S = 60.0
SETTLE_S = 10.0
#: Unpacking moves in large steps: a layer is flushed to disk as a whole.
UNPACK_STALL_FACTOR = 5
MAX_CHAINS = 200

#: Where images from tars are named on the engine: `.invalid` can be no registry's (RFC 2606).
ARCHIVE_NAME = "archive.ngpu.invalid/image"


@dataclass(frozen=True, slots=True)
class ImageWish:
    """An image somebody wants on this node.

    Attributes:
        holder: who, to the revision: `service/workspace/revision`.
        workspace: whose rights count: `service/workspace`.
        reference: at a registry; None for a tar.
        url: of a tar; None for a reference.
        sha256: of the file at *url*, hexadecimal.
        digest: SHA-256 of the one image that will do; None while the revision is not pinned.
    """

    holder: str
    workspace: str
    reference: ImageReference | None = None
    url: str = field(default="", repr=False)
    sha256: str = ""
    digest: bytes | None = None
    credentials: RegistryCredentials | None = field(default=None, repr=False)

    @classmethod
    def of(cls, service: str, spec: WorkspaceSpec, secrets: WorkspaceSecrets = NO_SECRETS) -> ImageWish:
        """Return what *spec* wants."""
        workspace = f"{service}/{spec.id}"
        pin = spec.image_digest
        return cls(
            holder=f"{workspace}/{spec.revision}",
            workspace=workspace,
            reference=parse_image_reference(spec.image) if spec.image is not None else None,
            url=with_query(spec.image_url or "", secrets),
            sha256=spec.image_sha256 or "",
            digest=bytes.fromhex(pin.removeprefix("sha256:")) if pin else None,
            credentials=secrets.registry,
        )

    def __str__(self) -> str:
        return str(self.reference) if self.reference is not None else without_query(self.url)


@dataclass(frozen=True, slots=True)
class LocalImage:
    """An image on the engine.

    Attributes:
        id: the engine's own, to start containers from.
        digest: what names it everywhere, 32 bytes: of its manifest, or its id where it came from no registry.
    """

    id: str
    digest: bytes


@dataclass(eq=False, slots=True)
class _Fetch:
    """One image on its way, for all who wait for it."""

    name: str
    progress: PullProgress
    need: int = 0
    note: str = ""
    waiters: int = 0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: trio.Event = field(default_factory=trio.Event)
    image: LocalImage | None = None
    error: Exception | None = None

    def look(self) -> Progress:
        return self.progress.look(trio.current_time(), self.note)

    @property
    def promised(self) -> int:
        """Bytes of its need that it has not taken yet."""
        return int(self.need * (1 - self.look().percent / 100))


Tell = Callable[[Progress], None]


class Images:
    """The images of one node; `run` must be running for `ensure` to get anywhere."""

    def __init__(
        self,
        engine: EngineImages,
        settings: ImageSettings,
        shelf: Shelf,
        *,
        registry: Registry,
        free_bytes: FreeBytes = lambda: None,
        now_ms: Callable[[], int] = lambda: int(time() * 1000),
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._shelf = shelf
        self._registry = registry
        self._now_ms = now_ms
        self._nursery: trio.Nursery | None = None
        self._running = trio.Event()
        self._turns = trio.CapacityLimiter(settings.parallel)
        self._fetches: dict[str, _Fetch] = {}
        #: by holder: name and id of what it has, or is waiting for
        self._held: dict[str, tuple[str, str]] = {}
        self.disk = DiskRoom(
            engine,
            settings,
            shelf,
            free_bytes=free_bytes,
            guests=self._fetches.values,
            held=self._held.values,
        )

    @classmethod
    async def open(cls, settings: ImageSettings, path: Path | None) -> Images:
        """Return the images of the engine that the environment leads to; the list of ours is at *path*.

        Raises:
            EngineUnavailable, EngineFailed: it does not answer.
        """
        engine = EngineImages.from_environment()
        try:
            info = await engine.info()
        except BaseException:
            await engine.aclose()
            raise
        root = str(info.get("DockerRootDir") or "")
        allowed = frozenset(settings.registries)
        registry = Registry(
            _platform(info),
            insecure=InsecureRegistries.of_engine(info),
            allow_private=lambda domain: settings.private_addresses or domain in allowed,
        )
        return cls(engine, settings, Shelf(path), registry=registry, free_bytes=lambda: free_bytes_at(root))

    async def aclose(self) -> None:
        """Write the list a last time and close the connections to the engine."""
        await self._shelf.save()
        await self._engine.aclose()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetch what is asked for and look after the disk, until cancelled; then fetches end, and leave nothing."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                self._running.set()
                task_status.started()
                await self._look_after_leftovers()
                while True:
                    await trio.sleep(PRESSURE_INTERVAL_S)
                    await self.disk.relieve()
            finally:
                self._nursery = None  # from here on it takes nobody: `aclose` writes the list

    # -- what others see -----------------------------------------------------------------------------------------------

    def room(self) -> int | None:
        """Return the bytes that images may still take beyond the owner's reserve; None when nobody knows."""
        return self.disk.left()

    def listed(self) -> list[dict[str, Any]]:
        """Return what is on the shelf, for the owner; the last used first.

        `held_by` are the deployments that have it now, `remembered_for` those whose reference it was found to be;
        `kept` tells whether the owner's configuration keeps it, `borrowed` whether it was here before this node.
        """
        held: dict[str, list[str]] = {}
        for holder, (name, _) in self._held.items():
            held.setdefault(name, []).append(holder)
        return [
            {
                "image": entry.reference,
                "name": entry.name,
                "id": entry.id,
                "digest": f"sha256:{entry.digest}" if entry.digest else "",
                "bytes": entry.size,
                "used_at_ms": entry.used_ms,
                "in_use": entry.name in held,
                "held_by": sorted(held.get(entry.name, [])),
                "remembered_for": sorted(entry.resolved),
                "kept": any(is_pinned(entry, pin) for pin in self._settings.keep),
                "borrowed": entry.borrowed,
                "arriving": not entry.id,
            }
            for entry in sorted(self._shelf.entries(), key=lambda entry: -entry.used_ms)
        ]

    # -- wishes --------------------------------------------------------------------------------------------------------

    async def ensure(self, wish: ImageWish, on_progress: Tell = lambda progress: None) -> LocalImage:
        """Return the image *wish* asks for, fetched if need be; it is kept for its holder until `release`.

        Cancelled, it leaves the image to others who wait for it, and ends the download if there are none.

        Args:
            on_progress: told how far it is, now and then; percent and bytes never fall, 100 comes once at the end.

        Raises:
            ImageProblem: why it cannot be had; `retry` tells whether it may be another time.
            EngineUnavailable: the engine does not answer.
        """
        self._refuse_what_the_owner_does(wish)
        await self._running.wait()
        best = Progress()

        def tell(progress: Progress) -> None:
            nonlocal best
            best = Progress(
                max(best.percent, progress.percent),
                max(best.bytes_done, progress.bytes_done),
                max(best.bytes_total, progress.bytes_total),
                progress.seconds_left,
                progress.note,
                progress.reason,
            )
            on_progress(best)

        image = await self._try_until(wish, tell)
        tell(Progress(100, best.bytes_total, best.bytes_total, 0))
        return image

    def release(self, holder: str, *, forget: bool = False) -> None:
        """Note that *holder* does not need its image any more; it stays until its room is needed.

        Args:
            forget: it will not come back: what its reference was resolved to need not be remembered.
        """
        held = self._held.pop(holder, None)
        entry = self._shelf.get(held[0]) if held is not None else None
        if entry is not None:
            entry.used_ms = self._now_ms()
        if forget:
            self._shelf.forget(holder)
        if self._nursery is not None:
            self._nursery.start_soon(self._shelf.save)

    def _refuse_what_the_owner_does(self, wish: ImageWish) -> None:
        if wish.reference is not None:
            return  # what is here already may be used wherever it came from
        if not self._settings.tar_images:
            raise RegistryNotAllowed("this node's owner takes no images from URLs")
        if not wish.sha256:
            raise NoPin(f"the file at {wish} may be any: give its checksum as image_sha256")

    async def _try_until(self, wish: ImageWish, tell: Tell) -> LocalImage:
        began_s = trio.current_time()
        tries, last = 0, ""
        try:
            with trio.fail_after(self._settings.timeout_s):
                while True:
                    tries += 1
                    try:
                        return await self._once(wish, tell)
                    except ImageProblem as problem:
                        left_s = began_s + self._settings.timeout_s - trio.current_time()
                        wait_s = wait_before_retry(problem, tries, left_s)
                        if wait_s is None:
                            raise
                        last = str(problem)
                        log.info("image_retried", image=str(wish), reason=problem.reason, tries=tries, wait_s=wait_s)
                        note = f"{problem}; trying again in {wait_s:g} s"
                        tell(Progress(note=note, reason=problem.reason))
                        await trio.sleep(wait_s)
        except trio.TooSlowError:
            limit = f"{wish} is not here after {self._settings.timeout_s:g} s, the most the owner allows"
            raise TookTooLong(f"{limit}; last: {last}" if last else limit) from None

    async def _once(self, wish: ImageWish, tell: Tell) -> LocalImage:
        found = await self._take_local(wish)
        if found is not None:
            return found
        if wish.reference is None:
            return await self._join(wish, f"{ARCHIVE_NAME}:{wish.sha256}", lambda fetch: self._load(fetch, wish), tell)
        if not self._allows(wish.reference):
            raise RegistryNotAllowed(
                f"this node's owner takes no images from {wish.reference.domain}, "
                f"only from {', '.join(self._settings.registries)}"
            )
        remembered = self._shelf.resolved(wish.holder)
        reference = wish.reference
        if wish.digest is not None:
            reference = reference.pinned(wish.digest)
        elif remembered is not None and not remembered.borrowed:
            reference = reference.pinned(bytes.fromhex(remembered.digest))
        tell(Progress(note=f"asking the registry for {reference}"))
        try:
            digest, remote = await self._describe(reference, wish.credentials)
        except ImageMissing as missing:
            raise await self._why_missing(wish, missing) from missing
        pinned = reference.pinned(digest)
        proven = await self._take_local(wish, proven=pinned)
        if proven is not None:
            return proven
        return await self._join(wish, str(pinned), lambda fetch: self._pull(fetch, pinned, remote, wish), tell)

    async def _why_missing(self, wish: ImageWish, missing: ImageMissing) -> ImageProblem:
        """Return what is wrong with a wish whose image the registry has not: its pin, where it has another image.

        The first node that has a reference's image pins it for the others. One that lies, or a registry that dropped
        what a tag named before, shows here.
        """
        if wish.digest is None or wish.reference is None or wish.reference.digest is not None:
            return missing
        try:
            found, _ = await self._describe(wish.reference, wish.credentials)
        except ImageProblem:
            return missing
        return PinConflict(
            f"this revision is pinned to sha256:{wish.digest.hex()}, which the registry has not; {wish.reference} "
            f"is sha256:{found.hex()} there. Whoever has it first pins it: have it pinned anew (--repin), or give the "
            "digest in the reference"
        )

    async def _describe(
        self, reference: ImageReference, credentials: RegistryCredentials | None
    ) -> tuple[bytes, RemoteImage | None]:
        """Return the digest of *reference* and what is known of it, by asking the registry, or through the engine."""
        try:
            remote = await self._registry.describe(reference, credentials)
        except RegistryUnreachable as unreachable:
            # The engine may know a way: a proxy, a mirror, another machine's network.
            try:
                digest = await self._engine.remote_digest(reference, credentials)
            except EngineFailed as error:
                problem = from_engine(str(error), str(reference), logged_in=credentials is not None)
                raise (unreachable if isinstance(problem, PullBroke) else problem) from error
            log.info("image_sizes_unknown", image=str(reference), reason=str(unreachable))
            return _digest_bytes(digest, str(reference)), None
        limit = self._settings.max_image_bytes
        if limit is not None and remote.size > limit:
            raise TooLarge(str(reference), size=remote.size, limit=limit)
        return remote.digest, remote

    # -- what is here already ------------------------------------------------------------------------------------------

    async def _take_local(self, wish: ImageWish, *, proven: ImageReference | None = None) -> LocalImage | None:
        """Take what is on the engine and may be used for *wish*; None when there is nothing such.

        Args:
            proven: what the registry has shown to this workspace just now.
        """
        async with self.disk.taking:
            for name, digest in self._candidates(wish, proven):
                attrs = await self._engine.inspect(name)
                if attrs is None:
                    continue
                image = LocalImage(str(attrs["Id"]), digest or _digest_of(attrs, wish.reference))
                shown = proven is not None and proven.digest_bytes == image.digest
                if not shown and not self._may_use(wish, image):
                    continue
                entry = self._entry_for(wish, image, attrs)
                if shown:
                    prove(entry, wish.workspace)
                self._hold(wish, entry)
                await self._shelf.save()
                return image
        return None

    def _candidates(self, wish: ImageWish, proven: ImageReference | None) -> list[tuple[str, bytes | None]]:
        """Return the names under which the engine may have it, each with the digest that name stands for."""
        if wish.reference is None:
            return [(f"{ARCHIVE_NAME}:{wish.sha256}", wish.digest)]
        digest = wish.digest or wish.reference.digest_bytes or (proven.digest_bytes if proven is not None else None)
        names: list[tuple[str, bytes | None]] = []
        if digest is None and (remembered := self._shelf.resolved(wish.holder)) is not None:
            digest = bytes.fromhex(remembered.digest)
            names.append((str(wish.reference), None))  # what it came to may be gone; the tag is what was asked for
        if digest is None:
            return [(str(wish.reference), None)]
        # The id too: where an image came from no registry, that is its digest.
        return [(str(wish.reference.pinned(digest)), digest), ("sha256:" + digest.hex(), digest), *names]

    def _allows(self, reference: ImageReference) -> bool:
        return not self._settings.registries or reference.domain in self._settings.registries

    def _may_use(self, wish: ImageWish, image: LocalImage) -> bool:
        known = self._shelf.with_id(image.id)
        own = [entry for entry in known if not entry.borrowed]
        if own:
            if wish.reference is not None and not self._allows(wish.reference):
                return False
            return any(entry.may_be_used_by(wish.workspace) for entry in own)
        return self._settings.local_images or any(wish.workspace in entry.proven for entry in known)

    def _entry_for(self, wish: ImageWish, image: LocalImage, attrs: Mapping[str, Any]) -> Entry:
        """Return what the shelf knows of *image*; a new entry, as borrowed, when it knows nothing."""
        known = self._shelf.with_id(image.id)
        if known:
            return next((entry for entry in known if not entry.borrowed), known[0])
        name = str(wish.reference.pinned(image.digest)) if wish.reference else f"{ARCHIVE_NAME}:{wish.sha256}"
        entry = self._shelf.get(name) or Entry(name, str(wish), borrowed=True)
        entry.id, entry.digest, entry.size = image.id, image.digest.hex(), int(attrs.get("Size") or 0)
        self._shelf.put(entry)
        return entry

    def _hold(self, wish: ImageWish, entry: Entry) -> None:
        self._held[wish.holder] = (entry.name, entry.id)
        self._shelf.remember(entry, wish.holder, self._now_ms())

    # -- fetching, once for all who want it ----------------------------------------------------------------------------

    async def _join(
        self, wish: ImageWish, name: str, work: Callable[[_Fetch], Awaitable[LocalImage]], tell: Tell
    ) -> LocalImage:
        while (fetch := self._fetches.get(name)) is not None and fetch.scope.cancel_called:
            await fetch.done.wait()
        if fetch is None:
            assert self._nursery is not None
            fetch = self._fetches[name] = _Fetch(name, PullProgress(None), note="waiting for other images")
            self._nursery.start_soon(self._fetch, fetch, work)
        before = self._held.get(wish.holder)
        self._held[wish.holder] = (name, "")  # from here on, so that it cannot go between its arrival and our notice
        fetch.waiters += 1
        try:
            while not fetch.done.is_set():
                tell(fetch.look())
                with trio.move_on_after(TELL_INTERVAL_S):
                    await fetch.done.wait()
            if fetch.image is None:
                assert fetch.error is not None
                raise fetch.error
            tell(fetch.look())
            entry = self._shelf.get(name)
            assert entry is not None
            if wish.credentials is not None:
                prove(entry, wish.workspace)
            self._hold(wish, entry)
            await self._shelf.save()
            return fetch.image
        except BaseException:
            if before is None:
                self._held.pop(wish.holder, None)
            else:
                self._held[wish.holder] = before
            raise
        finally:
            fetch.waiters -= 1
            if fetch.waiters == 0:
                fetch.scope.cancel()
                with trio.move_on_after(SETTLE_S, shield=True):  # so that whoever leaves leaves nothing behind
                    await fetch.done.wait()

    async def _fetch(self, fetch: _Fetch, work: Callable[[_Fetch], Awaitable[LocalImage]]) -> None:
        fetch.error = PullBroke("the pull was broken off")
        try:
            with fetch.scope:
                async with self._turns:
                    fetch.note = ""
                    fetch.image = await work(fetch)
        except (ImageProblem, EngineUnavailable, EngineFailed) as error:
            fetch.error = error
        except Exception as error:
            # one image's fetch must not end the daemon
            log.exception("image_fetch_crashed", image=fetch.name)
            fetch.error = PullBroke(f"internal error: {error}")
        finally:
            del self._fetches[fetch.name]
            fetch.done.set()

    async def _pull(
        self, fetch: _Fetch, reference: ImageReference, remote: RemoteImage | None, wish: ImageWish
    ) -> LocalImage:
        what, logged_in = str(wish), wish.credentials is not None
        before = await self._engine.ids()
        if remote is not None:
            missing = remote.missing(await self._chains(before))
            fetch.progress = PullProgress({layer.digest: layer.size for layer in missing})
            await self.disk.make(fetch, what, room_for_pull(sum(layer.size for layer in missing)))
        there = remote is not None and (remote.manifest.config in before or "sha256:" + remote.digest.hex() in before)
        entry = Entry(fetch.name, what, borrowed=there, restricted=logged_in)
        entry.digest = reference.digest_bytes.hex() if reference.digest_bytes else ""
        log.info("image_pull_started", image=fetch.name, bytes=fetch.progress.total, workspace=wish.workspace)

        async def events() -> None:
            async with aclosing(self._engine.pull(reference, wish.credentials)) as told:
                async for event in told:
                    if "error" in event:
                        raise from_engine(str(event["error"]), what, logged_in=logged_in)
                    fetch.progress.feed(event)

        async with self._noted(entry, before):
            try:
                await self._watched(fetch, what, events)
            except EngineFailed as error:
                raise from_engine(str(error), what, logged_in=logged_in) from error
            attrs = await self._engine.inspect(fetch.name)
            if attrs is None or reference.digest not in _digests(attrs):
                raise PullBroke(f"{what} was pulled, but the engine does not have {reference.digest}")
        log.info("image_pulled", image=fetch.name, bytes=entry.size)
        return LocalImage(entry.id, bytes.fromhex(entry.digest))

    async def _load(self, fetch: _Fetch, wish: ImageWish) -> LocalImage:
        """Stream a tar from its URL through its checksum into the engine."""
        fetch.note = f"fetching {wish}"
        before = await self._engine.ids()
        download = Download(
            wish.url,
            limit=self._settings.max_image_bytes,
            answer_timeout_s=self._settings.stall_timeout_s,
            allow_private=lambda host: self._settings.private_addresses or host in self._settings.registries,
        )
        entry = Entry(fetch.name, str(wish))
        async with download, self._noted(entry, before):
            await self.disk.make(fetch, str(wish), room_for_archive(download.size))
            checksum = hashlib.sha256()

            async def pieces() -> AsyncGenerator[bytes, None]:
                async with aclosing(download.pieces()) as came:
                    async for piece in came:
                        checksum.update(piece)
                        fetch.progress.downloaded(download.received, download.size)
                        yield piece

            async def confirm() -> None:
                if checksum.hexdigest() != wish.sha256:
                    raise WrongChecksum(
                        f"the file at {wish} has another checksum: {wish.sha256} was asked for, "
                        f"{checksum.hexdigest()} came; give the new one with a new revision"
                    )
                fetch.note = "unpacking"

            async def events() -> None:
                async with (
                    aclosing(pieces()) as raw,
                    aclosing(gunzipped(raw)) as plain,
                    aclosing(for_engine(plain, tag=fetch.name, confirm=confirm)) as tar,
                    aclosing(self._engine.load(tar)) as told,
                ):
                    async for event in told:
                        fetch.progress.moved += 1
                        if "error" in event:
                            raise _from_load(str(event["error"]), str(wish))

            try:
                await self._watched(fetch, str(wish), events)
            except EngineFailed as error:
                raise _from_load(str(error), str(wish)) from error
            attrs = await self._engine.inspect(fetch.name)
            if attrs is None:
                raise PullBroke(f"the engine loaded the file at {wish}, but has no image of it")
            if wish.digest is not None and attrs["Id"] != "sha256:" + wish.digest.hex():
                raise WrongChecksum(f"the file at {wish} holds another image than this revision is pinned to")
        log.info("image_loaded", image=fetch.name, bytes=entry.size)
        return LocalImage(entry.id, bytes.fromhex(entry.digest))

    async def _watched(self, fetch: _Fetch, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run *work*, and break it off when it stalls, outgrows the owner's limit, or the disk fills up."""
        verdict: Exception | None = None

        async def go() -> None:
            nonlocal verdict
            try:
                await work()
            except (ImageProblem, EngineUnavailable, EngineFailed) as error:
                verdict = verdict or error
            nursery.cancel_scope.cancel()

        async def watch() -> None:
            nonlocal verdict
            free_before = self.disk.free_bytes()
            moved, moved_s = fetch.progress.moved, trio.current_time()
            while True:
                await trio.sleep(min(WATCH_INTERVAL_S, self._settings.stall_timeout_s / 4))
                if fetch.progress.moved != moved:
                    moved, moved_s = fetch.progress.moved, trio.current_time()
                limit_s = self._settings.stall_timeout_s
                limit_s *= UNPACK_STALL_FACTOR if fetch.progress.unpacking else 1
                verdict = self._reason_to_stop(fetch, what, free_before)
                if verdict is None and trio.current_time() - moved_s >= limit_s:
                    verdict = Stalled(f"nothing of {what} has arrived for {limit_s:g} s")
                if verdict is not None:
                    nursery.cancel_scope.cancel()
                    return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            nursery.start_soon(go)
        if verdict is not None:
            raise verdict

    def _reason_to_stop(self, fetch: _Fetch, what: str, free_before: int | None) -> ImageProblem | None:
        settings = self._settings
        if settings.max_image_bytes is not None and fetch.progress.total > settings.max_image_bytes:
            return TooLarge(what, size=fetch.progress.total, limit=settings.max_image_bytes)
        return self.disk.overrun(fetch, what, free_before)

    def _noted(self, entry: Entry, before: set[str]) -> _Noted:
        return _Noted(self._engine, self._shelf, entry, before, self._now_ms)

    async def _chains(self, ids: set[str]) -> list[list[str]]:
        chains = []
        for image_id in sorted(ids)[:MAX_CHAINS]:
            attrs = await self._engine.inspect(image_id)
            if attrs is not None:
                chains.append(list((attrs.get("RootFS") or {}).get("Layers") or []))
        return chains

    async def _look_after_leftovers(self) -> None:
        """Find out about images whose fetch a killed daemon did not see the end of."""
        for entry in self._shelf.entries():
            if entry.id or entry.name in self._fetches:
                continue
            try:
                await _settle(self._engine, self._shelf, entry, set(), self._now_ms)
            except (EngineUnavailable, EngineFailed) as error:
                log.info("image_not_looked_at", image=entry.name, reason=str(error))


class _Noted:
    """Has an image on the shelf before its fetch begins, and what became of it after, however it ended."""

    def __init__(
        self, engine: EngineImages, shelf: Shelf, entry: Entry, before: set[str], now_ms: Callable[[], int]
    ) -> None:
        self._engine = engine
        self._shelf = shelf
        self._entry = entry
        self._before = before
        self._now_ms = now_ms

    async def __aenter__(self) -> None:
        self._shelf.put(self._entry)
        await self._shelf.save()

    async def __aexit__(self, *ended: object) -> None:
        with trio.move_on_after(SETTLE_S, shield=True):
            try:
                await _settle(self._engine, self._shelf, self._entry, self._before, self._now_ms)
            except (EngineUnavailable, EngineFailed):
                # The entry stays without an id; the next start, or the next wish for it, finds out.
                if ended[0] is None:
                    raise


async def _settle(
    engine: EngineImages, shelf: Shelf, entry: Entry, before: set[str], now_ms: Callable[[], int]
) -> None:
    attrs = await engine.inspect(entry.name)
    if attrs is None:
        shelf.drop(entry.name)
    else:
        entry.id, entry.size, entry.used_ms = str(attrs["Id"]), int(attrs.get("Size") or 0), now_ms()
        entry.digest = entry.digest or entry.id.removeprefix("sha256:")
        entry.borrowed = entry.borrowed or entry.id in before
    await shelf.save()


def _platform(info: Mapping[str, Any]) -> Platform:
    machine = str(info.get("Architecture") or "")
    known = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm", "i686": "386", "i386": "386"}
    return Platform(str(info.get("OSType") or "linux"), known.get(machine, machine or "amd64"))


def _digests(attrs: Mapping[str, Any]) -> set[str]:
    return {str(named).partition("@")[2] for named in attrs.get("RepoDigests") or []}


def _digest_of(attrs: Mapping[str, Any], reference: ImageReference | None) -> bytes:
    """Return what names the image everywhere: its registry's digest where it came from one, else the engine's id."""
    for named in attrs.get("RepoDigests") or []:
        name, _, digest = str(named).partition("@")
        if reference is not None and name in (reference.familiar_name, reference.name):
            return _digest_bytes(digest, str(named))
    return _digest_bytes(str(attrs["Id"]), str(attrs["Id"]))


def _digest_bytes(digest: str, what: str) -> bytes:
    try:
        raw = bytes.fromhex(digest.removeprefix("sha256:"))
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise BadImage(f"{what} has a digest of a kind that is not supported: {digest[:100]}")
    return raw


def _from_load(words: str, url: str) -> ImageProblem:
    if "no space left" in words.lower():
        return OutOfSpace(f"the disk filled up while the file at {url} was loaded: the engine says {words[:200]!r}")
    return BadArchive(f"the engine cannot load the file at {url}: it says {words[:200]!r}")
