"""Admit an order or refuse it, before any byte reaches the workspace (design: One task, step 5).

Pure: takes the order's text, the request it came with, the node's state and the time, and returns `Admitted` or
`Refusal`. A refusal costs nothing and promises that nothing ran, so the bootstrap may try elsewhere at once. Each
ground for one has its own reason; the reason fixes the HTTP status (`ngpu_protocol.wire_errors`).

The order of the checks is part of the contract: what a stranger may learn ends at `unknown_bootstrap` and
`bad_signature`; what depends on this node's load comes last, so that a busy node still says what is wrong with an
order.

Replay: an order that was admitted is remembered until its deadline plus the tolerance, after which its deadline
refuses it. The memory does not survive a restart and need not: `session` is random, new at each start and part of
every order.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Set
from dataclasses import field
from typing import Generic, Protocol, TypeVar

from ngpu_node.trust import Trust
from ngpu_protocol.errors import MalformedError, SignatureError
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.identity import Address, recover
from ngpu_protocol.job_answers import MAX_BESIDE
from ngpu_protocol.orders import SignedOrder
from ngpu_protocol.wire_errors import Reason

PREFIX = "/ngpu/v1/workspaces/"

#: Nothing lasts longer than a spooled answer is kept (design: One task), and the memory of seen orders must end.
MAX_ORDER_LIFE_MS = 24 * 3600 * 1000
CLOCK_TOLERANCE_MS = 5_000
MAX_TASK_ID_CHARS = 128


@dataclass(frozen=True, slots=True)
class Asked:
    """The request line an order came with, taken apart; what the order must agree with.

    Attributes:
        target: path and query exactly as they go to the workspace, `/` first.
        content_length: what the request declares, None when it is chunked.
        peer: who proved its key on the connection the request came over.
        beside: the task it is about, which holds a slot here for as long as it lasts; empty for most.
    """

    method: str
    workspace: str
    port: int
    target: str
    content_length: int | None
    peer: Address
    beside: str = ""


class Candidate(Protocol):
    """What admission wants to know of a deployment."""

    @property
    def is_ready(self) -> bool: ...
    @property
    def detail(self) -> str: ...
    @property
    def ports(self) -> Set[int]: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def running(self) -> int: ...


C_co = TypeVar("C_co", bound=Candidate, covariant=True)
C = TypeVar("C", bound=Candidate)


class Candidates(Protocol[C_co]):
    """Where deployments are looked up; `Mapping[(service, workspace), Mapping[revision, deployment]]`."""

    def revisions(self, service: str, workspace: str) -> Mapping[int, C_co]: ...


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an order is not run here; *message* says so to a person."""

    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Admitted(Generic[C]):
    """An order this node will run and receipt.

    Attributes:
        order_hash: the order's digest, as receipts name it.
        left_ms: time until its deadline, measured on the bootstrap's clock.
        beside: the task in whose slot it runs; empty when it has its own.
    """

    signed: SignedOrder
    order_hash: bytes
    service: str
    deployment: C
    left_ms: int
    beside: str = ""


class SeenOrders:
    """The orders admitted by this run of the node that could still be replayed; bounded by *limit*.

    Remembered as (service, task, attempt), not by hash: one attempt at a task runs once, whatever two orders for it
    say.
    """

    def __init__(self, limit: int = 500_000) -> None:
        self._limit = limit
        self._until_s: dict[tuple[str, str, int], int] = {}
        self._due: list[int] = []
        self._by_second: dict[int, list[tuple[str, str, int]]] = {}

    def __len__(self) -> int:
        return len(self._until_s)

    def __contains__(self, key: tuple[str, str, int]) -> bool:
        return key in self._until_s

    @property
    def is_full(self) -> bool:
        return len(self._until_s) >= self._limit

    def add(self, key: tuple[str, str, int], deadline_ms: int) -> None:
        """Remember *key* until *deadline_ms* plus the tolerance."""
        second = (deadline_ms + CLOCK_TOLERANCE_MS) // 1000 + 1
        self._until_s[key] = second
        bucket = self._by_second.get(second)
        if bucket is None:
            bucket = self._by_second[second] = []
            heapq.heappush(self._due, second)
        bucket.append(key)

    def forget(self, now_ms: int) -> None:
        """Drop what can no longer be replayed at *now_ms*."""
        now_s = now_ms // 1000
        while self._due and self._due[0] <= now_s:
            for key in self._by_second.pop(heapq.heappop(self._due)):
                del self._until_s[key]


