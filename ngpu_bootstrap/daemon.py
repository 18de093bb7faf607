"""The bootstrap peer as a process: builds the parts, opens the nursery, and ends in good order.

The one module that knows every part. Order of start: keystore, store, parts, libp2p host, unfinished tasks of the run
before, clients' listener; ready is said when clients can come. Order of end, on SIGTERM: no new connections and no
new attempts of waiting tasks, running requests get `drain_s`, their ends are committed, then everything is cancelled.
What is cut by the end of the grace period is taken up by the next start, as after `kill -9`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import structlog
import trio

from ngpu_bootstrap.admin_socket import serve_admin_socket
from ngpu_bootstrap.api.app import Parts, build_app
from ngpu_bootstrap.api.profile_calls import ProfileCalls
from ngpu_bootstrap.api.task_calls import TaskControl
from ngpu_bootstrap.brc20.checker import Brc20Checker
from ngpu_bootstrap.brc20.desk import Brc20Desk
from ngpu_bootstrap.brc20.setup import open_checker
from ngpu_bootstrap.challenges.desk import ChallengeDesk
from ngpu_bootstrap.compat import rows as cloud_rows
from ngpu_bootstrap.compat.cloud import Cloud
from ngpu_bootstrap.compat.extension import NgpuCloud
from ngpu_bootstrap.compat.user_calls import UserCalls
from ngpu_bootstrap.config import RUNTIME_FILE, BootstrapSettings, parse_host_port
from ngpu_bootstrap.credentials import Token
from ngpu_bootstrap.dispatch.detached import DetachedTasks
from ngpu_bootstrap.dispatch.dispatcher import Dispatcher, DispatchLimits
from ngpu_bootstrap.dispatch.errands import Errands
from ngpu_bootstrap.dispatch.gaps import GapWatch
from ngpu_bootstrap.dispatch.jobs import Jobs
from ngpu_bootstrap.dispatch.receipts import ReceiptDesk
from ngpu_bootstrap.dispatch.verdicts import Judge
from ngpu_bootstrap.dispatch.watch import TaskWatch
from ngpu_bootstrap.errors import NotServed
from ngpu_bootstrap.front.answers import broken_request
from ngpu_bootstrap.front.callers import parse_networks
from ngpu_bootstrap.front.job_calls import JobCalls
from ngpu_bootstrap.front.profiled import Parts as ProfiledParts
from ngpu_bootstrap.front.profiled import Profiled
from ngpu_bootstrap.front.reads_api import Wire
from ngpu_bootstrap.front.routes import Front, TaskIds
from ngpu_bootstrap.front.spool import Spool
from ngpu_bootstrap.front.wire_times import parse_zone
from ngpu_bootstrap.membership import Membership
from ngpu_bootstrap.metrics import Metrics
from ngpu_bootstrap.operator_keys import OperatorKeys, OperatorKeysError, Scope
from ngpu_bootstrap.profiles.bindings import check_bindings
from ngpu_bootstrap.profiles.catalogue import load_catalogue
from ngpu_bootstrap.rechecks.desk import RecheckDesk
from ngpu_bootstrap.registry.archives import ArchiveLimits, Archives
from ngpu_bootstrap.registry.confided import Confided
from ngpu_bootstrap.registry.control import ControlDesk, Greeting
from ngpu_bootstrap.registry.deployments import DeploymentTable
from ngpu_bootstrap.registry.nodes import Nodes, NodeSession
from ngpu_bootstrap.registry.placements import Placements
from ngpu_bootstrap.registry.shared_models import Models
from ngpu_bootstrap.registry.standings import Standings
from ngpu_bootstrap.registry.sticky_keys import StickyKeys
from ngpu_bootstrap.registry.workspaces import Workspace, Workspaces
from ngpu_bootstrap.retention import keep_swept
from ngpu_bootstrap.stand_ins import ABOUT_KEY as STAND_INS
from ngpu_bootstrap.stand_ins import StandIns
from ngpu_bootstrap.store.bodies import BodyLimits
from ngpu_bootstrap.store.errors import StoreError, StoreMismatch, StoreUnavailable
from ngpu_bootstrap.store.leases import Sibling
from ngpu_bootstrap.store.records import NodeRow, OpenTask, TaskRecord
from ngpu_bootstrap.store.store import Store, StoreOptions, open_store
from ngpu_bootstrap.trust_secret import trust_secret
from ngpu_bootstrap.webhooks.caller import WebhookCaller
from ngpu_bootstrap.webhooks.rules import WebhookRules
from ngpu_daemon import garbage
from ngpu_daemon.addresses import IpAddress
from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.discovery import Discovery
from ngpu_daemon.drain import Drain
from ngpu_daemon.errors import OperatorError
from ngpu_daemon.keystore import open_keystore, read_passphrase
from ngpu_daemon.metrics import software_version
from ngpu_daemon.notify import Notifier, run_watchdog
from ngpu_daemon.outbound import GuardedTransport, public_only
from ngpu_protocol.bills import sign_bill
from ngpu_protocol.control import CONTROL_PROTOCOL, RECEIPTS_PROTOCOL
from ngpu_protocol.errors import AddressError
from ngpu_protocol.http1 import AsgiHandler, BoundAddress, Client, Draining, Handler, Limits, serve_tcp
from ngpu_protocol.identity import Account, Address, address_of_peer_id
from ngpu_protocol.networks import network_named
from ngpu_protocol.node_records import NodeRecord, Role
from ngpu_protocol.p2p import Host, HostLimits, ListenError, P2PStream, open_host
from ngpu_protocol.p2p.relay_messages import RelayLimits
from ngpu_protocol.statements import sign_statement
from ngpu_protocol.workspaces import WorkspaceSpec

log = structlog.get_logger(__name__)

HTTP_PROTOCOL = "/http/1.1"
STREAM_TIMEOUT_S = 5.0
# How long streams to nodes rest before they are closed: below the node's own limit, so that ours closes first.
STREAM_IDLE_S = 60.0
SETTLE_S = 10.0
# How long clients that wait for a task may take to hear that this bootstrap stops.
TELL_S = 0.5
# What a client may send as a head: together with an order (16 KiB at most) less than the 64 KiB a node takes.
CLIENT_HEAD_BYTES = 40 * 1024
# A node opens two streams to its bootstrap, and what its lookups in the DHT and a relayed guest need; requests go out
# on streams opened here, which this does not count.
PEER_LIMITS = HostLimits(streams_per_peer=64)


class StartError(OperatorError):
    """The daemon cannot start with this configuration on this machine."""


def now_ms() -> int:
    """Return UTC milliseconds."""
    return time.time_ns() // 1_000_000


async def run_daemon(
    settings: BootstrapSettings, *, task_status: trio.TaskStatus[dict[str, Any]] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run the bootstrap peer until it is told to stop.

    Args:
        task_status: started with where it listens (what `bootstrap.json` says) once it is ready.

    Raises:
        OperatorError: what must be changed before it can start; nothing listened.
    """
    directory = DataDirectory(settings.data_dir)
    with directory.lock():
        passphrase = read_passphrase(settings.passphrase_file)
        account = await trio.to_thread.run_sync(open_keystore, directory.keystore, passphrase)
        tls = _tls_context(settings)
        drain = Drain()
        async with AsyncExitStack() as stack:
            store = await _opened_store(stack, settings, directory, account)
            checker = await stack.enter_async_context(open_checker(settings.brc20))
            await _Bootstrap(settings, directory, account, store, checker, drain, tls).run(task_status)


