"""The node: builds the parts, opens the nursery, and takes it all down in order. The one module that knows everybody.

Start: what can be wrong on this machine (ledger, ports, engine) is found before any bootstrap hears of this run.
Ready is when peers can reach it and its own sockets listen; bootstraps are dialled from then on.

End, in this order: refuse new orders and say so; let running ones finish, or end them with a receipt; let their last
bytes out; say goodbye; stop containers; close the ledger. A second signal skips the waiting.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import trio

from ngpu_daemon import garbage
from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.discovery import Discovery
from ngpu_daemon.drain import Drain
from ngpu_daemon.keystore import open_keystore
from ngpu_daemon.metrics import new_registry, software_version
from ngpu_daemon.notify import Notifier, run_watchdog
from ngpu_node.admin import AdminApi, serve_admin_socket
from ngpu_node.advertiser import Machine, describe, record_gpus
from ngpu_node.changes import Changes
from ngpu_node.config import NodeSettings, split_listen
from ngpu_node.container_logs import ContainerLogs
from ngpu_node.courier import Courier
from ngpu_node.deployments import Deployment, Deployments
from ngpu_node.earnings import LEDGER_FILE
from ngpu_node.engine.backend import EngineBackend, EngineStatus, open_backend
from ngpu_node.engine.outlook import Finding
from ngpu_node.errors import LedgerUnavailable, NodeConfigurationError
from ngpu_node.execution.admission import AdmissionState
from ngpu_node.execution.attempts import Attempts
from ngpu_node.execution.executor import HTTP_PROTOCOL, Executor
from ngpu_node.execution.spool import Spool, SpoolLimits
from ngpu_node.gateway import Gateway
from ngpu_node.gpus.inventory import Withheld
from ngpu_node.gpus.machine import look_around
from ngpu_node.gpus.nvml import NvmlDriver
from ngpu_node.gpus.watch import GpuWatch, Surroundings
from ngpu_node.ledger import Ledger, Totals
from ngpu_node.links import Link, LinkParts
from ngpu_node.metrics import NodeMetrics
from ngpu_node.model_api import ModelApi
from ngpu_node.output_files import OutputFiles
from ngpu_node.owner import Owner
from ngpu_node.owner_api import OwnerApi
from ngpu_node.peer_calls import PeerCalls
from ngpu_node.services import ModelServers
from ngpu_node.state import NodeState, open_state
from ngpu_node.upstreams import Upstream
from ngpu_protocol.control import HostOffer
from ngpu_protocol.http1 import BoundAddress, Draining, Handler, Limits, Remote, serve_stream, serve_tcp
from ngpu_protocol.identity import Account, Address
from ngpu_protocol.networks import network_named
from ngpu_protocol.node_records import NodeRecord
from ngpu_protocol.p2p import Host, ListenError, NoAccountError, P2PStream, StreamHandler, open_host
from ngpu_protocol.prices import sign_price_list

log = structlog.get_logger(__name__)

#: Orders bring a head of 16 KiB and a target with our prefix before the client's own fields.
HTTP_LIMITS = Limits(max_head_bytes=64 * 1024, max_target_bytes=9 * 1024)
LAST_BYTES_S = 3.0
TOTALS_INTERVAL_S = 30.0


async def run_daemon(settings: NodeSettings, passphrase: Callable[[], str]) -> None:
    """Run a node until it is told to stop.

    Args:
        passphrase: returns what opens the keystore; asked once, after the data directory is ours.

    Raises:
        OperatorError: what must be changed before it can start; nothing listened.
    """
    directory = DataDirectory(settings.data_dir)
    with directory.lock():
        account = await trio.to_thread.run_sync(open_keystore, directory.keystore, passphrase())
        node = Node(settings, account, directory, drain=Drain(), notifier=Notifier.from_environment())
        await node.run()


class Node:
    """One running node; `run` is its whole life."""

    def __init__(
        self, settings: NodeSettings, account: Account, directory: DataDirectory, *, drain: Drain, notifier: Notifier
    ) -> None:
        self._settings = settings
        self._account = account
        self._directory = directory
        self._drain = drain
        self._notifier = notifier
        self._network = network_named(settings.network)
        self._trust = settings.trust()
        self._session = secrets.token_bytes(32)
        self._started_s = trio.current_time()
        self._registry = new_registry("ngpu-node")
        self._metrics = NodeMetrics(self._registry)
        self._changes = Changes()
        self._gpus = GpuWatch(
            NvmlDriver(),
            account.address,
            self._changes,
            withheld=Withheld(tuple(settings.gpus.withhold), settings.gpus.withhold_memory_bytes),
            shares=settings.gpus.shares_per_gpu,
            data_dir=settings.data_dir,
        )
        self._totals = Totals(0, 0)
        self._gateway_token = settings.gateway.token()
        self._links: list[Link] = []
        self._discovery: Discovery  # made with the host
        self._http_draining = Draining()
        self._deployments = Deployments(self._changes)
        self._servers = ModelServers(
            directory.path / "models.json", self._deployments, self._changes, allowed_hosts=settings.model_hosts
        )

    async def run(self) -> None:
        """Serve until drained.

        Raises:
            OperatorError: something the owner must mend, before anything listens.
            LedgerUnavailable: receipts cannot be kept any more.
        """
        settings = self._settings
        await self._gpus.look()
        ledger = await Ledger.open(self._directory.path / LEDGER_FILE, self._account, self._network.chain_id)
        try:
            async with (
                open_state(self._directory.path / "workspaces.db") as kept,
                open_backend(
                    settings,
                    account=self._account,
                    deployments=self._deployments,
                    books=kept,
                    gpus=self._gpus.usable,
                    reason_against=self._gpus.reason_against,
                ) as (backend, engine),
            ):
                self._gpus.surroundings = Surroundings(held=backend.held, holders=backend.holders)
                await self._serve(ledger, kept, backend, engine)
        finally:
            await ledger.aclose()

    async def _serve(self, ledger: Ledger, kept: NodeState, backend: EngineBackend, engine: EngineStatus) -> None:
        settings = self._settings
        limits = SpoolLimits(settings.limits.spool_answer_bytes, settings.limits.spool_total_bytes)
        spool = Spool(self._directory.path / "spool", ledger, limits)
        state: AdmissionState[Deployment] = AdmissionState(
            node=self._account.address,
            session=self._session,
            chain_id=self._network.chain_id,
            trust=self._trust,
            deployments=self._deployments,
            slots=settings.slots,
            max_body_bytes=settings.limits.body_bytes,
        )
        courier = Courier(
            ledger,
            self._trust,
            node=self._account.address,
            chain_id=self._network.chain_id,
            metrics=self._metrics,
            away_s=self._away_s,
        )
        attempts = Attempts(
            state,
            ledger=ledger,
            metrics=self._metrics,
            changes=self._changes,
            undelivered=courier.undelivered,
            suspect=partial(self._suspect, backend),
            busy=self._gpus,
        )
        logs = ContainerLogs(lambda deployment, lines, follow: backend.log_of(deployment, lines, follow=follow))
        executor = Executor(attempts, spool, self._metrics, logs, OutputFiles(settings.models.output_folders))
        backend.break_off = attempts.break_off
        self._deployments.gone = self._gpus.forget
        owner = Owner(kept, self._deployments, state, self._changes, hours=settings.serve)
        await owner.load()
        owner_api = OwnerApi(
            self._deployments,
            owner,
            logs,
            backend.findings,
            self._gpu_names,
            self._servers.described,
            backend.images,
        )

        async def http(stream: P2PStream) -> None:
            try:
                peer = str(stream.remote_address)
            except NoAccountError:
                peer = ""  # a foreign libp2p peer: it may ask what is mounted here, and no more
            await serve_stream(
                stream,
                executor.handle,
                limits=HTTP_LIMITS,
                remote=Remote(peer=peer),
                half_close=True,
                draining=self._http_draining,
            )

        async with self._host(http) as host, trio.open_nursery() as nursery:
            await nursery.start(self._drain.run)
            nursery.start_soon(self._end_with_ledger, ledger)
            await nursery.start(executor.run)
            await nursery.start(
                partial(
                    self._deployments.run,
                    images=backend,
                    models=self._servers,
                    keeper=kept,
                    is_trusted=lambda service: any(bootstrap.service == service for bootstrap in self._trust),
                )
            )
            nursery.start_soon(backend.run)
            nursery.start_soon(owner.run)
            nursery.start_soon(self._servers.run)
            nursery.start_soon(spool.run)
            await nursery.start(self._gpus.run)
            nursery.start_soon(self._tell_of_gpus, backend, ledger)
            nursery.start_soon(self._watch_totals, ledger)
            self._discovery = await self._discovery_on(host, state, backend)
            await nursery.start(self._discovery.run)
            status = partial(self._status, host, state, engine, ledger, owner, backend.findings)
            admin = AdminApi(self._registry, status, partial(self._gpu_status, engine), owner_api.handle)
            await nursery.start(serve_admin_socket, self._directory.admin_socket, admin)
            peers = PeerCalls(
                host,
                self._discovery,
                self._servers,
                self._account.address,
                partial(look_around, settings.data_dir),
                self._discovery.own_record,
            )
            gateway = Gateway(settings.gateway.bootstrap_url, self._gateway_token)
            nursery.start_soon(_close_at_the_end, gateway)
            models = ModelApi(self._servers, partial(_identity, host), peers, gateway)
            own = await _listen(nursery, models.handle, settings.model_listen, "model_listen")
            model_address = own[0]
            if settings.metrics_listen is not None:
                own += await _listen(nursery, admin.metrics_only, settings.metrics_listen, "metrics_listen")
            self._servers.keep_off(address.port for address in own)
            parts = LinkParts(
                host=host,
                network=self._network.name,
                gpus=self._gpus.offers,
                state=state,
                deployments=self._deployments,
                running_of=attempts.running_of,
                servers=self._servers,
                changes=self._changes,
                host_offer=partial(_host_offer, backend, settings),
                courier=courier,
                ledger=ledger,
                metrics=self._metrics,
                addresses_of=self._discovery.addresses_of,
                price_list=self._price_list(ledger),
            )
            self._links = [Link(bootstrap, parts) for bootstrap in self._trust]
            self._export(host)
            with self._runtime_file(host, model_address):
                log.info(
                    "node_ready",
                    node=self._account.address,
                    peer_id=host.peer_id,
                    network=self._network.name,
                    listen=host.addresses,
                    models=f"http://{model_address}",
                    bootstraps=len(self._links),
                    engine=engine.name,
                    gpus=len(self._gpus.usable()),
                )
                if not self._links:
                    log.warning("no_bootstraps", hint="add a [[bootstraps]] table to the configuration")
                self._notifier.ready(f"serving {len(self._links)} bootstraps")
                garbage.settle()
                nursery.start_soon(run_watchdog, self._notifier, lambda: not ledger.failed.is_set())
                for link in self._links:
                    nursery.start_soon(link.run)
                await self._drain.requested.wait()
                await self._wind_down(attempts)
            nursery.cancel_scope.cancel()
        log.info("node_stopped")

    @contextlib.asynccontextmanager
    async def _host(self, http: StreamHandler) -> AsyncIterator[Host]:
        try:
            async with open_host(
                self._account,
                listen=self._settings.listen,
                network=self._network,
                handlers={HTTP_PROTOCOL: http},
                known=lambda address: self._trust.service_of(address) is not None,
            ) as host:
                yield host
        except* ListenError as group:
            problem = next(_leaves(group))
            raise NodeConfigurationError(f"listen: {problem}") from None

    # -- the end -------------------------------------------------------------------------------------------------------

    async def _wind_down(self, attempts: Attempts) -> None:
        grace_s = self._settings.drain_s
        self._notifier.stopping(f"draining, {len(attempts.running)} tasks running")
        self._notifier.extend_timeout(grace_s + 60)
        log.info("draining", running=len(attempts.running), grace_s=grace_s)
        async with trio.open_nursery() as nursery:

            async def cut_short() -> None:
                await self._drain.immediate.wait()
                attempts.stop_all()

            nursery.start_soon(cut_short)
            await attempts.drain(grace_s)
            nursery.cancel_scope.cancel()
        # The receipts are written; now the answers that carry them go out.
        self._http_draining.start()
        with trio.move_on_after(LAST_BYTES_S):
            await self._http_draining.wait_finished()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._discovery.withdraw)
            for link in self._links:
                nursery.start_soon(link.say_goodbye, "this node is stopping")

    # -- discovery -----------------------------------------------------------------------------------------------------

    async def _discovery_on(self, host: Host, state: AdmissionState[Deployment], backend: EngineBackend) -> Discovery:
        settings = self._settings
        around = await trio.to_thread.run_sync(look_around, settings.data_dir)
        own = Machine(
            software=f"ngpu-node/{software_version()}",
            slots=settings.slots,
            cpus=around.cores,
            memory_bytes=around.memory_bytes or 0,
            region=settings.region,
            terms=settings.terms,
            prices=settings.prices.prices(),
        )

        def describe_now() -> NodeRecord:
            inventory = self._gpus.inventory
            return describe(
                self._account,
                self._network,
                replace(own, driver=inventory.driver_version, cuda=inventory.cuda_version),
                addresses=(),
                gpus=record_gpus(
                    inventory,
                    self._account.address,
                    against=self._gpus.word_against,
                    held=backend.held(),
                    shares=settings.gpus.shares_per_gpu,
                ),
                deployments=[deployment.state() for deployment in self._deployments],
                services=self._servers.offers(),
                slots_free=0 if state.draining else max(0, state.slots - state.running),
                disk_free_bytes=_free_bytes(settings.data_dir),
            )

        return Discovery(
            self._account,
            host,
            settings.discovery,
            self._directory.path,
            describe=describe_now,
            changed=lambda: self._changes.beyond(self._changes.count),
            trusted=[multiaddr for bootstrap in self._trust for multiaddr in bootstrap.multiaddrs],
            helpers=lambda: [bootstrap.peer_id for bootstrap in self._trust],
        )

    def _price_list(self, ledger: Ledger) -> bytes:
        """Return what the owner asks in this session, signed and on its way to *ledger*; empty for nothing."""
        prices = self._settings.prices.prices()
        if prices is None:
            return b""
        signed = sign_price_list(prices, self._session, self._account, self._network.chain_id)
        ledger.remember_price_list(signed)
        return signed.wire

    async def _end_with_ledger(self, ledger: Ledger) -> None:
        await ledger.failed.wait()
        raise LedgerUnavailable("receipts cannot be written: is the disk full? The node stops rather than work unpaid")

    # -- what the parts tell each other --------------------------------------------------------------------------------

    def _away_s(self, address: Address) -> float:
        return next((link.away_s for link in self._links if link.bootstrap.address == address), 0.0)

    def _suspect(self, backend: EngineBackend, deployment: Deployment, upstream: Upstream, reason: str) -> None:
        """Have whoever looks after *upstream*, which could not be reached, look at it now."""
        if deployment.spec.is_image:
            backend.doubt(deployment, reason)
        else:
            self._servers.doubt()

    async def _tell_of_gpus(self, backend: EngineBackend, ledger: Ledger) -> None:
        """Tell *backend* whenever the devices that may be used are others, and *ledger* what they are."""
        usable, known = self._gpus.usable(), self._gpus.models()
        ledger.remember_gpus(self._session, known)
        while True:
            seen = self._changes.count
            if usable != (usable := self._gpus.usable()):
                backend.gpus_changed()
            if known != (known := self._gpus.models()):
                ledger.remember_gpus(self._session, known)
            await self._changes.beyond(seen)

    async def _watch_totals(self, ledger: Ledger) -> None:
        while True:
            self._totals = await ledger.totals()
            await trio.sleep(TOTALS_INTERVAL_S)

    # -- what is shown -------------------------------------------------------------------------------------------------

    def _export(self, host: Host) -> None:
        metrics = self._metrics
        metrics.gauge("ngpu_node_peers", "Connected peers.", None, lambda: [("", len(host.peers()))])
        metrics.gauge("ngpu_node_streams", "Open streams.", None, lambda: [("", sum(p.streams for p in host.peers()))])
        metrics.gauge(
            "ngpu_node_bootstraps_connected",
            "Bootstraps that welcomed this node.",
            None,
            lambda: [("", sum(link.status.connected for link in self._links))],
        )
        metrics.gauge("ngpu_node_deployments", "Deployments by state.", "state", self._deployments_by_state)
        metrics.gauge("ngpu_node_receipts_owed", "Receipts not acknowledged.", None, lambda: [("", self._totals.owed)])
        metrics.gauge("ngpu_node_gpus", "GPUs that may be used.", None, lambda: [("", len(self._gpus.usable()))])

    def _gpu_names(self, deployment: Deployment) -> list[str]:
        return [f"{gpu.model} {gpu.uuid}" for gpu in self._gpus.usable() if gpu.id in deployment.gpus]

    def _deployments_by_state(self) -> Iterable[tuple[str, float]]:
        return Counter(str(deployment.phase) for deployment in self._deployments).items()

    async def _status(
        self,
        host: Host,
        state: AdmissionState[Deployment],
        engine: EngineStatus,
        ledger: Ledger,
        owner: Owner,
        findings: Callable[[], Iterable[Finding]],
    ) -> dict[str, Any]:
        self._totals = await ledger.totals()
        now_s = trio.current_time()
        return {
            "node": self._account.address,
            "peer_id": host.peer_id,
            "network": self._network.name,
            "version": software_version(),
            "pid": os.getpid(),
            "uptime_s": round(now_s - self._started_s, 1),
            "listen": host.addresses,
            "session": self._session.hex(),
            "draining": state.draining,
            "lending": str(owner.lending),
            "lending_detail": owner.detail,
            "slots": state.slots,
            "running": state.running,
            "bootstraps": [
                {
                    "address": link.bootstrap.address,
                    "service": link.bootstrap.service,
                    "connected": link.status.connected,
                    "admitted": link.status.admitted,
                    "for_s": round(now_s - link.status.since_s, 1),
                    "problem": link.status.problem,
                    "multiaddr": link.status.multiaddr,
                    "clock_offset_ms": link.status.clock_offset_ms,
                }
                for link in self._links
            ],
            "deployments": [
                {
                    "service": deployment.service,
                    "workspace": deployment.spec.id,
                    "revision": deployment.spec.revision,
                    "name": deployment.spec.name,
                    "state": str(deployment.phase),
                    "detail": deployment.detail,
                    "running": deployment.running,
                    "concurrency": deployment.concurrency,
                }
                for deployment in self._deployments
            ],
            "models": [
                {**asdict(copy.registration), "healthy": copy.healthy, "detail": copy.detail}
                for copy in self._servers.copies()
            ],
            "gpus": [
                {
                    "uuid": gpu.uuid,
                    "model": gpu.reading.model,
                    "memory_bytes": gpu.reading.memory_total_bytes,
                    "against": gpu.withheld or self._gpus.reason_against(gpu.uuid),
                }
                for gpu in self._gpus.inventory.gpus
            ],
            "gpu_problem": self._gpus.inventory.reason,
            "engine": asdict(engine),
            "advice": [f"{f.subject}: {f.text}" for f in findings() if f.advice],
            "discovery": self._discovery.status(),
            "receipts": self._totals.receipts,
            "receipts_owed": self._totals.owed,
        }

    def _gpu_status(self, engine: EngineStatus) -> dict[str, Any]:
        return {**self._gpus.status(), "engine": asdict(engine)}

    @contextlib.contextmanager
    def _runtime_file(self, host: Host, models: BoundAddress) -> Iterator[None]:
        """Keep `<data_dir>/node.json` while the node runs: which ports it got, for whoever lets it choose them."""
        path = self._directory.path / "node.json"
        _write_json(
            path,
            {
                "pid": os.getpid(),
                "node": self._account.address,
                "peer_id": host.peer_id,
                "multiaddrs": host.addresses,
                "models": f"http://{models}",
                "admin_socket": str(self._directory.admin_socket),
            },
        )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


async def _listen(nursery: trio.Nursery, handler: Handler, text: str, key: str) -> list[BoundAddress]:
    host, port = split_listen(text)
    try:
        bound: list[BoundAddress] = await nursery.start(partial(serve_tcp, handler, host=host, port=port))
    except OSError as error:
        raise NodeConfigurationError(f"{key}: cannot listen on {text}: {error.strerror or error}") from None
    return bound


async def _close_at_the_end(gateway: Gateway) -> None:
    try:
        await trio.sleep_forever()
    finally:
        with trio.move_on_after(1, shield=True):
            await gateway.aclose()


def _free_bytes(path: Path) -> int:
    try:
        disk = os.statvfs(path)
    except OSError:
        return 0
    return disk.f_frsize * disk.f_bavail


def _host_offer(backend: EngineBackend, settings: NodeSettings) -> HostOffer:
    machine, images = backend.machine(), settings.images
    return HostOffer(
        engine=machine.runs_images,
        cpus=machine.cpus,
        memory_bytes=machine.memory_bytes,
        disk_free_bytes=machine.image_bytes_free,
        max_image_bytes=images.max_image_bytes,
        registries=tuple(images.registries),
        tar_images=images.tar_images,
        egress=machine.gives_egress,
        gpu_runtime=machine.gives_gpus,
        area=settings.region,
    )


def _identity(host: Host) -> dict[str, Any]:
    return {
        "peer_id": host.peer_id,
        "protocol_version": "ngpu/1.0.0",
        "agent_version": f"ngpu-node/{software_version()}",
        "addresses": host.addresses,
        "protocols": [HTTP_PROTOCOL],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    draft.replace(path)


def _leaves(group: BaseExceptionGroup[ListenError]) -> Iterator[ListenError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