@dataclass(slots=True)
class Held(Generic[C]):
    """A slot that a task holds, and how many orders run beside it."""

    deployment: C
    beside: int = 0


@dataclass(slots=True)
class AdmissionState(Generic[C]):
    """What the decision depends on besides the order and the request.

    Attributes:
        clock_offset_ms: what to add to this node's clock to get a bootstrap's, as measured when it was greeted; 0
        when unknown.
            A node whose clock is wrong still serves (its receipts are judged `skew`).
        slots: attempts this node runs at once, all workspaces together.
        draining: the node is stopping.
        closed: why the owner lends nothing now, empty while he does.
        held: tasks, by service, that hold a slot with a question that is repeated: on which deployment, and how many
            orders run beside it.
    """

    node: Address
    session: bytes
    chain_id: int
    trust: Trust
    deployments: Candidates[C]
    slots: int
    max_body_bytes: int
    running: int = 0
    draining: bool = False
    closed: str = ""
    seen: SeenOrders = field(default_factory=SeenOrders)
    clock_offset_ms: dict[Address, int] = field(default_factory=dict)
    held: dict[tuple[str, str], Held[C]] = field(default_factory=dict)


def parse_target(target: str) -> tuple[str, int, str] | None:
    """Split `/ngpu/v1/workspaces/{id}/ports/{port}{target}` into its three; None when it is not of that form."""
    if not target.startswith(PREFIX):
        return None
    workspace, _, rest = target[len(PREFIX) :].partition("/")
    word, _, rest = rest.partition("/")
    port_text, slash, path = rest.partition("/")
    if word != "ports" or not slash or not workspace or not port_text.isascii() or not port_text.isdigit():
        return None
    port = int(port_text) if len(port_text) <= 5 else 0
    if not 1 <= port <= 65535 or port_text[0] == "0":
        return None
    return workspace, port, "/" + path