async def _opened_store(
    stack: AsyncExitStack, settings: BootstrapSettings, directory: DataDirectory, account: Account
) -> Store:
    try:
        return await stack.enter_async_context(
            open_store(
                settings.store or directory.path / "bootstrap.db",
                network=settings.network,
                bootstrap=account.address,
                bodies=settings.bodies or directory.path / "bodies",
                options=store_options(settings),
            )
        )
    except (StoreMismatch, StoreUnavailable) as error:
        raise StartError(str(error)) from error


def store_options(settings: BootstrapSettings) -> StoreOptions:
    """Return how the store of *settings* is opened.

    What one bootstrap accepted another may have to finish, so bodies on a database that several share are where all of
    them are: in the database, unless there is a folder that they share.
    """
    if not settings.store or settings.bodies is not None:
        return StoreOptions()
    longest = max(settings.limits.task_body_bytes, settings.limits.task_answer_bytes)
    return StoreOptions(bodies=BodyLimits(inline_bytes=longest))


def _tls_context(settings: BootstrapSettings) -> ssl.SSLContext | None:
    certificate, key = settings.tls.certificate, settings.tls.key
    if certificate is None or key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise StartError(f"the TLS certificate {certificate} cannot be used with the key {key}: {error}") from None
    context.set_alpn_protocols(["http/1.1"])
    return context


