"""Disputes as people ask for them: which there are, one in full, and the file that anyone can judge.

Both sides use it: `ngpu-bootstrap dispute` on the bootstrap's store, `ngpu-node disputes` on the node's ledger. What a
file holds and shows is `ngpu_protocol.dispute_file`; a side's own module reads its store and makes the files, as its
`Evidence`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ngpu_daemon.errors import OperatorError
from ngpu_protocol.dispute_file import DisputeFile, Finding, check_dispute_file, to_json
from ngpu_protocol.errors import AddressError
from ngpu_protocol.identity import Address, parse_address
from ngpu_protocol.receipt_file import RuleResult

#: Listed when nothing else is asked: the newest.
DEFAULT_LIMIT: Final = 100
#: A named dispute is looked for among this many: nobody has more.
SEARCHED: Final = 1_000_000
LEAST_HASH_DIGITS: Final = 8

WHAT_IT_SHOWS: Final = {
    Finding.PROVEN: "proven: the node signed what cannot be right; nobody needs to be believed",
    Finding.STATED: "stated: the bootstrap's signed word against the node's",
    Finding.NOT_THE_NODES: "the node did not sign this receipt: it shows nothing about the node",
    Finding.UNSOUND: "nothing: a rule of the file is broken",
}


class DisputeError(OperatorError):
    """What was asked about disputes cannot be answered; the message says why."""


@dataclass(frozen=True, slots=True)
class DisputeRow:
    """One dispute, as a list shows it.

    Attributes:
        kind: `receipt`; or `equivocation`, `broken_link`, `forged`, `withheld`.
        receipt: the receipt's digest as 0x text; empty where there is none.
        rule: that was broken, with what it wanted and what there was, as far as this side knows.
        at_ms: when the receipt ended by the node's clock, or when the evidence was found.
    """

    kind: str
    node: str
    bootstrap: str
    sequence: int
    task_id: str
    attempt: int
    receipt: str
    rule: str
    expected: str
    actual: str
    at_ms: int

    def is_named(self, text: str) -> bool:
        """Whether *text* is this dispute's task, its receipt's hash or the beginning of that, or its number."""
        hash = text.lower().removeprefix("0x")
        return (
            text in (self.task_id, f"{self.task_id}/{self.attempt}")
            or (text.isascii() and text.isdigit() and len(text) < LEAST_HASH_DIGITS and int(text) == self.sequence)
            or (len(hash) >= LEAST_HASH_DIGITS and self.receipt.removeprefix("0x").startswith(hash))
        )


class Evidence(Protocol):
    """What one side has on file about disputes, opened to be read."""

    def rows(self, other: Address | None, limit: int) -> list[DisputeRow]:
        """Return the newest disputes, with *other* or with all, newest first."""

    def file(self, row: DisputeRow) -> DisputeFile | None:
        """Return the file of a dispute; None where nothing is on file to make it of.

        Raises:
            DisputeError: what is on file cannot be read.
        """

    def siblings(self, bootstrap: Address) -> Sequence[Address]:
        """Return who may acknowledge in the place of *bootstrap*, as far as this side was told."""


def one_named(rows: Sequence[DisputeRow], text: str) -> DisputeRow:
    """Return the one dispute that *text* names.

    Raises:
        DisputeError: none does, or several do.
    """
    named = [row for row in rows if row.is_named(text)]
    if not named:
        raise DisputeError(
            f"no dispute is named {text[:80]}: `list` shows those there are, by task, number and receipt"
        )
    if len(named) > 1:
        receipts = ", ".join(row.receipt or f"number {row.sequence} ({row.kind})" for row in named[:8])
        raise DisputeError(f"{len(named)} disputes are named {text[:80]}; give the receipt's hash: {receipts}")
    return named[0]


def list_disputes(evidence: Evidence, whose: str | None, limit: int, *, option: str, as_json: bool) -> None:
    """Print the newest disputes.

    Args:
        whose: the other side's address; None: with all.
        option: as which it was given.

    Raises:
        DisputeError: *whose* is no address.
    """
    other = None
    if whose is not None:
        try:
            other = parse_address(whose if whose.startswith("0x") else f"0x{whose}")
        except AddressError as error:
            raise DisputeError(f"{option} {whose[:64]}: {error}") from None
    rows = evidence.rows(other, limit)
    if as_json:
        print(json.dumps({"disputes": [asdict(row) for row in rows]}))
        return
    if not rows:
        print("no disputes")
        return
    table = Table("kind", "number", "task", "receipt", "rule", "wanted", "was", "when (UTC)", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row.kind,
            str(row.sequence),
            Text(row.task_id),
            f"{row.receipt[:14]}…" if row.receipt else "",
            row.rule,
            Text(_short(row.expected)),
            Text(_short(row.actual)),
            _day(row.at_ms),
        )
    Console(soft_wrap=True).print(table)


def show_dispute(evidence: Evidence, name: str, *, as_json: bool) -> None:
    """Print one dispute in full, with what its file shows.

    Raises:
        DisputeError: none, or several, are named so; or what is on file cannot be read.
    """
    row = one_named(evidence.rows(None, SEARCHED), name)
    file = evidence.file(row)
    results, finding = ([], None) if file is None else judged(evidence, row, file)
    if as_json:
        rules = [asdict(result) for result in results]
        print(json.dumps({"dispute": asdict(row), "finding": finding and finding.value, "rules": rules}))
        return
    console = Console(highlight=False, soft_wrap=True)
    for label, value in (
        ("kind", row.kind),
        ("node", row.node),
        ("bootstrap", row.bootstrap),
        ("task", f"{row.task_id}, attempt {row.attempt}" if row.task_id else "unknown here"),
        ("receipt", row.receipt or "none"),
        ("number", str(row.sequence)),
        ("rule", row.rule),
        ("wanted", row.expected),
        ("was", row.actual),
        ("when", f"{_day(row.at_ms)} (UTC)"),
        ("shows", WHAT_IT_SHOWS[finding] if finding is not None else "the bootstrap's word alone: there is no receipt"),
    ):
        console.print(Text(f"{label:<11}{value}"))
    for result in results:
        if not result.holds:
            console.print(Text(f"broken: {result.rule}: {result.actual}, not {result.expected}", "bold red"))


def judged(evidence: Evidence, row: DisputeRow, file: DisputeFile) -> tuple[list[RuleResult], Finding]:
    """Return what *file* shows to this side, which knows who belongs together."""
    return check_dispute_file(file, siblings=evidence.siblings(Address(row.bootstrap)))


def export(evidence: Evidence, name: str, path: Path | None, *, as_json: bool) -> None:
    """Write the file of one dispute.

    Args:
        path: where to; None: a name made of the receipt's hash, in the working directory.

    Raises:
        DisputeError: there is none, or it cannot be written.
    """
    row = one_named(evidence.rows(None, SEARCHED), name)
    file = evidence.file(row)
    if file is None:
        raise DisputeError(
            f"there is no file of {row.kind} {row.sequence}: "
            + ("no claim is on file" if row.kind == "withheld" else "the order is not on file any more")
        )
    target = path or Path(f"dispute-{row.receipt.removeprefix('0x')[:16]}.json")
    write_new(target, to_json(file))
    _, finding = judged(evidence, row, file)
    if as_json:
        print(json.dumps({"file": str(target), "finding": finding.value}))
    else:
        print(f"wrote {target}: `scripts/verify-dispute {target}` judges it offline")


def write_new(target: Path, text: str) -> None:
    """Write *text* to a file that is not there yet: the name may have been typed.

    Raises:
        DisputeError: it cannot be written.
    """
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with os.fdopen(descriptor, "w") as opened:
            opened.write(text)
    except OSError as error:
        raise DisputeError(f"cannot write {target}: {error.strerror}") from None


def _short(text: str) -> str:
    return text if len(text) <= 24 else text[:20] + "…"


def _day(at_ms: int) -> str:
    try:
        return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):  # by the node's clock, which may say anything
        return str(at_ms)
