"""How fast a caller may go: failed credentials per address, calls per token.

Both are token buckets: a level that fills at a rate up to a burst, and an event takes one. Both tables are bounded. A
credential that is right is never refused for the failures of others behind its address (one proxy may stand for all
clients, and 192 random bits are not found by trying): failures alone are answered 429. Guessable passwords are another
matter: who checks those takes a try before it looks.

What a token's limits cost a call is one dictionary lookup; where an operator sets none they cost nothing. Time is given
by the caller, in seconds of any steady clock.
"""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict

from ngpu_bootstrap.errors import NotServed, Refusal, Unauthorized

# Nobody mistypes a token more often than this in a row; a script that guesses gets a try every other second.
TRIES_BURST = 20
TRIES_PER_S = 0.5
MAX_ADDRESSES = 4096
MAX_IDLE_TOKENS = 4096

# A call without any credential is no try.
_TRIES = frozenset({"token_unknown", "key_unknown", "key_expired", "login_failed"})


class _Bucket:
    __slots__ = ("at_s", "in_use", "level")

    def __init__(self, level: float, at_s: float) -> None:
        self.level = level
        self.at_s = at_s
        self.in_use = 0

    def refill(self, rate: float, burst: float, now_s: float) -> None:
        self.level = min(burst, self.level + (now_s - self.at_s) * rate)
        self.at_s = now_s


class AddressBuckets:
    """One bucket for each address, for those heard of lately."""

    def __init__(self, *, burst: int, per_s: float, addresses: int = MAX_ADDRESSES) -> None:
        self._burst = burst
        self._per_s = per_s
        self._addresses = addresses
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, address: str, now_s: float) -> float:
        """Take one; return 0, or how long the address must wait because there was none left."""
        key = network_of(address)
        bucket = self._buckets.pop(key, None)
        if bucket is None:
            bucket = _Bucket(self._burst, now_s)
            while len(self._buckets) >= self._addresses:
                self._buckets.popitem(last=False)  # the one that has been quiet for longest
        self._buckets[key] = bucket
        bucket.refill(self._per_s, self._burst, now_s)
        if bucket.level >= 1:
            bucket.level -= 1
            return 0.0
        return (1 - bucket.level) / self._per_s

    def give_back(self, address: str) -> None:
        """Undo one `take` that took one."""
        bucket = self._buckets.get(network_of(address))
        if bucket is not None:
            bucket.level = min(self._burst, bucket.level + 1)


class FailedTries(AddressBuckets):
    """Counts credentials that opened nothing, by the address that tried them.

    Whoever needs time to find out whether a credential is right takes one first and gives it back then: else as many
    could be tried at once as fit into that time.
    """

    def __init__(self, *, burst: int = TRIES_BURST, per_s: float = TRIES_PER_S, addresses: int = MAX_ADDRESSES) -> None:
        super().__init__(burst=burst, per_s=per_s, addresses=addresses)

    def answer(self, address: str, refusal: Refusal, now_s: float) -> Refusal:
        """Return what the client gets for *refusal*: itself, or 429 once its address has failed too often."""
        if not isinstance(refusal, Unauthorized) or refusal.reason not in _TRIES:
            return refusal
        wait_s = self.take(address, now_s)
        return refusal if not wait_s else too_many_tries(wait_s)


def too_many_tries(wait_s: float) -> Refusal:
    """Return the refusal of an address that failed too often."""
    return NotServed(
        429,
        "too_many_tries",
        "too many unknown credentials came from this address; check the token, and try again later",
        retry_after_s=math.ceil(wait_s),
    )


class TokenLimits:
    """What one token may do at once and per second; every token the same.

    Args:
        per_s: calls per second; 0 for no limit.
        burst: calls that may come at once after a pause.
        at_once: calls running at once; 0 for no limit.
    """

    def __init__(self, *, per_s: float, burst: int, at_once: int) -> None:
        self._per_s = per_s
        self._burst = float(max(1, burst))
        self._at_once = at_once
        self._buckets: dict[str, _Bucket] = {}

    def enter(self, label: str, now_s: float) -> None:
        """Begin a call under the token *label*; `leave` ends it.

        Raises:
            NotServed: 429; nothing was begun.
        """
        bucket = self._buckets.get(label)
        if bucket is None:
            if len(self._buckets) >= MAX_IDLE_TOKENS:
                self._buckets = {name: one for name, one in self._buckets.items() if one.in_use}
            bucket = self._buckets[label] = _Bucket(self._burst, now_s)
        if self._at_once and bucket.in_use >= self._at_once:
            raise NotServed(
                429,
                "too_many_calls_at_once",
                f"{bucket.in_use} calls of this token run already, the most it may; wait for one to end",
                retry_after_s=1,
            )
        if self._per_s:
            bucket.refill(self._per_s, self._burst, now_s)
            if bucket.level < 1:
                wait_s = (1 - bucket.level) / self._per_s
                raise NotServed(
                    429,
                    "too_many_calls",
                    f"this token may make {self._per_s:g} calls a second; send fewer",
                    retry_after_s=math.ceil(wait_s),
                )
            bucket.level -= 1
        bucket.in_use += 1

    def leave(self, label: str) -> None:
        """End a call that `enter` began."""
        bucket = self._buckets.get(label)
        if bucket is not None and bucket.in_use:
            bucket.in_use -= 1


def network_of(address: str) -> str:
    """Return what one caller is known by: an IPv6 host may use every address of its /64."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))