def _anywhere(host: str, address: IpAddress) -> bool:
    return True


class _Bootstrap:
    """One run of the daemon: its parts, and who starts and ends them."""

    def __init__(
        self,
        settings: BootstrapSettings,
        directory: DataDirectory,
        account: Account,
        store: Store,
        checker: Brc20Checker,
        drain: Drain,
        tls: ssl.SSLContext | None,
    ) -> None:
        self.settings = settings
        self.directory = directory
        self.account = account
        self.store = store
        self.drain = drain
        self.tls = tls
        self.network = network_named(settings.network)
        self.host: Host | None = None
        self.discovery: Discovery | None = None
        self.where: dict[str, Any] = {}
        self.metrics = Metrics()
        self.operator_keys = OperatorKeys(directory.path)
        self.watch = TaskWatch()
        self.draining = Draining()
        limits = settings.limits
        self.standings = Standings(
            own=account.address,
            store=store,
            now_ms=now_ms,
            changed=lambda node: self.nodes.standing_changed(node),
        )
        self.nodes = Nodes(
            now_ms=now_ms,
            queue_limit=limits.queued_calls,
            policy=settings.scheduling.policy,
            affinity_keys=settings.scheduling.affinity_keys,
            affinity_idle_s=settings.scheduling.affinity_idle_s,
            standing=self.standings.in_short,
            round_trip_s=lambda peer_id: self.host.round_trip_s(peer_id) if self.host is not None else None,
        )
        self.confided = confided = Confided(store, lambda: account, [Address(one) for one in settings.siblings])
        self.workspaces = Workspaces(store, confided=confided, now_ms=now_ms, on_change=self._workspaces_changed)
        images = settings.images
        self.archives = Archives(
            self.workspaces,
            transport=lambda: GuardedTransport(_anywhere if images.private_addresses else public_only),
            limits=ArchiveLimits(images.archive_bytes, images.archive_timeout_s),
        )
        self.deployments = DeploymentTable(
            workspaces=self.workspaces,
            nodes=self.nodes,
            store=store,
            archives=self.archives,
            replace_after_s=settings.replace_node_after_s,
            now_ms=now_ms,
            only_on=lambda workspace: self.challenges.only_on(workspace),
        )
        self.placements = Placements(recent=self.nodes.placements, store=store, now_ms=now_ms)
        judge = Judge(
            account,
            self.network,
            tolerance_ms=int(settings.clock_tolerance_s * 1000),
            now_ms=now_ms,
            link_before=store.link_before,
        )
        self.stand_ins = StandIns(self.network.chain_id)
        self.stand_ins.sign(account, [Address(one) for one in settings.siblings], now_ms())
        self.receipts = ReceiptDesk(
            own=account.address,
            network=self.network,
            judge=judge,
            stand_ins=self.stand_ins,
            gaps=GapWatch(
                account=account,
                chain_id=self.network.chain_id,
                standings=self.standings,
                store=store,
                metrics=self.metrics,
                now_ms=now_ms,
            ),
            standings=self.standings,
            store=store,
            metrics=self.metrics,
            now_ms=now_ms,
        )
        approved = settings.admission.approved if settings.admission.mode == "approved" else None
        self.nodes.on_the_way = self._on_the_way
        self.control = ControlDesk(
            greeting=Greeting(
                network=settings.network,
                service=settings.service,
                heartbeat_s=settings.heartbeat_s,
                approved=None if approved is None else frozenset(Address(node) for node in approved),
            ),
            nodes=self.nodes,
            deployments=self.deployments,
            confided=confided,
            open_requests=self._requests_to,
            chain_head=store.chain_top,
            met=self._met,
            gpus_shown=self.store.session_gpus,
            keep_prices=self.store.keep_price_list,
            now_ms=now_ms,
        )
        self.dispatcher = Dispatcher(
            account=account,
            network=self.network,
            store=store,
            nodes=self.nodes,
            judge=judge,
            standings=self.standings,
            desk=self.receipts,
            metrics=self.metrics,
            limits=DispatchLimits(attempts=limits.attempts, queue_wait_s=limits.queue_wait_s),
            watch=self.watch,
            now_ms=now_ms,
            look_again=lambda *ended: self.rechecks.answered(*ended),
        )
        self.jobs = Jobs(
            account=account,
            network=self.network,
            dispatcher=self.dispatcher,
            store=store,
            nodes=self.nodes,
            answer_bytes=limits.task_answer_bytes,
            now_ms=now_ms,
        )
        self.new_task_id = TaskIds(now_ms, parse_zone(settings.wire_timezone))
        errands = Errands(self.dispatcher, self.nodes, new_task_id=self.new_task_id, now_ms=now_ms)
        secret = trust_secret(directory.path)
        self.challenges = ChallengeDesk(
            settings.challenges,
            own=account.address,
            secret=secret,
            nodes=self.nodes,
            workspaces=self.workspaces,
            standings=self.standings,
            store=store,
            errands=errands,
            metrics=self.metrics,
            wallets=self._wallets,
            refresh=lambda: self.control.refresh(),
            lacking=self._lacking,
            now_ms=now_ms,
        )
        self.rechecks = RecheckDesk(
            settings.rechecks,
            own=account.address,
            secret=secret,
            nodes=self.nodes,
            standings=self.standings,
            store=store,
            errands=errands,
            metrics=self.metrics,
            wallets=self._wallets,
            spec_of=self._running_spec,
            answer_bytes=limits.task_answer_bytes,
            now_ms=now_ms,
        )
        self.detached = DetachedTasks(
            dispatcher=self.dispatcher,
            jobs=self.jobs,
            store=store,
            nodes=self.nodes,
            is_coming=self._is_coming,
            limit=limits.async_tasks,
            answer_bytes=limits.task_answer_bytes,
            attempts=limits.attempts,
            now_ms=now_ms,
            call_back=lambda: self.webhooks.task_ended(),
        )
        self.webhook_rules = WebhookRules(
            parse_networks(settings.webhooks.allow), loopback=settings.has_private_listener
        )
        self.webhooks = WebhookCaller(store, self.webhook_rules, token_hash=self._token_hash, now_ms=now_ms)
        self.task_control = TaskControl(store, self.dispatcher, self.detached, self.watch, now_ms)
        self.membership = Membership(
            store,
            self.detached,
            about=self._about,
            here=self.deployments.told,
            adopt=self._adopt,
            cancel=self.task_control.end,
            reload=self.deployments.catch_up,
            met=self._met_siblings,
        )
        self.brc20 = Brc20Desk(checker, store, now_ms=now_ms)
        self.catalogue = load_catalogue(settings.profiles)
        self.models = Models(
            self.workspaces,
            self.nodes,
            share=settings.models.share == "registered",
            projects=settings.models.projects,
            limit=settings.models.shared_models,
            concurrency=settings.models.concurrency,
            timeout_s=settings.models.timeout_s,
        )
        self.control.noticed = self.models.notice
        self.compat: NgpuCloud | None = None
        self.front = self._front()
        self._show_gauges()

    def _front(self) -> Front:
        settings = self.settings
        zone_minutes = parse_zone(settings.wire_timezone)
        front = Front(
            workspaces=self.workspaces,
            dispatcher=self.dispatcher,
            detached=self.detached,
            nodes=self.nodes,
            store=self.store,
            metrics=self.metrics,
            limits=settings.limits,
            async_deadline_s=settings.async_deadline_s,
            deployments=self.deployments,
            new_task_id=self.new_task_id,
            wire=Wire(zone_minutes, settings.submit_result_code, settings.show_node_ip),
            brc20=self.brc20,
            checks_per_minute=settings.brc20.checks_per_minute,
            trusted=parse_networks(settings.trusted_proxies),
            watch=self.watch,
            check_webhook=self._webhook_problem,
            check_operator=self._check_reader,
        )
        front.tasks_api.reads.believed = self._believed
        parts = Parts(
            workspaces=self.workspaces,
            nodes=self.nodes,
            deployments=self.deployments,
            standings=self.standings,
            placements=self.placements,
            store=self.store,
            brc20=self.brc20,
            metrics=self.metrics,
            operator_keys=self.operator_keys,
            find_task=front.tasks_api.task,
            waits_for=front.tasks_api.waits_for,
            status=self._status,
            stand_ins=self.stand_ins,
            sign_statement=lambda statement: sign_statement(statement, self.account, self.network.chain_id),
            sign_bill=lambda bill: sign_bill(bill, self.account, self.network.chain_id),
            open_metrics=settings.has_private_listener,
            now_ms=now_ms,
            answer_failed_try=front.answer_failed_try,
            draining=lambda: self.drain.is_requested,
            task_control=self.task_control,
            challenges=self.challenges,
        )
        if settings.compat.ngpu_cloud:
            self.compat = self._compat(front)
            front.tasks_api.extension = self.compat
        scheme = "https" if self.tls is not None else "http"
        profiles = ProfileCalls(self.catalogue, frozenset(settings.profiles.public), settings.limits.request_body_bytes)
        if len(self.catalogue):
            front.profiled = self._profiled(front, scheme)
        front.application = AsgiHandler(build_app(parts, profiles=profiles), scheme=scheme)
        self.admin = AsgiHandler(build_app(parts, is_operators_own=True))
        return front

    def _profiled(self, front: Front, scheme: str) -> Profiled:
        settings = self.settings
        parts = ProfiledParts(
            workspaces=self.workspaces,
            models=self.models,
            nodes=self.nodes,
            dispatcher=self.dispatcher,
            sticky=StickyKeys(
                self.store,
                self.nodes,
                kept_ms=int(self.settings.scheduling.kept_keys_days * 86_400_000),
                now_ms=now_ms,
            ),
            jobs=JobCalls(
                detached=self.detached,
                promises=front.tasks_api.promises,
                jobs=self.jobs,
                nodes=self.nodes,
                store=self.store,
                watch=self.watch,
                now_ms=now_ms,
            ),
            promises=front.tasks_api.promises,
            store=self.store,
            brc20=self.brc20,
            account=self.account,
            network=settings.network,
            signers=lambda: {self.account.address, *self.receipts.siblings},
            spool=Spool(self.directory.path / "spool", limit_bytes=settings.limits.spool_bytes),
            new_task_id=front.new_task_id,
            now_ms=now_ms,
        )
        return Profiled(
            self.catalogue,
            parts,
            settings=settings.profiles,
            models=settings.models,
            limits=settings.limits,
            scheme=scheme,
            trusted=parse_networks(settings.trusted_proxies),
            token_limits=front.token_limits,
        )

    def _compat(self, front: Front) -> NgpuCloud:
        settings = self.settings
        cloud = Cloud(
            store=self.store,
            workspaces=self.workspaces,
            deployments=self.deployments,
            confided=self.confided,
            failed_tries=front.failed_tries,
            session_s=settings.compat.session_days * 86_400,
            now_ms=now_ms,
        )
        user_calls = UserCalls(
            reads=front.tasks_api.reads,
            nodes=self.nodes,
            store=self.store,
            chain_id=self.network.chain_id,
            now_ms=now_ms,
        )
        return NgpuCloud(cloud, user_calls, body_bytes=settings.limits.api_body_bytes)

    def _show_gauges(self) -> None:
        gauge = self.metrics.gauge
        gauge("ngpu_peers", "Nodes connected.", lambda: len(self.nodes))
        gauge("ngpu_workspaces", "Workspaces.", lambda: len(self.workspaces))
        gauge("ngpu_deployments", "Deployments on connected nodes.", self._deployments)
        gauge("ngpu_streams", "Open libp2p streams.", self._streams)
        gauge("ngpu_running_attempts", "Attempts running.", lambda: sum(one.total_in_flight for one in self.nodes))
        gauge("ngpu_async_tasks", "Asynchronous tasks not final.", lambda: len(self.detached))
        gauge("ngpu_rechecks_waiting", "Tasks that wait to be run again.", lambda: len(self.rechecks))
        gauge("ngpu_rechecks_passed_over", "Drawn and not run again.", lambda: self.rechecks.passed_over)
        gauge("ngpu_store_operations", "Writes committed since the start.", lambda: self.store.counts.operations)
        gauge("ngpu_store_batches", "Commits since the start.", lambda: self.store.counts.batches)
        gauge("ngpu_client_connections", "Clients' connections.", lambda: self.draining.connections)

    def _deployments(self) -> int:
        return sum(len(session.deployments) for session in self.nodes)

    def _streams(self) -> int:
        return sum(peer.streams for peer in self.host.peers()) if self.host is not None else 0

    def _status(self) -> dict[str, Any]:
        return {
            **self.where,
            "nodes": len(self.nodes),
            "workspaces": len(self.workspaces),
            "running_attempts": sum(session.total_in_flight for session in self.nodes),
            "async_tasks": len(self.detached),
            "draining": self.drain.is_requested,
            "discovery": self.discovery.status() if self.discovery is not None else {"enabled": False},
        }

    # -- nodes

    def _requests_to(self, peer_id: str) -> Client:
        """Return the pooled HTTP client over the connection of a peer."""
        return Client(
            functools.partial(self._open_stream, peer_id),
            authority=peer_id,
            max_connections=self.settings.limits.streams_per_node,
            max_idle_s=STREAM_IDLE_S,
            limits=Limits(max_head_bytes=64 * 1024, max_headers=200),
        )

    async def _open_stream(self, peer_id: str) -> P2PStream:
        assert self.host is not None
        return await self.host.open_stream(peer_id, HTTP_PROTOCOL, timeout_s=STREAM_TIMEOUT_S)

    async def _met(self, session: NodeSession) -> None:
        self.store.note_node(
            NodeRow(
                address=session.node,
                first_seen_ms=session.connected_at_ms,
                last_seen_ms=session.connected_at_ms,
                peer_id=session.peer_id,
                software=session.software,
                session=session.session,
            )
        )
        if session.admitted:  # no other gets an order, and anybody may say anything
            self.store.note_gpus(session.node, session.session, session.gpus_shown, session.connected_at_ms)

    # -- discovery

    def _discovery_on(self, host: Host) -> Discovery:
        settings = self.settings
        relay = settings.relay
        return Discovery(
            self.account,
            host,
            settings.discovery,
            self.directory.path,
            describe=self._record,
            changed=trio.sleep_forever,
            is_bootstrap=True,
            may_reserve=self._may_reserve if relay.enabled else None,
            relay_limits=RelayLimits(
                reservations=relay.reservations, circuit_bytes=relay.circuit_bytes, circuit_s=relay.circuit_s
            ),
        )

    def _record(self) -> NodeRecord:
        """Return what this bootstrap says of itself: that it is one. The rest is filled in where it is signed."""
        return NodeRecord(
            network=self.network.name,
            node=self.account.address,
            peer_id=self.account.peer_id,
            sequence=0,
            issued_at_ms=0,
            expires_at_ms=0,
            roles=(Role.BOOTSTRAP,),
            region=self.settings.region,
            software=f"ngpu-bootstrap/{software_version()}"[:64],
        )

    async def _wallets(self) -> dict[Address, str]:
        """Return whom each node's work pays, by its own signature."""
        bindings = await self.store.look_up(cloud_rows.bindings)
        return {Address(node): binding.wallet for node, binding in bindings.items()}

    def _lacking(self, workspace: Workspace) -> str:
        """Return why a workspace has not all the nodes it wants, in words."""
        shortage = self.deployments.shortage(workspace)
        return shortage.detail if shortage is not None else ""

    async def _keep_swept(self) -> None:
        scheduling = self.settings.scheduling
        await keep_swept(
            self.store,
            self.settings.retention,
            now_ms,
            kept_keys=scheduling.kept_keys,
            kept_keys_days=scheduling.kept_keys_days,
        )

    def _may_reserve(self, peer_id: str) -> bool:
        """Whether others may reach this peer through here: a node that is admitted, and has greeted."""
        try:
            session = self.nodes.get(address_of_peer_id(peer_id))
        except AddressError:
            return False
        return session is not None and session.admitted

    # -- the run

    async def run(self, task_status: trio.TaskStatus[dict[str, Any]]) -> None:
        notifier = Notifier.from_environment()
        await self.standings.load()
        await self.deployments.load()
        await self._check_bindings()
        await self.challenges.load()
        await self.rechecks.load()
        async with trio.open_nursery() as nursery:
            await nursery.start(self.drain.run)
            await nursery.start(self.brc20.run)
            await nursery.start(self.dispatcher.run)
            await nursery.start(self.detached.run)
            nursery.start_soon(self.dispatcher.show_running)
            nursery.start_soon(self.nodes.run)
            nursery.start_soon(self.standings.run)
            nursery.start_soon(self.placements.run)
            nursery.start_soon(self.control.run)
            nursery.start_soon(self.models.run)
            nursery.start_soon(self.archives.run)
            async with self._host() as host:
                self.host = host
                self.discovery = self._discovery_on(host)
                await self.membership.join()
                taken_up = await self.detached.recover(self._spec_of)
                addresses = await nursery.start(self._serve_clients)
                own: dict[str, list[BoundAddress]] = {}
                for profile, listen in self.settings.profiles.listen.items():
                    handler = functools.partial(self.front.handle_of, profile)
                    own[profile] = await nursery.start(self._serve, handler, listen)
                self.where = self._describe(host, addresses, own)
                await nursery.start(self.discovery.run)
                await nursery.start(serve_admin_socket, self.directory, self.admin)
                nursery.start_soon(self.membership.run)
                nursery.start_soon(self.webhooks.run)
                await nursery.start(self.challenges.run)
                nursery.start_soon(self.rechecks.run)
                nursery.start_soon(self._keep_swept)
                nursery.start_soon(run_watchdog, notifier)
                with self._announced():
                    garbage.settle()
                    log.info("bootstrap_ready", taken_up=taken_up, **self.where)
                    notifier.ready(f"serving clients on {', '.join(self.where['http'])}")
                    task_status.started(self.where)
                    await self.drain.requested.wait()
                    notifier.stopping("draining")
                    notifier.extend_timeout(self.settings.drain_s + TELL_S + SETTLE_S)
                    await self._drain()
                    await self.discovery.withdraw()
                nursery.cancel_scope.cancel()
        log.info("bootstrap_stopped")

    async def _check_bindings(self) -> None:
        """See that the workspaces which profiles run on are there, or were once."""
        profiles = self.settings.profiles
        if not (profiles.bind or profiles.public):
            return
        names = {workspace.id: workspace.spec.name for workspace in self.workspaces}
        removed = {row.id for row in await self.store.list_workspaces(removed=True)} - names.keys()
        bindings = check_bindings(profiles, names, removed | self.workspaces.strange)
        if bindings.problems:
            raise StartError("; ".join(bindings.problems))
        for key, workspace in bindings.lost:
            log.warning("profile_workspace_removed", key=key, workspace=workspace)

    @asynccontextmanager
    async def _host(self) -> AsyncIterator[Host]:
        handlers: dict[str, Callable[[P2PStream], Awaitable[None]]] = {
            CONTROL_PROTOCOL: self.control.handle,
            RECEIPTS_PROTOCOL: self.receipts.handle,
        }
        try:
            async with open_host(
                self.account, listen=self.settings.listen, network=self.network, handlers=handlers, limits=PEER_LIMITS
            ) as host:
                yield host
        except ListenError as error:
            raise StartError(str(error)) from error

    async def _serve_clients(self, *, task_status: trio.TaskStatus[list[BoundAddress]]) -> None:
        await self._serve(self.front.handle, self.settings.http_listen, task_status=task_status)

    async def _serve(self, handler: Handler, listen: str, *, task_status: trio.TaskStatus[list[BoundAddress]]) -> None:
        host, port = parse_host_port(listen)
        limits = Limits(
            max_head_bytes=CLIENT_HEAD_BYTES,
            max_target_bytes=16 * 1024,
            max_body_bytes=self.settings.limits.request_body_bytes,
            max_connections=self.settings.limits.connections,
        )
        try:
            await serve_tcp(
                handler,
                host=host,
                port=port,
                limits=limits,
                tls=self.tls,
                draining=self.draining,
                describe=broken_request,
                task_status=task_status,
            )
        except OSError as error:
            raise StartError(f"cannot listen on {listen}: {error.strerror or error}") from error

    def _describe(
        self, host: Host, addresses: list[BoundAddress], own: Mapping[str, list[BoundAddress]]
    ) -> dict[str, Any]:
        scheme = "https" if self.tls is not None else "http"
        profiles = {name: [f"{scheme}://{address}" for address in bound] for name, bound in own.items()}
        return {
            "address": self.account.address,
            "peer_id": self.account.peer_id,
            "network": self.settings.network,
            "http": [f"{scheme}://{address}" for address in addresses],
            "multiaddrs": host.addresses,
            "pid": os.getpid(),
            **({"profiles": profiles} if profiles else {}),
        }

    @contextmanager
    def _announced(self) -> Iterator[None]:
        """Say in the data directory where this run listens, for as long as it does."""
        path: Path = self.directory.path / RUNTIME_FILE
        new = path.with_suffix(".new")
        new.write_text(json.dumps(self.where, indent=1) + "\n")
        new.rename(path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def _webhook_problem(self, url: str) -> str:
        return self.webhook_rules.problem(url) if self.settings.webhooks.enabled else "this bootstrap calls nobody back"

    def _check_reader(self, token: Token) -> None:
        """Return if *token* is an operator's key that may read."""
        try:
            self.operator_keys.require(token, Scope.READ, now_ms())
        except OperatorKeysError as error:
            log.error("operator_keys_unusable", reason=str(error))
            raise NotServed(
                503,
                "keys_unavailable",
                "operator keys cannot be checked now; the operator's log says why",
                retry_after_s=30,
            ) from None

    def _token_hash(self, workspace_id: str, label: str) -> bytes | None:
        workspace = self.workspaces.get(workspace_id)
        tokens = workspace.tokens if workspace is not None else ()
        return next((token.hash for token in tokens if token.label == label), None)

    def _about(self) -> dict[str, Any]:
        """What siblings may know of this bootstrap."""
        where = {name: self.where.get(name, []) for name in ("http", "multiaddrs")}
        return {**where, "peer_id": self.account.peer_id, STAND_INS: self.stand_ins.about}

    async def _met_siblings(self, met: Sequence[Sibling]) -> None:
        self.receipts.siblings = frozenset(one.address for one in met if one.address != self.account.address)
        self.stand_ins.met(met)
        await self.confided.share(met)

    async def _adopt(self, tasks: Sequence[OpenTask]) -> None:
        await self.detached.adopt(tasks, self._spec_of)

    def _believed(self, node: Address) -> dict[str, Any]:
        """Return what clients are told of a node's standing and of what its GPUs last showed."""
        score, trusted = self.standings.in_short(node)
        finding, at_ms = self.challenges.last(node)
        return {
            "standing": round(score, 4),
            "trusted": trusted,
            "lastChallenge": finding,
            "lastChallengedAtMs": at_ms,
        }

    def _running_spec(self, workspace_id: str) -> WorkspaceSpec | None:
        workspace = self.workspaces.get(workspace_id)
        return workspace.spec if workspace is not None else None

    def _spec_of(self, task: TaskRecord) -> WorkspaceSpec | None:
        workspace = self.workspaces.get(task.workspace)
        return workspace.spec if workspace is not None else None

    def _workspaces_changed(self) -> None:
        self.models.refresh()
        self.control.refresh()
        self.archives.look()

    def _is_coming(self, workspace_id: str) -> bool:
        return bool(self._on_the_way(workspace_id))

    def _on_the_way(self, workspace_id: str) -> str:
        workspace = self.workspaces.get(workspace_id)
        return self.deployments.on_the_way(workspace) if workspace is not None else ""

    async def _drain(self) -> None:
        """Let running requests end within the grace period, and commit their ends."""
        self.nodes.hold_promised()
        self.draining.start()
        finished = trio.Event()

        async def wait_finished() -> None:
            await self.draining.wait_finished()
            await self.nodes.wait_idle()
            finished.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_finished)
            clean = await self.drain.grace(finished, self.settings.drain_s)
            if not clean:
                self.front.tasks_api.promises.stop()
                with trio.move_on_after(TELL_S):
                    await finished.wait()
            nursery.cancel_scope.cancel()
        log.info("drained", clean=clean)
        await self.membership.leave()
        with trio.move_on_after(SETTLE_S):
            await self.dispatcher.settle()
            with contextlib.suppress(StoreError):
                await self.standings.flush()
                await self.placements.flush(now_ms() + 1)
