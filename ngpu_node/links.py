"""One link per trusted bootstrap: dialled, greeted, kept for ever.

A link owns the control stream (`/ngpu/control/1.0.0`) and the life of the receipts stream beside it. Out go
heartbeats, at once when something about a deployment changed and else at the bootstrap's pace; in come wishes.
Whatever goes wrong ends the session; the next begins after a growing, jittered wait. Nothing a bootstrap does can end
the daemon.

How many slots are free changes with every task, and the bootstrap that gave the task knows; so that alone is told at
once only when it begins or ends to be none.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog
import trio

from ngpu_daemon.metrics import software_version
from ngpu_node.changes import Changes
from ngpu_node.courier import Courier
from ngpu_node.deployments import Deployment, Deployments
from ngpu_node.errors import BootstrapMisbehaved, BootstrapRefused
from ngpu_node.execution.admission import AdmissionState
from ngpu_node.ledger import Ledger
from ngpu_node.metrics import NodeMetrics
from ngpu_node.services import ModelServers
from ngpu_node.trust import TrustedBootstrap
from ngpu_node.wishes import WishOrder
from ngpu_protocol.control import (
    CONTROL_PROTOCOL,
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION_HIGH,
    PROTOCOL_VERSION_LOW,
    RECEIPTS_PROTOCOL,
    Bye,
    ControlMessage,
    Desired,
    GpuOffer,
    Heartbeat,
    Hello,
    HostOffer,
    Refused,
    UnknownMessage,
    Welcome,
    decode_control,
    encode_message,
)
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.identity import Address
from ngpu_protocol.p2p import (
    BackOff,
    BadMultiaddrError,
    DialError,
    FrameError,
    Host,
    P2PError,
    receive_frame,
    send_frame,
)
from ngpu_protocol.receipts import ReceiptLink

log = structlog.get_logger(__name__)

DIAL_TIMEOUT_S = 10.0
GREET_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 10.0
#: Changes that come together go out together.
COALESCE_S = 0.02
#: A bootstrap that refused this node will hardly think otherwise in a second.
REFUSED_WAIT_S = 30.0
RECEIPTS_RETRY_S = 2.0
GOODBYE_S = 1.0

_REMOTE_ERRORS = (
    P2PError,
    FrameError,
    MalformedError,
    BootstrapMisbehaved,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
)


@dataclass(slots=True)
class LinkStatus:
    """How a link stands, for the owner.

    Attributes:
        since_s: when it came to stand so, on trio's clock.
        problem: why it is not connected, empty while it is.
    """

    connected: bool = False
    admitted: bool = False
    since_s: float = 0.0
    problem: str = "not dialled yet"
    multiaddr: str = ""
    heartbeats: int = 0
    clock_offset_ms: int | None = None


@dataclass(slots=True)
class LinkParts:
    """What every link works with.

    Attributes:
        running_of: returns how many attempts a bootstrap ordered run on each deployment.
        addresses_of: returns where the network says a peer is, for a bootstrap that is not where it was configured.
        price_list: the signed one of this session, empty for none.
        wishes: which of several bootstraps' lists is the older one.
    """

    host: Host
    network: str
    gpus: Callable[[], tuple[GpuOffer, ...]]
    state: AdmissionState[Deployment]
    deployments: Deployments
    running_of: Callable[[Address], Counter[Deployment]]
    servers: ModelServers
    changes: Changes
    host_offer: Callable[[], HostOffer]
    courier: Courier
    ledger: Ledger
    metrics: NodeMetrics
    addresses_of: Callable[[Address], Awaitable[list[str]]]
    price_list: bytes = b""
    wishes: WishOrder = field(default_factory=WishOrder)
    back_off: BackOff = field(default_factory=BackOff)
    clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000


class Link:
    """The link to one bootstrap; `run` keeps it."""

    def __init__(self, bootstrap: TrustedBootstrap, parts: LinkParts) -> None:
        self.bootstrap = bootstrap
        self.status = LinkStatus(since_s=trio.current_time())
        self._parts = parts
        self._stream: trio.abc.Stream | None = None
        self._moved_to = ""
        self._sending = trio.StrictFIFOLock()

    @property
    def away_s(self) -> float:
        """For how long there has been no session; 0 while there is one."""
        return 0.0 if self.status.connected else trio.current_time() - self.status.since_s

    async def run(self) -> None:
        """Connect, greet, serve, and again, until cancelled."""
        failures = 0
        policy = self._parts.back_off
        while True:
            began_s = trio.current_time()
            problem = await self._attempt()
            lasted_s = trio.current_time() - began_s
            if self.status.connected:
                log.info(
                    "bootstrap_lost", bootstrap=self.bootstrap.address, reason=str(problem), after_s=round(lasted_s)
                )
                if lasted_s >= policy.stable_s:
                    failures = 0
                self._became(connected=False)
            failures += 1
            self.status.problem = str(problem)
            delay_s = policy.delay_s(failures, random.random())
            if isinstance(problem, BootstrapRefused):
                delay_s = max(delay_s, REFUSED_WAIT_S * random.uniform(0.5, 1.0))
            if failures & (failures - 1) == 0:  # the 1st, 2nd, 4th, 8th...: a bootstrap away for a day is not a flood
                log.info(
                    "bootstrap_unreachable",
                    bootstrap=self.bootstrap.address,
                    reason=str(problem),
                    failures=failures,
                    retry_in_s=round(delay_s, 2),
                )
            await trio.sleep(delay_s)

    async def say_goodbye(self, reason: str) -> None:
        """Tell the bootstrap that this node leaves on purpose, if it is there."""
        if self._stream is not None:
            with trio.move_on_after(GOODBYE_S):
                with contextlib.suppress(*_REMOTE_ERRORS):
                    await self._send(Bye(reason=reason))

    def _became(self, *, connected: bool) -> None:
        self.status.connected = connected
        self.status.since_s = trio.current_time()
        self.status.admitted = self.status.admitted and connected
        if connected:
            self.status.problem = ""

    # -- one session ---------------------------------------------------------------------------------------------------

    async def _attempt(self) -> Exception:
        """Run one session and return what ended it."""
        ended: list[Exception] = []
        try:
            await self._session()
        except* (*_REMOTE_ERRORS, BootstrapRefused) as group:
            ended += _leaves(group)
        except* Exception as group:
            # A bug of ours, or a ledger that failed: the first must not end the daemon, the second is about to.
            log.error("link_crashed", bootstrap=self.bootstrap.address, exc_info=group)
            ended += _leaves(group)
        return ended[0] if ended else BootstrapMisbehaved("the bootstrap ended the control stream")

    async def _session(self) -> None:
        parts = self._parts
        peer_id = await self._dial()
        try:
            stream = await parts.host.open_stream(peer_id, CONTROL_PROTOCOL, timeout_s=GREET_TIMEOUT_S)
            self._stream = stream
            try:
                welcome = await self._greet(stream)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._beat, welcome.heartbeat_s)
                    nursery.start_soon(self._receipts, peer_id)
                    await self._receive(stream, nursery)
                    nursery.cancel_scope.cancel()
            finally:
                self._stream = None
                with trio.move_on_after(GOODBYE_S, shield=True):
                    await stream.aclose()
        finally:
            # Start afresh: what is wrong with a session may be wrong with its connection.
            with trio.move_on_after(GOODBYE_S, shield=True):
                await parts.host.disconnect(peer_id)

    async def _dial(self) -> str:
        failure: Exception | None = None
        tried = set()
        # Where it was found last comes first: one that moved is not looked for again at every reconnect.
        for multiaddr in dict.fromkeys((*filter(None, [self._moved_to]), *self.bootstrap.multiaddrs)):
            tried.add(multiaddr)
            try:
                return await self._dial_at(multiaddr)
            except DialError as error:
                failure = error
        # It may have moved: its own record says where to. The handshake still proves that it is the one trusted.
        for multiaddr in await self._parts.addresses_of(self.bootstrap.address):
            if multiaddr in tried:
                continue
            try:
                peer_id = await self._dial_at(multiaddr)
            except (DialError, BadMultiaddrError) as error:
                log.info("bootstrap_not_at_its_record", bootstrap=self.bootstrap.address, reason=str(error))
                continue
            self._moved_to = multiaddr
            log.info("bootstrap_moved", bootstrap=self.bootstrap.address, multiaddr=multiaddr)
            return peer_id
        assert failure is not None
        raise failure

    async def _dial_at(self, multiaddr: str) -> str:
        host = self._parts.host
        was_there = host.is_connected(self.bootstrap.multiaddrs[0].rpartition("/p2p/")[2])
        peer_id = await host.connect(multiaddr, timeout_s=DIAL_TIMEOUT_S)
        # A connection that the DHT made before serves as well, whatever address was asked for: to where the bootstrap
        # has moved, or, if it came to us, to no address at all.
        dialled = host.dialled_at(peer_id)
        if dialled is None:
            self.status.multiaddr = ""
        else:
            self.status.multiaddr = f"{dialled}/p2p/{peer_id}" if was_there else multiaddr
        return peer_id

    async def _greet(self, stream: trio.abc.Stream) -> Welcome:
        parts = self._parts
        hello = self._hello()
        sent_ms = parts.clock_ms()
        with trio.fail_after(GREET_TIMEOUT_S):
            await self._send(hello)
            answer = await _receive_control(stream)
        round_trip_ms = parts.clock_ms() - sent_ms
        if isinstance(answer, Refused):
            raise BootstrapRefused(answer.reason, answer.message)
        if not isinstance(answer, Welcome):
            raise BootstrapMisbehaved("the bootstrap answered a greeting with something else")
        if answer.network != hello.network or not hello.version_low <= answer.version <= hello.version_high:
            raise BootstrapMisbehaved(
                f"the bootstrap welcomed this node to network {answer.network!r}, version {answer.version}"
            )
        offset_ms = answer.now_ms - (sent_ms + round_trip_ms // 2)
        parts.state.clock_offset_ms[self.bootstrap.address] = offset_ms
        self.status.clock_offset_ms = offset_ms
        if abs(offset_ms) > 5000:
            log.warning("clocks_differ", bootstrap=self.bootstrap.address, offset_ms=offset_ms)
        try:
            head = await parts.ledger.adopt_head(
                self.bootstrap.address, ReceiptLink(answer.head_sequence, answer.head_hash)
            )
        except ValueError as error:
            raise BootstrapMisbehaved(str(error)) from error
        self._became(connected=True)
        self.status.admitted = answer.admitted
        parts.metrics.sessions += 1
        log.info(
            "bootstrap_welcomed",
            bootstrap=self.bootstrap.address,
            service=self.bootstrap.service,
            admitted=answer.admitted,
            clock_offset_ms=offset_ms,
            chain=head.sequence,
        )
        return answer

    def _hello(self) -> Hello:
        parts = self._parts
        return Hello(
            network=parts.network,
            version_low=PROTOCOL_VERSION_LOW,
            version_high=PROTOCOL_VERSION_HIGH,
            session=parts.state.session,
            node=parts.state.node,
            software=f"ngpu-node/{software_version()}",
            now_ms=parts.clock_ms(),
            gpus=parts.gpus(),
            slots=parts.state.slots,
            prices=parts.price_list,
        )

    async def _send(self, message: ControlMessage) -> None:
        assert self._stream is not None
        async with self._sending:
            with trio.fail_after(SEND_TIMEOUT_S):
                await send_frame(self._stream, encode_message(message))

    async def _beat(self, heartbeat_s: float) -> None:
        parts = self._parts
        while True:
            seen = parts.changes.count
            await self._send(self._heartbeat())
            self.status.heartbeats += 1
            with trio.move_on_after(heartbeat_s):
                await parts.changes.beyond(seen)
                await trio.sleep(COALESCE_S)

    def _heartbeat(self) -> Heartbeat:
        parts = self._parts
        yours = parts.running_of(self.bootstrap.address)
        return Heartbeat(
            at_ms=parts.clock_ms(),
            slots_free=max(0, parts.state.slots - parts.state.running),
            draining=parts.state.draining or bool(parts.state.closed),
            host=parts.host_offer(),
            deployments=tuple(d.state(yours[d]) for d in parts.deployments.of_service(self.bootstrap.service)),
            gpus=parts.gpus(),
            services=parts.servers.offers(),
            yours=yours.total(),
        )

    async def _receive(self, stream: trio.abc.Stream, nursery: trio.Nursery) -> None:
        postponed = trio.CancelScope()
        while True:
            message = await _receive_control(stream)
            if isinstance(message, Desired):
                postponed.cancel()
                wait_s = self._parts.wishes.wait_s(
                    self.bootstrap.service, self.bootstrap.address, message.as_of_ms, trio.current_time()
                )
                log.info(
                    "wishes_received",
                    bootstrap=self.bootstrap.address,
                    deployments=len(message.deployments),
                    postponed_s=wait_s,
                )
                if wait_s:
                    postponed = trio.CancelScope()
                    nursery.start_soon(self._wish_later, message, wait_s, postponed)
                else:
                    self._wish(message)
            elif isinstance(message, Welcome):
                self.status.admitted = message.admitted
            elif isinstance(message, Bye | Refused):
                raise BootstrapMisbehaved(f"the bootstrap said goodbye: {message.reason}")

    def _wish(self, message: Desired) -> None:
        service, bootstrap = self.bootstrap.service, self.bootstrap.address
        self._parts.wishes.taken(service, bootstrap, message.as_of_ms, trio.current_time())
        self._parts.deployments.wish(service, message.deployments, message.sealed)

    async def _wish_later(self, message: Desired, wait_s: float, scope: trio.CancelScope) -> None:
        """Take a list that may be older than another's, unless its bootstrap says something newer meanwhile."""
        with scope:
            await trio.sleep(wait_s)
            self._wish(message)

    async def _receipts(self, peer_id: str) -> None:
        """Keep the receipts stream for as long as the session lives; its end is not the session's."""
        parts = self._parts
        while True:
            try:
                stream = await parts.host.open_stream(peer_id, RECEIPTS_PROTOCOL, timeout_s=GREET_TIMEOUT_S)
                try:
                    await parts.courier.serve(self.bootstrap, stream)
                finally:
                    with trio.move_on_after(GOODBYE_S, shield=True):
                        await stream.aclose()
            except* _REMOTE_ERRORS as group:
                log.info("receipts_stream_lost", bootstrap=self.bootstrap.address, reason=str(_leaves(group)[0]))
            await trio.sleep(RECEIPTS_RETRY_S)


async def _receive_control(stream: trio.abc.Stream) -> ControlMessage:
    """Return the next message that this version knows."""
    while True:
        frame = await receive_frame(stream, MAX_MESSAGE_BYTES)
        if frame is None:
            raise BootstrapMisbehaved("the bootstrap ended the control stream")
        message = decode_control(frame)
        if not isinstance(message, UnknownMessage):
            return message


def _leaves(group: BaseExceptionGroup[Exception]) -> list[Exception]:
    found: list[Exception] = []
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            found += _leaves(error)
        else:
            found.append(error)
    return found
