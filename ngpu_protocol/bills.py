"""Bills: what the receipts of a statement cost by their node's own prices, signed by the bootstrap.

A statement is about GPU time, and a line of it says nothing of which GPUs were held. A bill adds that: under each line
its *basis*, the session whose price list holds for it and the GPUs with their models. With the lists, which the node
signed, anybody can work out the amounts again from the file alone.

The bases are bound by a Merkle tree (`merkle`), whose root is in the bill, with one leaf for each line of the
statement, in its order::

    receipt hash 32 | SHA-256(session 32 | (GPU 32 | SHA-256(model) 32) for each GPU)

A session of zeros: which one it was is not known any more, and nothing is asked for it. What the receipt and the order
of a line say about session and GPUs must be what its basis says; the model is the bootstrap's word, and the node's own
books have it too.

`amounts` is the total of each currency, one line each, sorted: ``USD=12.5``.

Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, NamedTuple

from ngpu_protocol import frozen, merkle
from ngpu_protocol.errors import MalformedError, SignatureError
from ngpu_protocol.identity import Account, Address, recover
from ngpu_protocol.prices import PRICE_LIST_TYPE, Prices, SignedPriceList, amount_text, cost, total
from ngpu_protocol.receipt_file import RuleResult, compare
from ngpu_protocol.typed_data import MAX_LIST_ITEMS, SignedType, bytes32

NO_SESSION: Final = bytes(32)
MAX_MODEL_CHARS: Final = 128
_WHAT: Final = "bill"


class Basis(NamedTuple):
    """What decides the price of a line.

    Attributes:
        session: of the order that its receipt answers; `NO_SESSION` where that is not known.
        gpus: name and canonical model of each GPU the receipt names, in its order; the model is empty where unknown.
    """

    session: bytes
    gpus: tuple[tuple[bytes, str], ...]

    def digest(self) -> bytes:
        """Return the 32 bytes that stand for it in a leaf."""
        hashed = hashlib.sha256(self.session)
        for gpu, model in self.gpus:
            hashed.update(gpu + hashlib.sha256(model.encode()).digest())
        return hashed.digest()


def shared(billed_ms: int, gpus: Sequence[bytes]) -> Iterable[tuple[bytes, int]]:
    """Yield each GPU's part of a receipt's time; what does not divide goes to the first, so that sums stay exact."""
    share, rest = divmod(billed_ms, len(gpus))
    for gpu in gpus:
        yield gpu, share + rest
        rest = 0


def amounts_of(
    billed: Iterable[tuple[int, int]], bases: Sequence[Basis], lists: Mapping[bytes, Prices]
) -> dict[str, Decimal]:
    """Return the total of each currency, exactly.

    Args:
        billed: of each line, its milliseconds and the number of its basis.
        lists: by session.
    """
    counts = [len(basis.gpus) for basis in bases]
    # an equal share of each line for every GPU, and what does not divide for the first
    shares, rests = [0] * len(bases), [0] * len(bases)
    for billed_ms, number in billed:
        if billed_ms and counts[number]:
            share, rest = divmod(billed_ms, counts[number])
            shares[number] += share
            rests[number] += rest
    totals: dict[str, Decimal] = {}
    for basis, share, rest in zip(bases, shares, rests, strict=True):
        prices = lists.get(basis.session)
        if prices is None or not share + rest:
            continue
        for place, (_, model) in enumerate(basis.gpus):
            price = prices.of(model) if model else None
            if price is not None:
                totals = total(totals, prices.currency, cost(price, share if place else share + rest))
    return totals


def amounts_text(totals: Mapping[str, Decimal]) -> str:
    """Return the one form of *totals* that is signed."""
    return "\n".join(f"{currency}={amount_text(amount)}" for currency, amount in sorted(totals.items()))


@frozen.dataclass(frozen=True, slots=True)
class Bill:
    """What the receipts of a statement cost.

    Attributes:
        statement_hash: the statement's digest, 32 bytes.
        node: as in the statement.
        bootstrap: as in the statement, and who signs.
        amounts: `amounts_text`.
        root: of the tree over the lines' bases, 32 bytes.
    """

    statement_hash: bytes
    node: Address
    bootstrap: Address
    amounts: str
    root: bytes

    def digest(self, chain_id: int) -> bytes:
        """Return the 32 bytes that the bootstrap signs."""
        return BILL_TYPE.digest(self, chain_id)


BILL_TYPE = SignedType(
    "Bill(bytes32 statementHash,address node,address bootstrap,string amounts,bytes32 root)",
    Bill,
    what=_WHAT,
    max_bytes=64 * 1024,
)


def sign_bill(bill: Bill, account: Account, chain_id: int) -> bytes:
    """Return the bootstrap's 65-byte signature.

    Raises:
        ValueError: *account* is not the bill's bootstrap.
    """
    if account.address != bill.bootstrap:
        raise ValueError(f"{account.address} cannot sign a bill of {bill.bootstrap}")
    return account.sign(bill.digest(chain_id))


def leaves_of(lines: Iterable[tuple[bytes, int]], bases: Sequence[Basis]) -> list[bytes]:
    """Return the tree's leaf hashes, of each line's receipt hash and the number of its basis."""
    digests, sha256, leaf = [basis.digest() for basis in bases], hashlib.sha256, merkle.LEAF
    return [sha256(leaf + receipt_hash + digests[number]).digest() for receipt_hash, number in lines]


# -- in a statement's file ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BillPart:
    """A signed bill in a statement's file, with what it is worked out from.

    Attributes:
        lists: the node's price lists of the sessions in *bases*.
        bases: all there are.
        lines: of each line of the statement the number of its basis; None in a file that proves one line.
        path: in such a file, sibling hashes from the leaf of that line, whose basis is the only one, to the root.
    """

    bill: Bill
    signature: bytes
    lists: tuple[SignedPriceList, ...]
    bases: tuple[Basis, ...]
    lines: tuple[int, ...] | None = None
    path: tuple[bytes, ...] | None = None

    def to_document(self) -> dict[str, Any]:
        """Return the JSON object."""
        document: dict[str, Any] = {
            "bill": BILL_TYPE.to_json(self.bill, self.signature),
            "priceLists": [PRICE_LIST_TYPE.to_json(one.price_list, one.signature) for one in self.lists],
            "bases": [
                ["0x" + basis.session.hex(), [["0x" + gpu.hex(), model] for gpu, model in basis.gpus]]
                for basis in self.bases
            ],
        }
        if self.lines is not None:
            document["lines"] = list(self.lines)
        if self.path is not None:
            document["path"] = ["0x" + hash.hex() for hash in self.path]
        return document

    @classmethod
    def from_document(cls, document: object) -> BillPart:
        """Return the part in a JSON object; unknown keys are ignored.

        Raises:
            MalformedError: if it is not one.
        """
        if not isinstance(document, dict):
            raise MalformedError(_WHAT, "must be an object")
        bill, signature = BILL_TYPE.from_json(document.get("bill"))
        bases = tuple(_basis(one) for one in _list(document, "bases"))
        lines, path = document.get("lines"), document.get("path")
        if lines is not None:
            lines = _list(document, "lines")
            if any(type(number) is not int or not 0 <= number < len(bases) for number in lines):
                raise MalformedError(_WHAT, "lines must be numbers of bases")
        if path is not None:
            path = tuple(_bytes32(one) for one in _list(document, "path", merkle.MAX_PATH))
        lists = []
        for one in _list(document, "priceLists"):
            price_list, signed = PRICE_LIST_TYPE.from_json(one)
            lists.append(SignedPriceList(price_list, signed, PRICE_LIST_TYPE.pack(price_list, signed)))
        return cls(bill, signature, tuple(lists), bases, None if lines is None else tuple(lines), path)

    def prices(self) -> dict[bytes, Prices]:
        """Return the prices of each session; those of a list that is none are left out."""
        found = {}
        for one in self.lists:
            try:
                found[one.price_list.session] = one.prices()
            except MalformedError:
                continue
        return found


def _list(document: dict[str, Any], key: str, most: int = 2**32) -> list[Any]:
    value = document.get(key)
    if not isinstance(value, list) or len(value) > most:
        raise MalformedError(_WHAT, f"{key} must be a list" + (f" of at most {most}" if most < 2**32 else ""))
    return value


def _basis(value: object) -> Basis:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], list):
        raise MalformedError(_WHAT, "a basis must be a session and a list of GPUs")
    session, gpus = value
    if len(gpus) > MAX_LIST_ITEMS:
        raise MalformedError(_WHAT, f"a basis has at most {MAX_LIST_ITEMS} GPUs")
    return Basis(_bytes32(session), tuple(_gpu(gpu) for gpu in gpus))


def _gpu(value: object) -> tuple[bytes, str]:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], str):
        raise MalformedError(_WHAT, "a GPU of a basis must be its name and its model")
    name, model = value
    try:
        model.encode()
    except UnicodeEncodeError:
        raise MalformedError(_WHAT, "a model must be valid Unicode text") from None
    if len(model) > MAX_MODEL_CHARS:
        raise MalformedError(_WHAT, f"a model has at most {MAX_MODEL_CHARS} characters")
    return _bytes32(name), model


def _bytes32(value: object) -> bytes:
    return bytes32(value, _WHAT)


def check_bill(
    part: BillPart, statement_hash: bytes, node: Address, bootstrap: Address, chain_id: int
) -> list[RuleResult]:
    """Return one result per rule on the bill itself and the price lists, whatever lines the file has."""
    bill = part.bill
    return [
        compare("bill_signer", bootstrap, _signer(bill.digest(chain_id), part.signature)),
        compare("bill_statement", "0x" + statement_hash.hex(), "0x" + bill.statement_hash.hex()),
        compare("bill_account", f"{node} {bootstrap}", f"{bill.node} {bill.bootstrap}"),
        _check_lists(part, node, chain_id),
    ]


def check_billed(part: BillPart, billed: Sequence[tuple[bytes, int]]) -> list[RuleResult]:
    """Return one result per rule on all lines: whether bases and amounts follow from them.

    Args:
        billed: of each line of the statement, its receipt's hash and its time in milliseconds.
    """
    numbers = part.lines
    if numbers is None or len(numbers) != len(billed):
        there = "none" if numbers is None else str(len(numbers))
        return [RuleResult("bill_lines", False, f"a basis for each of {len(billed)} lines", there)]
    leaves = leaves_of(((hash, number) for (hash, _), number in zip(billed, numbers, strict=True)), part.bases)
    totals = amounts_of(
        ((time, number) for (_, time), number in zip(billed, numbers, strict=True)), part.bases, part.prices()
    )
    return [
        RuleResult("bill_lines", True),
        compare("bill_root", "0x" + merkle.tree_root(leaves).hex(), "0x" + part.bill.root.hex()),
        compare("amounts", _shown(amounts_text(totals)), _shown(part.bill.amounts)),
    ]


def check_basis(
    part: BillPart, receipt_hash: bytes, index: int, size: int, session: bytes | None, gpus: Sequence[bytes] | None
) -> list[RuleResult]:
    """Return one result per rule on the one line of a file that proves it.

    Args:
        index, size: the line's place in the statement, and how many lines that has.
        session, gpus: as its order and receipt say, where those are at hand.
    """
    if part.path is None or len(part.bases) != 1:
        return [RuleResult("bill_inclusion", False, "one basis, and the path from it", "none")]
    (basis,) = part.bases
    root = merkle.root_by_path(merkle.leaf_hash(receipt_hash + basis.digest()), index, size, part.path)
    results = [
        compare("bill_inclusion", "0x" + part.bill.root.hex(), "0x" + root.hex() if root is not None else "no path")
    ]
    if session is not None and gpus is not None:
        results.append(compare_basis("bill_receipt", basis, session, gpus))
    return results


def compare_basis(rule: str, basis: Basis, session: bytes, gpus: Sequence[bytes]) -> RuleResult:
    """Return whether *basis* is that of a receipt whose order and whose GPUs are these."""
    return compare(rule, _basis_text(session, gpus), _basis_text(basis.session, [gpu for gpu, _ in basis.gpus]))


def _basis_text(session: bytes, gpus: Sequence[bytes]) -> str:
    return f"session 0x{session.hex()}, GPUs " + (" ".join("0x" + gpu.hex() for gpu in gpus) or "none")


def _check_lists(part: BillPart, node: Address, chain_id: int) -> RuleResult:
    """Each list is one, of the node, for a session that has no other."""
    rule, seen = "price_lists", set()
    for one in part.lists:
        session = one.price_list.session
        name = f"the list of session 0x{session.hex()}"
        if session in seen:
            return RuleResult(rule, False, "one list a session", f"two for 0x{session.hex()}")
        seen.add(session)
        signer = _signer(one.price_list.digest(chain_id), one.signature)
        if not one.price_list.node == node == signer:
            return RuleResult(rule, False, f"{name} signed by {node}", signer)
        try:
            one.prices()
        except MalformedError as error:
            return RuleResult(rule, False, f"{name} in its one form", str(error))
    return RuleResult(rule, True)


def _shown(amounts: str) -> str:
    return ", ".join(amounts.split("\n")) if amounts else "nothing"


def _signer(digest: bytes, signature: bytes) -> str:
    try:
        return recover(digest, signature)
    except SignatureError as error:
        return str(error)
