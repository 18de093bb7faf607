"""What the three programs that check a file offline have in common: their shell.

`verify_receipt.py`, `verify_statement.py` and `verify_dispute.py` each say which files they read and what they make of
one, as `Judged`; the law is `ngpu_protocol`'s. Here are the arguments they share, reading with a bound, one JSON object
or a table of rules, and the exit code: 0 when every rule holds, 1 when one does not, 2 when a file cannot be read.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ngpu_protocol.errors import AddressError, MalformedError
from ngpu_protocol.identity import Address, parse_address
from ngpu_protocol.receipt_file import RuleResult


@dataclass(frozen=True)
class Judged:
    """What came of a file.

    Attributes:
        facts: what it is about, for people: label and value.
        document: the same for programs, beside `ok` and `rules`.
        results: one for each rule.
        says: the last line; empty: which rules are broken, or that none is.
        means: of a rule, what it looked at, in words.
        lines: a table after the rules, its heading first; empty for none.
    """

    facts: Iterable[tuple[str, str]]
    document: dict[str, Any]
    results: Sequence[RuleResult]
    says: str = ""
    means: Mapping[str, str] = field(default_factory=dict)
    lines: Sequence[Sequence[str]] = ()

    @property
    def good(self) -> bool:
        """Whether every rule holds."""
        return all(one.holds for one in self.results)


@dataclass
class Program:
    """One of the three programs.

    Attributes:
        name: of the script.
        what: which file it reads.
        judge: returns what came of the file that the arguments name; may raise OSError and MalformedError.
        options: adds the program's own arguments.
    """

    name: str
    what: str
    judge: Callable[[argparse.Namespace], Judged]
    options: Callable[[argparse.ArgumentParser], object] = field(default=lambda parser: None)

    def main(self) -> int:
        """Return the exit code."""
        parser = argparse.ArgumentParser(prog=f"scripts/{self.name}", description=f"Check a {self.what} file offline.")
        parser.add_argument("file", help=f"the {self.what} file; - reads it from standard input")
        self.options(parser)
        parser.add_argument(
            "--sibling",
            action="append",
            default=[],
            type=_address,
            metavar="ADDRESS",
            help="a bootstrap you know to stand in for the one that ordered; repeat. Needed only where the file does "
            "not have that one's own word",
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        arguments = parser.parse_args()
        try:
            judged = self.judge(arguments)
        except (OSError, MalformedError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if arguments.json:
            rules = [_rule(one, judged.means) for one in judged.results]
            print(json.dumps({"ok": judged.good, **judged.document, "rules": rules}))
        else:
            _show(judged)
        return 0 if judged.good else 1


def read_bounded(name: str, most: int) -> bytes:
    """Return the file's bytes, one more than *most* at most, so that its reader can tell what is too large."""
    if name == "-":
        return sys.stdin.buffer.read(most + 1)
    with open(name, "rb") as file:
        return file.read(most + 1)


def _address(text: str) -> Address:
    try:
        return parse_address(text)
    except AddressError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _rule(result: RuleResult, means: Mapping[str, str]) -> dict[str, Any]:
    rule = {"rule": result.rule, "holds": result.holds, "expected": result.expected, "actual": result.actual}
    return rule | ({"checked": means[result.rule]} if result.rule in means else {})


def _show(judged: Judged) -> None:
    console = Console(highlight=False, soft_wrap=True)
    facts = list(judged.facts)
    width = max(len(label) for label, _ in facts) + 2
    for label, value in facts:
        console.print(Text(f"{label:<{width}}{value}"))
    headings = ["rule", "", *(["checked"] if judged.means else []), "expected", "actual"]
    table = Table(*headings, box=None, pad_edge=False)
    for result in judged.results:
        mark = Text("holds", "green") if result.holds else Text("BROKEN", "bold red")
        means = [Text(judged.means.get(result.rule, ""))] if judged.means else []
        table.add_row(result.rule, mark, *means, Text(result.expected), Text(result.actual))
    console.print(table)
    if judged.lines:
        heading, *rows = judged.lines
        console.print()
        printed = Table(*heading, box=None, pad_edge=False)
        for row in rows:
            printed.add_row(*(Text(cell) for cell in row))
        console.print(printed)
    broken = ", ".join(result.rule for result in judged.results if not result.holds)
    says = judged.says or (f"broken: {broken}" if broken else "every rule holds")
    console.print(Text(says, "green" if judged.good else "bold red"))
