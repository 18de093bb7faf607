"""Judges a receipt against the order it answers and what the bootstrap saw itself (docs/protocol.md, Receipts).

Pure, and never raises for a bad receipt: the `Verdict` carries the first rule broken and both values, which are
stored as the evidence of a dispute. `RULES` is the whole law, in order. Each rule judges one thing and returns None
when it holds or cannot be judged; so a receipt that breaks one rule only is told by that rule's name.

What follows from not having seen everything:

- A value of `Observed` that is None was not seen (the bootstrap restarted, or the stream ended first) and is not
  judged.
- An attempt that did not end `complete` was cut somewhere between the two sides, so their counts may differ, each way
  in one direction only: the node cannot have received more of the request than was sent to it, nor sent less of the
  answer than arrived. A hash binds where the counts agree, because then both sides hashed the same bytes.
- The node's clock may be wrong while everything else is right. That is `skew`, not `disputed`: the rule on times comes
  last, so it decides only when all others hold. Durations are monotonic, so a wrong clock does not excuse them.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import NamedTuple

from ngpu_protocol.acknowledgements import VerdictKind
from ngpu_protocol.errors import SignatureError
from ngpu_protocol.frozen import dataclass
from ngpu_protocol.identity import Address, recover
from ngpu_protocol.orders import TaskOrder
from ngpu_protocol.receipts import FIRST_PREVIOUS, Meter, Outcome, ReceiptLink, SignedReceipt, TaskReceipt

__all__ = ["RULES", "Observed", "ReceiptLink", "Rule", "Verdict", "broken_rules", "verify_receipt"]

DEFAULT_TOLERANCE_MS = 5000
"""How far the clocks of two peers may be apart before a receipt's times are `skew`."""

_ROUNDING_MS = 20
"""Both ends of a duration are rounded to a millisecond, and a busy loop notes them late."""

_DRIFT_DIVISOR = 1000
"""Two monotonic clocks of the same second: 500 parts in a million is the most NTP slews, twice that is allowed."""

_OUTCOMES = tuple(word.value for word in Outcome)
_METERS = tuple(word.value for word in Meter)


