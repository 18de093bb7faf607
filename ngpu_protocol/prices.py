"""Price lists: what an owner asks for a second of each GPU model, signed, and which list a receipt falls under.

A price is used to total receipts and for nothing else: no order is chosen, refused or judged by it.

A node gives its list in the hello, signed over the session of that run of it, and every order names the session it was
made for. So the list of a receipt is that of the session in the order it answers: whoever signed the order had the
list before, no clock has a say in it, and a list cannot be changed for work that was ordered already. A session has one
list; an owner who changes his prices restarts the node.

On the wire the list is text, one line a model, in order of the models' canonical names::

    A100-80G=0.0005
    RTX4090=0.00012

Amounts are decimal and exact, at most `MAX_DIGITS` before the point and as many after it. The unit is the owner's
word: a currency, a token, credits. Sums are kept apart by unit and never converted.

Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from decimal import Context, Decimal
from typing import Final

from ngpu_protocol import frozen
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.gpu_models import canonical_gpu_model, gpu_model_names
from ngpu_protocol.identity import Account, Address, recover
from ngpu_protocol.typed_data import SignedType

MAX_MODELS: Final = 64
MAX_DIGITS: Final = 18
MAX_CURRENCY_CHARS: Final = 32
_AMOUNT = re.compile(r"(0|[1-9][0-9]{0,17})(\.[0-9]{1,18})?")
_CURRENCY = re.compile(r"[A-Za-z0-9$€£¥][A-Za-z0-9$€£¥ ._/-]{0,31}")
# 36 digits of a price, 19 of milliseconds: no product is ever rounded
_EXACT: Final = Context(prec=80)


class PriceError(ValueError):
    """A price list cannot be what is written; the message says what is wrong."""


def parse_amount(text: str) -> Decimal:
    """Return the amount in *text*, such as ``0.00012``.

    Raises:
        PriceError: it is no plain decimal number, or too long for one.
    """
    if not _AMOUNT.fullmatch(text):
        raise PriceError(
            f"{text[:64]!r} is no amount: write a decimal number such as 0.00012, of at most {MAX_DIGITS} digits on "
            "either side of the point"
        )
    return Decimal(text)


def amount_text(amount: Decimal) -> str:
    """Return *amount* without exponent and without zeros at its end."""
    text = format(amount, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True, slots=True)
class Prices:
    """What a second of each GPU model costs.

    Attributes:
        currency: the unit, in the owner's word; empty where none was said.
        per_second: by canonical model name.
    """

    currency: str
    per_second: Mapping[str, Decimal] = dataclass_field(hash=False)

    @classmethod
    def of_models(cls, currency: str, per_second: Mapping[str, str]) -> Prices:
        """Return the prices of models in any spelling.

        Raises:
            PriceError: a word or an amount is none, two spellings name one model, or there are too many.
        """
        if currency and not _CURRENCY.fullmatch(currency):
            raise PriceError(f"{currency[:64]!r} is no currency: write a word such as USD, of at most 32 characters")
        if len(per_second) > MAX_MODELS:
            raise PriceError(f"{len(per_second)} models, of which {MAX_MODELS} may have a price")
        prices: dict[str, Decimal] = {}
        for spelling, text in per_second.items():
            model = canonical_gpu_model(spelling)
            if not model:
                raise PriceError(f"{spelling[:64]!r} is no GPU model")
            if model in prices:
                raise PriceError(f"{model} has two prices: {spelling[:64]!r} is another spelling of it")
            try:
                prices[model] = parse_amount(text)
            except PriceError as error:
                raise PriceError(f"{model}: {error}") from None
        return cls(currency, dict(sorted(prices.items())))

    @classmethod
    def of_text(cls, currency: str, text: str) -> Prices:
        """Return the prices in the text of a `PriceList`.

        Raises:
            PriceError: it is not exactly what `text` writes.
        """
        lines = text.split("\n") if text else []
        pairs = [line.partition("=")[::2] for line in lines]
        prices = cls.of_models(currency, dict(pairs))
        if prices.text != text:
            raise PriceError("the list is not in its one form: canonical models in order, amounts without idle zeros")
        return prices

    @property
    def text(self) -> str:
        """The list's one form, which is signed."""
        return "\n".join(f"{model}={amount_text(price)}" for model, price in sorted(self.per_second.items()))

    def of(self, model: str) -> Decimal | None:
        """Return the price of one second, None where there is none for this model.

        A model sold with several sizes of memory has its own price, or that of its family.
        """
        return next((self.per_second[name] for name in gpu_model_names(model) if name in self.per_second), None)


