"""A node's receipt chain as this side knows it: which receipts are there, which are missing, which contradict.

Receipts of one node for one bootstrap count from 1, each naming the hash of the one before (design: Signatures). They
arrive in any order and more than once. The *head* is the last receipt up to which none is missing: that is what a node
is told at connect. Receipts beyond a gap wait in *ahead*.

Pure. Whoever holds a Chain inside a transaction works on a copy and keeps it only after COMMIT.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ngpu_bootstrap.store.records import NO_HASH, BrokenLink, Gap


@dataclass(slots=True)
class Chain:
    """Head and the receipts beyond it, by sequence: (hash, previous)."""

    sequence: int = 0
    hash: bytes = NO_HASH
    ahead: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)

    def copy(self) -> Chain:
        """Return an independent chain that knows the same."""
        return Chain(self.sequence, self.hash, dict(self.ahead))

    def has(self, sequence: int) -> bool:
        """Whether a receipt of this sequence is filed, or was given up."""
        return sequence <= self.sequence or sequence in self.ahead

    def add(self, sequence: int, hash: bytes, previous: bytes) -> list[BrokenLink]:
        """Add a receipt whose sequence is beyond the head and not known; return the breaks it made visible.

        The head moves over a break: the receipts were received, and the break is evidence, not a gap.
        """
        if self.has(sequence):
            raise ValueError(f"sequence {sequence} is filed already")
        self.ahead[sequence] = (hash, previous)
        return self._advance()

    def _advance(self) -> list[BrokenLink]:
        broken = []
        while (entry := self.ahead.pop(self.sequence + 1, None)) is not None:
            if entry[1] != self.hash:
                broken.append(BrokenLink(self.sequence + 1, expected=self.hash, actual=entry[1]))
            self.sequence += 1
            self.hash = entry[0]
        return broken

    def skip(self, gap: Gap) -> list[BrokenLink]:
        """Go on beyond *gap*, whose receipts are given up; return the breaks this makes visible.

        Nothing changes where receipts below it are missing too, or it was filled meanwhile.
        """
        after = self.ahead.get(gap.to_sequence + 1)
        # not by counting: how wide a gap is, a stranger says
        came = any(gap.from_sequence <= sequence <= gap.to_sequence for sequence in self.ahead)
        if gap.from_sequence != self.sequence + 1 or came or after is None:
            return []
        self.sequence, self.hash = gap.to_sequence, after[1]
        return self._advance()

    @property
    def top(self) -> tuple[int, bytes]:
        """The highest receipt known, and its hash: beyond it no number has been seen."""
        if not self.ahead:
            return self.sequence, self.hash
        last = max(self.ahead)
        return last, self.ahead[last][0]

    def gaps(self) -> list[Gap]:
        """Return the missing sequences between the head and the highest receipt known, lowest first."""
        return missing_between(self.sequence, self.ahead)


def missing_between(head: int, ahead: Iterable[int]) -> list[Gap]:
    """Return the gaps between *head* and the sequences *ahead* of it."""
    gaps = []
    expected = head + 1
    for sequence in sorted(ahead):
        if sequence > expected:
            gaps.append(Gap(expected, sequence - 1))
        expected = sequence + 1
    return gaps