@dataclass(frozen=True, slots=True)
class Observed:
    """What the bootstrap saw of the attempt; None where it did not see it.

    The two times must not step against each other while the attempt runs (one reading of the wall clock, the rest
    monotonic), and must enclose it: the first taken before the request's first byte is sent, the second after the
    receipt arrived or the stream ended.

    Attributes:
        request_hash: SHA-256 of the request's body as sent to the node.
        request_bytes: how many bytes that covers.
        status: the workspace's status; 0 when the node answered in its place (``Ngpu-Error``).
        response_hash: SHA-256 of the workspace's body as it arrived.
        response_bytes: how many bytes that covers.
        sent_at_ms: UTC milliseconds by the bootstrap's clock.
        ended_at_ms: UTC milliseconds by the bootstrap's clock.
    """

    request_hash: bytes | None
    request_bytes: int | None
    status: int | None
    response_hash: bytes | None
    response_bytes: int | None
    sent_at_ms: int | None
    ended_at_ms: int | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of it.

    Attributes:
        kind: verified, skew or disputed.
        rule: name of the first rule broken, empty when verified.
        expected: what the rule wanted, as text for the dispute record.
        actual: what the receipt says.
    """

    kind: VerdictKind
    rule: str = ""
    expected: str = ""
    actual: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """Everything a rule may look at; see `verify_receipt`."""

    signed: SignedReceipt
    receipt: TaskReceipt
    order: TaskOrder
    seen: Observed
    last: ReceiptLink | None
    chain_id: int
    tolerance_ms: int
    offered_gpus: Container[bytes] | None
    most_gpus: int | None
    other: ReceiptLink | None
    digest: bytes
    signer: Address | SignatureError

    @property
    def complete(self) -> bool:
        """Whether the node says that the whole answer went out."""
        return self.receipt.outcome == Outcome.COMPLETE


class Breach(NamedTuple):
    """A rule that does not hold: what it wanted, and what there is."""

    expected: str
    actual: str


def _signer(case: Case) -> Breach | None:
    return None if case.signer == case.order.node else Breach(case.order.node, str(case.signer))


def _order_hash(case: Case) -> Breach | None:
    return _same(case.order.digest(case.chain_id), case.receipt.order_hash)


def _node(case: Case) -> Breach | None:
    return _same(case.order.node, case.receipt.node)


def _bootstrap(case: Case) -> Breach | None:
    return _same(case.order.bootstrap, case.receipt.bootstrap)


def _once(case: Case) -> Breach | None:
    """One order is worked off once: its second receipt would be paid for nothing."""
    if case.other is None or case.other.hash == case.digest:
        return None
    return Breach(f"receipt {case.other.sequence}, the order's only one", f"receipt {case.receipt.sequence}")


def _outcome(case: Case) -> Breach | None:
    return _one_of(_OUTCOMES, case.receipt.outcome)


def _request_bytes(case: Case) -> Breach | None:
    sent, received = case.seen.request_bytes, case.receipt.request_bytes
    if sent is None or received == sent or (not case.complete and received < sent):
        return None
    return Breach(str(sent) if case.complete else f"at most {sent}", str(received))


def _request_hash(case: Case) -> Breach | None:
    if case.seen.request_hash is None or case.receipt.request_bytes != case.seen.request_bytes:
        return None
    return _same(case.seen.request_hash, case.receipt.request_hash)


def _status(case: Case) -> Breach | None:
    status = case.receipt.status
    if case.seen.status is not None and status != case.seen.status:
        return Breach(str(case.seen.status), str(status))
    if case.complete and not 100 <= status <= 999:
        return Breach("the workspace's status, since the answer is complete", str(status))
    return None


def _response_bytes(case: Case) -> Breach | None:
    arrived, sent = case.seen.response_bytes, case.receipt.response_bytes
    if arrived is None or sent == arrived or (not case.complete and sent > arrived):
        return None
    return Breach(str(arrived) if case.complete else f"at least {arrived}", str(sent))


def _response_hash(case: Case) -> Breach | None:
    if case.seen.response_hash is None or case.receipt.response_bytes != case.seen.response_bytes:
        return None
    return _same(case.seen.response_hash, case.receipt.response_hash)


def _duration(case: Case) -> Breach | None:
    if case.seen.sent_at_ms is None or case.seen.ended_at_ms is None:
        return None
    wall_ms = max(0, case.seen.ended_at_ms - case.seen.sent_at_ms)
    most_ms = wall_ms + wall_ms // _DRIFT_DIVISOR + _ROUNDING_MS
    duration_ms = case.receipt.duration_ms
    return None if duration_ms <= most_ms else Breach(f"at most {most_ms}", str(duration_ms))


def _gpus(case: Case) -> Breach | None:
    gpus = case.receipt.gpus
    if len(set(gpus)) != len(gpus):
        return Breach("each GPU once", f"{len(gpus)} names, {len(set(gpus))} of them different")
    if case.most_gpus is not None and len(gpus) > case.most_gpus:
        return Breach(f"at most {case.most_gpus}, which the workspace holds", str(len(gpus)))
    if case.offered_gpus is not None:
        for gpu in gpus:
            if gpu not in case.offered_gpus:
                return Breach("GPUs this node offered", _text(gpu))
    return None


def _reserved(case: Case) -> Breach | None:
    most_ms = case.receipt.duration_ms * len(case.receipt.gpus)
    reserved_ms = case.receipt.reserved_gpu_ms
    return None if reserved_ms <= most_ms else Breach(f"at most {most_ms}", str(reserved_ms))


def _busy(case: Case) -> Breach | None:
    most_ms, busy_ms = case.receipt.reserved_gpu_ms, case.receipt.busy_gpu_ms
    return None if busy_ms <= most_ms else Breach(f"at most {most_ms}", str(busy_ms))


def _meter(case: Case) -> Breach | None:
    if case.receipt.meter == Meter.NONE and case.receipt.busy_gpu_ms:
        return Breach("0 busy, since nothing was metered", str(case.receipt.busy_gpu_ms))
    return _one_of(_METERS, case.receipt.meter)


def _chain(case: Case) -> Breach | None:
    sequence = case.receipt.sequence
    if sequence == 0:
        return Breach("a sequence from 1", "0")
    if sequence == 1 and case.receipt.previous != FIRST_PREVIOUS:
        return Breach(_text(FIRST_PREVIOUS), _text(case.receipt.previous))
    if case.last is None:
        return None
    if sequence == case.last.sequence + 1:
        return _same(case.last.hash, case.receipt.previous)
    if sequence == case.last.sequence:  # a second receipt for one number; the same one again is only a repeated offer
        return _same(case.last.hash, case.digest)
    return None


def _times(case: Case) -> Breach | None:
    started, ended = case.receipt.started_at_ms, case.receipt.ended_at_ms
    actual = f"{started} to {ended}"
    if case.seen.sent_at_ms is not None and started < case.seen.sent_at_ms - case.tolerance_ms:
        return Breach(f"not before {case.seen.sent_at_ms - case.tolerance_ms}", actual)
    if case.seen.ended_at_ms is not None and ended > case.seen.ended_at_ms + case.tolerance_ms:
        return Breach(f"not after {case.seen.ended_at_ms + case.tolerance_ms}", actual)
    if abs(ended - started - case.receipt.duration_ms) > case.tolerance_ms:  # the node's clock stepped meanwhile
        return Breach(f"{case.receipt.duration_ms} ms between start and end", actual)
    return None


def _same(expected: str | bytes, actual: str | bytes) -> Breach | None:
    return None if expected == actual else Breach(_text(expected), _text(actual))


def _one_of(known: tuple[str, ...], actual: str) -> Breach | None:
    return None if actual in known else Breach(" or ".join(known), actual[:64])


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else "0x" + value.hex()


class Rule(NamedTuple):
    """One thing a receipt must meet, and what breaking it makes of the receipt."""

    name: str
    breach: Callable[[Case], Breach | None]
    makes: VerdictKind = VerdictKind.DISPUTED


RULES: tuple[Rule, ...] = (
    Rule("signer", _signer),
    Rule("order_hash", _order_hash),
    Rule("node", _node),
    Rule("bootstrap", _bootstrap),
    Rule("once", _once),
    Rule("outcome", _outcome),
    Rule("request_bytes", _request_bytes),
    Rule("request_hash", _request_hash),
    Rule("status", _status),
    Rule("response_bytes", _response_bytes),
    Rule("response_hash", _response_hash),
    Rule("duration", _duration),
    Rule("gpus", _gpus),
    Rule("reserved", _reserved),
    Rule("busy", _busy),
    Rule("meter", _meter),
    Rule("chain", _chain),
    Rule("times", _times, VerdictKind.SKEW),
)


def verify_receipt(
    signed: SignedReceipt,
    order: TaskOrder,
    seen: Observed,
    *,
    last: ReceiptLink | None,
    chain_id: int,
    tolerance_ms: int = DEFAULT_TOLERANCE_MS,
    offered_gpus: Container[bytes] | None = None,
    most_gpus: int | None = None,
    other: ReceiptLink | None = None,
) -> Verdict:
    """Return what *signed* is worth.

    Args:
        signed: the receipt as it arrived.
        order: the order that was sent.
        seen: what this bootstrap saw of the attempt.
        last: the receipt before this one in the chain, or the chain's head; None, or a link that is neither this
            number's nor the one before, leaves the link unjudged: a predecessor that is missing is a gap, not a
            breach.
        chain_id: the network's.
        tolerance_ms: how far the two clocks may be apart.
        offered_gpus: ids of the GPUs the node offered, if known.
        most_gpus: how many the ordered revision of the workspace holds on a node, if known.
        other: a receipt of the same order that is on file already; None where there is none.
    """
    case = _case(signed, order, seen, last, chain_id, tolerance_ms, offered_gpus, most_gpus, other)
    for rule in RULES:
        breach = rule.breach(case)
        if breach is not None:
            return Verdict(rule.makes, rule.name, breach.expected, breach.actual)
    return Verdict(VerdictKind.VERIFIED)


def broken_rules(
    signed: SignedReceipt,
    order: TaskOrder,
    seen: Observed,
    *,
    last: ReceiptLink | None,
    chain_id: int,
    tolerance_ms: int = DEFAULT_TOLERANCE_MS,
    offered_gpus: Container[bytes] | None = None,
    most_gpus: int | None = None,
    other: ReceiptLink | None = None,
) -> dict[str, Breach]:
    """Return every rule that `verify_receipt` would find broken, not only the first."""
    case = _case(signed, order, seen, last, chain_id, tolerance_ms, offered_gpus, most_gpus, other)
    found = ((rule.name, rule.breach(case)) for rule in RULES)
    return {name: breach for name, breach in found if breach is not None}


def _case(
    signed: SignedReceipt,
    order: TaskOrder,
    seen: Observed,
    last: ReceiptLink | None,
    chain_id: int,
    tolerance_ms: int,
    offered_gpus: Container[bytes] | None,
    most_gpus: int | None,
    other: ReceiptLink | None,
) -> Case:
    digest = signed.receipt.digest(chain_id)
    signer: Address | SignatureError
    try:
        signer = recover(digest, signed.signature)
    except SignatureError as error:
        signer = error
    return Case(
        signed,
        signed.receipt,
        order,
        seen,
        last,
        chain_id,
        tolerance_ms,
        offered_gpus,
        most_gpus,
        other,
        digest,
        signer,
    )