def cost(price: Decimal, billed_ms: int) -> Decimal:
    """Return what *billed_ms* milliseconds cost at *price* a second, exactly."""
    return _EXACT.divide(_EXACT.multiply(price, Decimal(billed_ms)), Decimal(1000))


def total(amounts: Mapping[str, Decimal], currency: str, amount: Decimal) -> dict[str, Decimal]:
    """Return *amounts*, by currency, with *amount* added."""
    return {**amounts, currency: _EXACT.add(amounts.get(currency, Decimal(0)), amount)}


# -- signed ------------------------------------------------------------------------------------------------------------


@frozen.dataclass(frozen=True, slots=True)
class PriceList:
    """The prices of one session of a node.

    Attributes:
        node: whose.
        session: of this run of it, as in its orders, 32 bytes.
        currency: as in `Prices`.
        per_second: as `Prices.text` writes it.
    """

    node: Address
    session: bytes
    currency: str
    per_second: str

    def struct_hash(self) -> bytes:
        """Return EIP-712's hashStruct, without the network."""
        return PRICE_LIST_TYPE.struct_hash(self)

    def digest(self, chain_id: int) -> bytes:
        """Return the 32 bytes that the node signs."""
        return PRICE_LIST_TYPE.digest(self, chain_id)


PRICE_LIST_TYPE = SignedType(
    "PriceList(address node,bytes32 session,string currency,string perSecond)",
    PriceList,
    what="price list",
    max_bytes=8192,
)


@frozen.dataclass(frozen=True, slots=True)
class SignedPriceList:
    """A price list, its signature, and the msgpack map of both."""

    price_list: PriceList
    signature: bytes
    wire: bytes

    @classmethod
    def from_bytes(cls, wire: bytes) -> SignedPriceList:
        """Return the list in a msgpack map; nothing but its form is judged.

        Raises:
            MalformedError: whatever else *wire* is.
        """
        record, signature = PRICE_LIST_TYPE.unpack(wire)
        return cls(record, signature, wire)

    def signer(self, chain_id: int) -> Address:
        """Return who signed.

        Raises:
            SignatureError: if no key recovers.
        """
        return recover(self.price_list.digest(chain_id), self.signature)

    def prices(self) -> Prices:
        """Return what is asked.

        Raises:
            MalformedError: the list's text is none.
        """
        try:
            return Prices.of_text(self.price_list.currency, self.price_list.per_second)
        except PriceError as error:
            raise MalformedError("price list", str(error)) from None


def sign_price_list(prices: Prices, session: bytes, account: Account, chain_id: int) -> SignedPriceList:
    """Return *prices* signed by their node for one session."""
    price_list = PriceList(account.address, session, prices.currency, prices.text)
    signature = account.sign(price_list.digest(chain_id))
    return SignedPriceList(price_list, signature, PRICE_LIST_TYPE.pack(price_list, signature))


def check_price_list(wire: bytes, node: Address, session: bytes, chain_id: int) -> SignedPriceList:
    """Return the list in *wire*, which *node* says is that of its *session*.

    Raises:
        MalformedError: it is another's, not signed by the node, or not a list.
        SignatureError: if no key recovers.
    """
    signed = SignedPriceList.from_bytes(wire)
    if signed.price_list.node != node or signed.price_list.session != session:
        raise MalformedError("price list", "of another node or session")
    if signed.signer(chain_id) != node:
        raise MalformedError("price list", f"{node} did not sign it")
    signed.prices()
    return signed