def judge(order_text: str | None, asked: Asked, state: AdmissionState[C], now_ms: int) -> Admitted[C] | Refusal:
    """Decide about one order at *now_ms* on this node's clock. Changes nothing; see `take`."""
    if order_text is None:
        return Refusal(Reason.MALFORMED_ORDER, "the header Ngpu-Order is missing, or there more than once")
    try:
        signed = SignedOrder.decode(order_text)
    except MalformedError as error:
        return Refusal(Reason.MALFORMED_ORDER, f"the header Ngpu-Order cannot be read: {error}")
    order = signed.order
    if len(order.task_id) > MAX_TASK_ID_CHARS:
        return Refusal(Reason.MALFORMED_ORDER, f"the order's task id is longer than {MAX_TASK_ID_CHARS} characters")

    service = state.trust.service_of(order.bootstrap)
    if service is None:
        return Refusal(Reason.UNKNOWN_BOOTSTRAP, f"this node's owner does not trust the bootstrap {order.bootstrap}")
    if asked.peer != order.bootstrap and not state.trust.same_service(asked.peer, order.bootstrap):
        return Refusal(Reason.UNKNOWN_BOOTSTRAP, f"peer {asked.peer} may not bring orders of {order.bootstrap}")
    order_hash = order.digest(state.chain_id)
    try:
        signer = recover(order_hash, signed.signature)
    except SignatureError as error:
        return Refusal(Reason.BAD_SIGNATURE, f"the order's signature is not valid: {error}")
    if signer != order.bootstrap:
        return Refusal(
            Reason.BAD_SIGNATURE, f"the order was signed by {signer}, on this network, not by {order.bootstrap}"
        )
    if order.node != state.node:
        return Refusal(Reason.WRONG_NODE, f"the order is for {order.node}, this is {state.node}")
    if order.session != state.session:
        return Refusal(Reason.WRONG_SESSION, "the order is for an earlier run of this node; greet it again")

    left_ms = order.deadline_ms - (now_ms + state.clock_offset_ms.get(order.bootstrap, 0))
    if left_ms <= 0:
        return Refusal(Reason.DEADLINE_PASSED, f"the order's deadline passed {-left_ms} ms ago")
    if left_ms > MAX_ORDER_LIFE_MS:
        return Refusal(Reason.MALFORMED_ORDER, f"the order's deadline is more than {MAX_ORDER_LIFE_MS} ms away")
    if (mismatch := _mismatch(signed, asked)) is not None:
        return Refusal(Reason.ORDER_MISMATCH, mismatch)
    if (service, order.task_id, order.attempt) in state.seen:
        return Refusal(Reason.ORDER_REPLAYED, f"attempt {order.attempt} of task {order.task_id} was admitted before")
    if state.draining:
        return Refusal(Reason.DRAINING, "this node is stopping and takes no new orders")
    if state.closed:
        return Refusal(Reason.DRAINING, state.closed)

    revisions = state.deployments.revisions(service, order.workspace)
    if not revisions:
        return Refusal(Reason.WORKSPACE_UNKNOWN, f"workspace {order.workspace} is not deployed here")
    deployment = revisions.get(order.revision)
    if deployment is None:
        here = ", ".join(str(revision) for revision in sorted(revisions))
        return Refusal(Reason.ORDER_MISMATCH, f"revision {order.revision} is not deployed here, but {here}")
    if order.port not in deployment.ports:
        return Refusal(Reason.ORDER_MISMATCH, f"workspace {order.workspace} does not declare port {order.port}")
    if not deployment.is_ready:
        return Refusal(Reason.WORKSPACE_NOT_READY, f"workspace {order.workspace} is not ready: {deployment.detail}")
    if asked.content_length is not None and asked.content_length > state.max_body_bytes:
        return Refusal(
            Reason.BODY_TOO_LARGE, f"the body has {asked.content_length} bytes, this node takes {state.max_body_bytes}"
        )
    if state.seen.is_full:
        return Refusal(Reason.NO_FREE_SLOT, "this node remembers as many open orders as it can")
    held = state.held.get((service, asked.beside)) if asked.beside else None
    if held is not None and held.deployment is deployment and held.beside < MAX_BESIDE:
        return Admitted(signed, order_hash, service, deployment, left_ms, asked.beside)
    if deployment.running >= deployment.concurrency:
        return Refusal(Reason.NO_FREE_SLOT, f"workspace {order.workspace} runs {deployment.running} tasks, its most")
    if state.running >= state.slots:
        return Refusal(Reason.NO_FREE_SLOT, f"this node runs {state.running} tasks, its most")
    return Admitted(signed, order_hash, service, deployment, left_ms)


def take(admitted: Admitted[C], state: AdmissionState[C]) -> None:
    """Remember that *admitted* runs: it cannot be admitted again. Slots are counted by who runs it."""
    order = admitted.signed.order
    offset_ms = state.clock_offset_ms.get(order.bootstrap, 0)
    state.seen.add((admitted.service, order.task_id, order.attempt), order.deadline_ms - offset_ms)


def _mismatch(signed: SignedOrder, asked: Asked) -> str | None:
    order = signed.order
    for name, ordered, got in (
        ("method", order.method, asked.method),
        ("workspace", order.workspace, asked.workspace),
        ("port", order.port, asked.port),
        ("target", order.target, asked.target),
    ):
        if ordered != got:
            return f"the order's {name} is {ordered!r}, the request's {got!r}"
    return None
