"""What goes into the store and comes out of it: plain frozen values, no behaviour beyond derived fields.

Times are UTC milliseconds. Text fields are never None: empty means "none" or "not known". Addresses are EIP-55 text.
Hashes and sessions are 32 raw bytes. Nothing here ever holds a credential: tokens appear as their public label and as a
hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from enum import StrEnum
from typing import Any

from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.identity import Address

NO_HASH = bytes(32)

# (name, value) pairs in wire order, names as sent
HeaderList = tuple[tuple[str, str], ...]


class Part(StrEnum):
    """Which of a task's two bodies."""

    REQUEST = "request"
    RESPONSE = "response"


@dataclass(frozen=True, slots=True)
class StoredBody:
    """A body kept with its task.

    Small ones are in *content*; larger ones are in the file *path*, relative to the bodies directory (read them with
    ``Store.read_body`` or ``Store.body_chunks``). Exactly one of the two is set.
    """

    size: int
    content: bytes | None = field(default=None, repr=False)
    path: str = ""


@dataclass(frozen=True, slots=True)
class WorkspaceToken:
    """One credential of a workspace, by what may be known of it.

    *label* is public and unique (the ``userkey`` of task details), *hash* is SHA-256 of the whole token: tokens carry
    enough random bits that neither salt nor a slow hash adds anything.
    """

    label: str
    hash: bytes = field(repr=False)
    created_at_ms: int
    expires_at_ms: int | None = None


@dataclass(frozen=True, slots=True)
class WorkspaceRow:
    """A client's workspace at its newest revision.

    *spec* is the workspace specification as JSON values, kept whole per revision. *tokens* are the live ones, oldest
    first.
    """

    id: str
    name: str
    revision: int
    spec: Mapping[str, Any]
    tokens: tuple[WorkspaceToken, ...]
    created_at_ms: int
    owner: str = ""
    updated_at_ms: int = 0
    removed_at_ms: int | None = None


@dataclass(frozen=True, slots=True)
class RolloutRow:
    """A new revision on its way to the nodes, or one that failed on its way.

    Attributes:
        base: the revision that serves until the new one is everywhere.
        failed_at_ms: None while it is under way; else *node*, *reason* and *detail* say where and why it failed.
    """

    workspace: str
    base: int
    target: int
    began_at_ms: int
    failed_at_ms: int | None = None
    node: str = ""
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class DeploymentRow:
    """A node that is to run a workspace, and the revision it was told."""

    workspace: str
    node: Address
    revision: int
    assigned_at_ms: int


@dataclass(frozen=True, slots=True)
class NewTask:
    """A task as the client asked for it, complete enough to dispatch it again after a restart.

    Attributes:
        api: What was called: ``schedulingTask``, a declared name (``img2img``) or ``proxy``. The documents' ``method``.
        request_url: Path and query as the client sent them, without any credential. The documents' ``requrl``.
        method: HTTP method towards the workspace.
        target: ``/path?query`` exactly as it goes to the workspace.
        headers: The headers that go to the workspace.
        detach: The client does not wait on this connection: the node may finish without us (an asynchronous task).
        wrapped: The answer goes back inside ``data``.
        deadline_at_ms: Absolute; after it the task expires.
        idempotency_key: The client's own, unique in its workspace; None without one.
        request: The body to send (bytes, or a stored one made by ``Store.new_body``); None when it is not kept.
        webhook: URL that is told of the task's end; empty for none.
        caller: the workspace whose token asked for it, where that is another than the one it runs on; else empty.
        job: what is kept of a job of the workspace's own (``job_rows.values``); None for every other task.
        affinity: The client's key for tasks that belong on one node, its bytes as Latin-1; empty without one.
    """

    task_id: str
    workspace: str
    revision: int
    api: str
    method: str
    port: int
    target: str
    accepted_at_ms: int
    deadline_at_ms: int
    detach: bool = False
    wrapped: bool = False
    token_label: str = ""
    btc_address: str = ""
    user_ip: str = ""
    request_url: str = ""
    headers: HeaderList = ()
    idempotency_key: str | None = None
    priority: int = 0
    request: bytes | StoredBody | None = field(default=None, repr=False)
    webhook: str = ""
    caller: str = ""
    job: Mapping[str, Any] | None = field(default=None, repr=False)
    affinity: str = ""


@dataclass(frozen=True, slots=True)
class AttemptStart:
    """One run of a task on one node, recorded before its order leaves.

    *order* is the signed order as encoded for the wire. *node_ip* is where the node's connection comes from.
    """

    task_id: str
    attempt: int
    node: Address
    session: bytes
    order: bytes
    at_ms: int
    node_ip: str = ""


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """How an attempt ended.

    *outcome* is a receipt's outcome, or ``refused``, ``not_sent``, ``lost``; *reason* says why.
    """

    task_id: str
    attempt: int
    outcome: str
    at_ms: int
    reason: str = ""
    status: int = 0


