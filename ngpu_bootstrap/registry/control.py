"""The bootstrap's side of `/ngpu/control/1.0.0`: nodes greet, report, and are told what to run.

Owns the conversation on one control stream and the service that tells nodes what they should run. The messages are
`ngpu_protocol.control`; which node runs what is `assignment`. A node that misbehaves loses its stream and nothing
else happens: it greets again.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

import structlog
import trio

from ngpu_bootstrap.errors import Refusal
from ngpu_bootstrap.registry.confided import Confided
from ngpu_bootstrap.registry.deployments import DeploymentTable
from ngpu_bootstrap.registry.nodes import Nodes, NodeSession
from ngpu_bootstrap.store.errors import StoreError
from ngpu_protocol.control import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION_HIGH,
    PROTOCOL_VERSION_LOW,
    Bye,
    ControlMessage,
    Desired,
    Heartbeat,
    Hello,
    Refused,
    UnknownMessage,
    Welcome,
    decode_control,
    encode_message,
)
from ngpu_protocol.errors import MalformedError, SignatureError
from ngpu_protocol.http1 import Client
from ngpu_protocol.identity import Address
from ngpu_protocol.networks import network_named
from ngpu_protocol.p2p import FrameError, P2PStream, receive_frame, send_frame
from ngpu_protocol.prices import check_price_list
from ngpu_protocol.receipts import ReceiptLink
from ngpu_protocol.workspaces import WorkspaceSpec

log = structlog.get_logger(__name__)

HELLO_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 10.0
# A node that reports nothing for this long is gone, whatever its connection says; far beyond the 5 s after which
# scheduling leaves it out.
SILENT_FOR_GOOD_S = 60.0
# Changes that come together (ten workspaces added in a loop) become one message.
SETTLE_S = 0.02
# Secrets that could not be read are tried again after this: a sibling may have sealed them to this one meanwhile.
SECRETS_AGAIN_S = 3.0
# What only time changes (a node is given up, a workspace ends) is looked at this often.
TICK_S = 5.0


@dataclass(frozen=True, slots=True)
class Greeting:
    """What this bootstrap says of itself, and whom it takes.

    Attributes:
        approved: the nodes admitted; None admits any.
    """

    network: str
    service: str
    heartbeat_s: float
    approved: Collection[Address] | None = None


@dataclass(eq=False, slots=True)
class _Conversation:
    session: NodeSession
    scope: trio.CancelScope
    desired: Sequence[WorkspaceSpec] | None = None
    as_of_ms: int = 0
    changed: trio.Event = field(default_factory=trio.Event)


def judge_hello(hello: Hello, remote: Address, network: str) -> Refused | None:
    """Return why this bootstrap will not talk to the node that said *hello*, or None when it will. Pure."""
    if hello.network != network:
        return Refused("wrong_network", f"this bootstrap is on network {network}, the node on {hello.network[:64]}")
    if hello.node != remote:
        return Refused("wrong_node", f"the node says it is {hello.node}, its connection's key is that of {remote}")
    if hello.version_low > PROTOCOL_VERSION_HIGH or hello.version_high < PROTOCOL_VERSION_LOW:
        return Refused(
            "wrong_version",
            f"this bootstrap speaks versions {PROTOCOL_VERSION_LOW} to {PROTOCOL_VERSION_HIGH}, the node "
            f"{hello.version_low} to {hello.version_high}; update the older of the two",
        )
    return None


class ControlDesk:
    """Handles every node's control stream.

    Attributes:
        noticed: called whenever something changed that bears on what nodes should run.

    Args:
        open_requests: makes the pooled HTTP client over the connection of a peer.
        chain_head: the last receipt of a node that this bootstrap knows of; None for none.
        met: notes in the store that the node was here, and which GPUs it offered.
        gpus_shown: the GPUs a node offered in a session so far, by id, each with its model.
        keep_prices: makes durable what a node asks in a session, empty for nothing, and returns what holds for it.
    """

    def __init__(
        self,
        *,
        greeting: Greeting,
        nodes: Nodes,
        deployments: DeploymentTable,
        confided: Confided,
        open_requests: Callable[[str], Client],
        chain_head: Callable[[Address], Awaitable[ReceiptLink | None]],
        met: Callable[[NodeSession], Awaitable[None]],
        gpus_shown: Callable[[Address, bytes], Awaitable[dict[bytes, str]]],
        keep_prices: Callable[[Address, bytes, bytes, int], Awaitable[bytes]],
        now_ms: Callable[[], int],
    ) -> None:
        self._gpus_shown = gpus_shown
        self._keep_prices = keep_prices
        self._greeting = greeting
        self._nodes = nodes
        self._deployments = deployments
        self._confided = confided
        self._open_requests = open_requests
        self._chain_head = chain_head
        self._met = met
        self._now_ms = now_ms
        self._conversations: dict[NodeSession, _Conversation] = {}
        self._stale = trio.Event()
        self._joined = trio.Event()
        self.noticed: Callable[[], None] = lambda: None

    def refresh(self) -> None:
        """Have what nodes should run worked out again: a workspace or a node has changed."""
        self._stale.set()
        self.noticed()

    async def wait_joined(self) -> None:
        """Return when the next admitted node has greeted and reported."""
        await self._joined.wait()

    async def run(self) -> None:
        """Tell nodes what they should run, whenever it changes; for ever."""
        while True:
            with trio.move_on_after(TICK_S):
                await self._stale.wait()
            if not self._stale.is_set() and not self._deployments.waits:
                continue
            self._stale = trio.Event()
            await trio.sleep(SETTLE_S)
            try:
                await self._deployments.work_out()
            except StoreError as error:
                log.error("placement_not_stored", reason=str(error))
                await trio.sleep(1.0)
                self._stale.set()
                continue
            # A node that has not reported yet may run and offer anything: telling it to run nothing would stop that.
            for conversation in self._conversations.values():
                session = conversation.session
                specs = self._deployments.desired.get(session.node)
                if specs is None or self._nodes.get(session.node) is not session or not session.reported:
                    continue
                serving = self._deployments.serving[session.node]
                if serving != session.assigned:
                    self._nodes.assign(session, serving)
                if specs != conversation.desired:
                    conversation.desired, conversation.as_of_ms = specs, self._deployments.as_of_ms
                    conversation.changed.set()

    async def handle(self, stream: P2PStream) -> None:
        """Serve one control stream until it ends."""
        try:
            await self._serve(stream)
        except* (MalformedError, FrameError) as group:
            for error in group.exceptions:
                log.info("node_misbehaved", node=stream.remote_address, reason=str(error))
            await stream.reset()
        except* StoreError as store_group:
            log.error("node_not_welcomed", node=stream.remote_address, reason=str(store_group.exceptions[0]))
            await stream.reset()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            await stream.reset()  # the peer went away or stopped reading; what follows was done on the way here

    async def _serve(self, stream: P2PStream) -> None:
        hello: ControlMessage | UnknownMessage | None = None
        with trio.move_on_after(HELLO_TIMEOUT_S):
            hello = await _receive(stream)
        if not isinstance(hello, Hello):
            raise MalformedError("control stream", "it does not begin with a hello")
        refused = judge_hello(hello, stream.remote_address, self._greeting.network)
        if refused is not None:
            log.info("node_refused", node=stream.remote_address, reason=refused.reason)
            await _send(stream, refused)
            await stream.aclose()
            return
        # on file before there can be an order of this session: whoever signs one knows what is asked
        if not await self._prices_stand(hello):
            log.info("node_refused", node=hello.node, reason="prices_changed")
            await _send(stream, Refused("prices_changed", "this session has another price list: restart the node"))
            await stream.aclose()
            return
        admitted = self._greeting.approved is None or hello.node in self._greeting.approved
        head = await self._chain_head(hello.node)
        shown = await self._gpus_shown(hello.node, hello.session)
        await _send(stream, self._welcome(hello, head, admitted=admitted))
        now_ms = self._now_ms()
        session = NodeSession(
            node=hello.node,
            peer_id=stream.remote_peer,
            session=hello.session,
            software=hello.software[:128],
            gpus=hello.gpus,
            slots=hello.slots,
            admitted=admitted,
            connected_at_ms=now_ms,
            heard_at_ms=now_ms,
            requests=self._open_requests(stream.remote_peer),
            ip=stream.remote_ip,
            gpus_shown=shown,
            slots_free=hello.slots,
        )
        skew_ms = hello.now_ms - now_ms
        log.info("node_joined", node=session.node, admitted=admitted, software=session.software, skew_ms=skew_ms)
        await self._converse(stream, session)
        await stream.aclose()

    async def _prices_stand(self, hello: Hello) -> bool:
        """Whether what *hello* asks is what its session asked first.

        Raises:
            MalformedError: it is none of this node and session.
        """
        chain_id = network_named(self._greeting.network).chain_id
        try:
            if hello.prices:
                check_price_list(hello.prices, hello.node, hello.session, chain_id)
        except SignatureError as error:
            raise MalformedError("price list", str(error)) from None
        return await self._keep_prices(hello.node, hello.session, hello.prices, self._now_ms()) == hello.prices

    async def _converse(self, stream: P2PStream, session: NodeSession) -> None:
        """Keep up *session* until the node leaves, or greets anew on another stream."""
        why = "connection lost"
        conversation = _Conversation(session, trio.CancelScope())
        replaced = self._nodes.attach(session)
        if replaced is not None and (old := self._conversations.get(replaced)) is not None:
            old.scope.cancel()
        self._conversations[session] = conversation
        try:
            await self._met(session)
            with conversation.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._tell, stream, conversation)
                    why = await self._listen(stream, session)
                    nursery.cancel_scope.cancel()
            if conversation.scope.cancelled_caught:
                why = "replaced"
        finally:
            self._conversations.pop(session, None)
            self._nodes.detach(session)
            self.refresh()
            log.info("node_left", node=session.node, reason=why)
            with trio.move_on_after(1.0, shield=True):
                await session.requests.aclose()

    def _welcome(self, hello: Hello, head: ReceiptLink | None, *, admitted: bool) -> Welcome:
        link = {"head_sequence": head.sequence, "head_hash": head.hash} if head is not None else {}
        return Welcome(
            network=self._greeting.network,
            version=min(hello.version_high, PROTOCOL_VERSION_HIGH),
            service=self._greeting.service,
            now_ms=self._now_ms(),
            heartbeat_s=self._greeting.heartbeat_s,
            admitted=admitted,
            **link,  # type: ignore[arg-type]
        )

    async def _listen(self, stream: P2PStream, session: NodeSession) -> str:
        """Take in what the node reports until it leaves; return why it did."""
        before: tuple[object, ...] = ()
        while True:
            message: ControlMessage | UnknownMessage | None = None
            with trio.move_on_after(SILENT_FOR_GOOD_S) as patience:
                message = await _receive(stream)
            if patience.cancelled_caught:
                return "silent"
            if message is None:
                return "closed"
            if isinstance(message, Heartbeat):
                is_first, shown = not session.reported, len(session.gpus_shown)
                self._nodes.heard(session, message)
                if len(session.gpus_shown) > shown:  # before it gets an order for one of them
                    await self._met(session)
                if is_first:  # in the same breath: who sees it ready may call it
                    self._nodes.assign(session, self._deployments.presumed(session))
                if is_first and session.admitted:
                    joined, self._joined = self._joined, trio.Event()
                    joined.set()
                now = _bearing(message)
                if now != before:
                    before = now
                    self.refresh()
            elif isinstance(message, Bye):
                return f"bye: {message.reason[:128]}"
            elif not isinstance(message, UnknownMessage):
                raise MalformedError("control stream", f"a {type(message).__name__} is not for a node to send")

    async def _tell(self, stream: P2PStream, conversation: _Conversation) -> None:
        """Send the node its list of workspaces once it is worked out, and at each change."""
        again_s = math.inf
        while True:
            with trio.move_on_after(again_s):
                await conversation.changed.wait()
            conversation.changed = trio.Event()
            wanted, as_of_ms = tuple(conversation.desired or ()), conversation.as_of_ms
            specs, sealed = await self._sealed(wanted, conversation.session)
            again_s = math.inf if specs == wanted else SECRETS_AGAIN_S
            message = Desired(specs, sealed, as_of_ms)
            try:
                with trio.fail_after(SEND_TIMEOUT_S):
                    await _send(stream, message)
            except ValueError as error:  # it keeps what it has, and the operator hears of it
                log.error("desired_not_sent", node=conversation.session.node, reason=str(error))

    async def _sealed(
        self, specs: Sequence[WorkspaceSpec], session: NodeSession
    ) -> tuple[tuple[WorkspaceSpec, ...], dict[str, bytes]]:
        """Return those of *specs* that the node can run, and what it needs to know of them and nobody else may.

        One whose secrets cannot be read here now is left out, unless the node has it from another bootstrap: it would
        fail there for want of them.
        """
        tellable: list[WorkspaceSpec] = []
        sealed: dict[str, bytes] = {}
        there = {(state.workspace, state.revision) for state in session.reports}
        for spec in specs:
            try:
                box = await self._confided.for_node(spec, session.peer_id)
            except (MalformedError, StoreError, Refusal) as error:
                log.error("secrets_not_sent", workspace=spec.id, node=session.node, reason=str(error))
                if (spec.id, spec.revision) in there:
                    tellable.append(spec)
                continue
            tellable.append(spec)
            if box is not None:
                sealed[spec.id] = box
        return tuple(tellable), sealed


def _bearing(heartbeat: Heartbeat) -> tuple[object, ...]:
    """Return what bears on what nodes should run; slots, progress and free disk change all the time."""
    host = heartbeat.host
    states = frozenset(
        (state.workspace, state.revision, state.state, state.reason, state.image_digest)
        for state in heartbeat.deployments
    )
    machine = (host.engine, host.cpus, host.memory_bytes, host.area, host.egress) if host is not None else None
    return heartbeat.draining, heartbeat.services, states, heartbeat.gpus, machine


async def _receive(stream: P2PStream) -> ControlMessage | UnknownMessage | None:
    frame = await receive_frame(stream, MAX_MESSAGE_BYTES)
    return None if frame is None else decode_control(frame)


async def _send(stream: P2PStream, message: ControlMessage) -> None:
    await send_frame(stream, encode_message(message))