@dataclass(frozen=True, slots=True)
class NewReceipt:
    """A node's signed receipt as it is filed, with the verdict on it and the acknowledgement given for it.

    *raw* and *acknowledgement* are the encoded signed forms, byte for byte what was received and sent. *rule*,
    *expected* and *actual* say what a disputed one broke. The numbers are copies of the receipt's own, so that
    statements and ``gpudursion`` need no decoding.

    *observation* is what was seen of a disputed one, signed; empty otherwise. *order* is the signed order of one that
    was offered, since its attempt may not be on file; empty otherwise.

    *authentic* False means that the node did not sign it: it is kept as evidence and takes no place in the chain.
    """

    task_id: str
    attempt: int
    bootstrap: Address
    node: Address
    sequence: int
    hash: bytes
    previous: bytes
    raw: bytes = field(repr=False)
    verdict: str
    received_at_ms: int
    acknowledgement: bytes = field(default=b"", repr=False)
    rule: str = ""
    expected: str = ""
    actual: str = ""
    outcome: str = ""
    meter: str = "none"
    started_at_ms: int = 0
    ended_at_ms: int = 0
    duration_ms: int = 0
    reserved_gpu_ms: int = 0
    busy_gpu_ms: int = 0
    observation: bytes = field(default=b"", repr=False)
    order: bytes = field(default=b"", repr=False)
    authentic: bool = True


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a task: its final state, the end of its last attempt and the receipt, written in one commit.

    Attributes:
        state: A final state.
        attempt: The attempt this ends; None when none was begun.
        result_code: The documents' ``result_code``: 200, or the workspace's or our own error status.
        reason: Stable machine-readable reason when *state* is not FINISHED (``bootstrap_lost``, ``no_node``...).
        message: Text for people.
        status: The workspace's HTTP status; 0 without an answer.
        response: The answer's body (bytes or a stored one), None when it is not kept.
        encoding: ``base64`` where *response* is not text and goes out so; empty otherwise.
        outcome: How the attempt ended (see AttemptEnd).
        job: what is kept of a job from then on (``job_rows.values``).
    """

    task_id: str
    state: TaskState
    at_ms: int
    attempt: int | None = None
    result_code: int = 0
    message: str = ""
    reason: str = ""
    status: int = 0
    response: bytes | StoredBody | None = field(default=None, repr=False)
    content_type: str = ""
    encoding: str = ""
    outcome: str = ""
    receipt: NewReceipt | None = None
    job: Mapping[str, Any] | None = field(default=None, repr=False)


class Filing(StrEnum):
    """What became of a receipt that was handed in."""

    FILED = "filed"
    DUPLICATE = "duplicate"  # the same receipt was filed before; nothing changed
    FORGED = "forged"  # not signed by its node: kept as evidence, outside the chain
    EQUIVOCATION = "equivocation"  # another receipt holds this sequence: kept as evidence, the first one stands
    REPEATED = "repeated"  # its order has a receipt already, and it says it stands: nothing changed


@dataclass(frozen=True, slots=True)
class BrokenLink:
    """Receipt *sequence* names a *previous* that is not the hash of the receipt before it."""

    sequence: int
    expected: bytes
    actual: bytes


@dataclass(frozen=True, slots=True)
class FiledReceipt:
    """Answer to handing in a receipt.

    *acknowledgement* is the one on file: for a duplicate, the one given the first time, to be sent again. *broken*
    lists chain breaks that became visible when this receipt closed a gap (evidence is kept; the receipts stay filed).
    *first_hash* is, for an equivocation, the receipt that holds the sequence; for a repeated one that of its order,
    at *first_sequence*.
    """

    filing: Filing
    acknowledgement: bytes = field(default=b"", repr=False)
    broken: tuple[BrokenLink, ...] = ()
    first_hash: bytes = b""
    first_sequence: int = 0


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task as stored. See NewTask and Finish for the fields they share with it.

    *number* counts tasks of this database (the documents' ``id``). *attempts* is how many were begun, *node* and
    *node_ip* are those of the last one. *bootstrap* brings it to its end. *verdict* and *rule* are the last receipt's,
    empty while there is none. *brc20* is what was found out about the BTC address, as JSON.
    """

    number: int
    task_id: str
    workspace: str
    revision: int
    api: str
    method: str
    port: int
    target: str
    accepted_at_ms: int
    deadline_at_ms: int
    detach: bool
    wrapped: bool
    token_label: str
    btc_address: str
    user_ip: str
    request_url: str
    headers: HeaderList
    idempotency_key: str | None
    priority: int
    state: TaskState
    attempts: int
    node: Address | None
    node_ip: str
    dispatched_at_ms: int | None
    finished_at_ms: int | None
    result_code: int
    message: str
    reason: str
    status: int
    content_type: str
    encoding: str
    verdict: str
    rule: str
    bootstrap: str = ""
    cancel_asked_at_ms: int | None = None
    brc20: str = ""
    caller: str = ""
    affinity: str = ""
    request: StoredBody | None = field(default=None, repr=False)
    response: StoredBody | None = field(default=None, repr=False)

    @property
    def client(self) -> str:
        """The workspace whose token asked for it: who may look at it and end it, and in whose lists it is."""
        return self.caller or self.workspace


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One attempt as stored; *ended_at_ms* None while it runs."""

    task_id: str
    attempt: int
    node: Address
    node_ip: str
    session: bytes
    order: bytes = field(repr=False)
    began_at_ms: int
    ended_at_ms: int | None
    outcome: str
    reason: str
    status: int


@dataclass(frozen=True, slots=True)
class OpenTask:
    """A task that is not final, with what a restart needs to decide about it.

    *last* is its last attempt, None before the first. *request_kept* says that the request's body is stored (perhaps
    empty), so that the request can be made again.
    """

    task: TaskRecord
    last: AttemptRecord | None
    request_kept: bool


@dataclass(frozen=True, slots=True)
class ReceiptRecord:
    """A filed receipt with its verdict and acknowledgement, and the order it answers (empty if that is not on file).

    *caller* is, once the task was removed, whose it was, where another workspace ran it; empty else.
    """

    receipt: NewReceipt
    order: bytes = field(default=b"", repr=False)
    caller: str = ""


@dataclass(frozen=True, slots=True)
class TaskDetail:
    """Everything known of a task, attempts and receipts oldest first."""

    task: TaskRecord
    attempts: tuple[AttemptRecord, ...]
    receipts: tuple[ReceiptRecord, ...]


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """Which tasks a list shows; every field narrows it.

    *since_ms* is included, *before_ms* is not. *after* is the cursor of the page before.
    """

    workspace: str | None = None
    node: Address | None = None
    btc_address: str | None = None
    since_ms: int | None = None
    before_ms: int | None = None
    states: tuple[TaskState, ...] = ()
    limit: int = 1000
    after: str = ""


@dataclass(frozen=True, slots=True)
class TaskPage:
    """One page of a list, newest first; *cursor* is empty on the last page."""

    tasks: tuple[TaskRecord, ...]
    cursor: str = ""


@dataclass(frozen=True, slots=True)
class TaskIdPage:
    """One page of a list of task ids, newest first; *cursor* is empty on the last page."""

    task_ids: tuple[str, ...]
    cursor: str = ""


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node this bootstrap has met. *session* is its newest run's."""

    address: Address
    first_seen_ms: int
    last_seen_ms: int
    name: str = ""
    peer_id: str = ""
    software: str = ""
    session: bytes = NO_HASH


@dataclass(frozen=True, slots=True)
class ChainFault:
    """Evidence against a node: *raw* is the offending receipt.

    *kind* is ``equivocation``, ``broken_link``, ``forged`` (then the node may be innocent), or ``withheld``: receipts
    from *sequence* on that did not come in time; *raw* is the bootstrap's claim then, *hash* the last one missing, and
    *expected* names them.
    """

    bootstrap: Address
    node: Address
    sequence: int
    kind: str
    hash: bytes
    raw: bytes = field(repr=False)
    found_at_ms: int
    expected: bytes = b""
    actual: bytes = b""


@dataclass(frozen=True, slots=True)
class Gap:
    """Sequences of a chain that were never received, both ends included."""

    from_sequence: int
    to_sequence: int

    def lies_in(self, other: Gap) -> bool:
        """Return whether all of it is part of *other*."""
        return other.from_sequence <= self.from_sequence and self.to_sequence <= other.to_sequence


@dataclass(frozen=True, slots=True)
class Missing:
    """What a chain lacks.

    Attributes:
        gaps: the lowest first.
        held_up: receipts that are there beyond the first gap.
        previous_of: for each receipt after a gap, the hash of the one before it, by its sequence.
    """

    gaps: tuple[Gap, ...]
    held_up: int
    previous_of: Mapping[int, bytes]


@dataclass(frozen=True, slots=True)
class AskedGap:
    """A gap a node is asked to fill.

    Attributes:
        asked_at_ms: since when.
        claim: signed, once it is disputed; empty before.
    """

    gap: Gap
    asked_at_ms: int
    claim: bytes = b""
