"""The services that know BRC-20 balances, each by its published HTTP API.

UniSat open API (docs.unisat.io): `GET /v1/indexer/address/{address}/brc20/summary?start=&limit=` with a bearer key
answers `{"code": 0, "msg", "data": {"total", "start", "detail": [{"ticker", "overallBalance", ...}]}}`; a `code` other
than 0 is an error whatever the status. Hiro ordinals API (docs.hiro.so): `GET
/ordinals/v1/brc-20/balances/{address}?offset=&limit=` with an optional `x-api-key` answers `{"limit", "offset",
"total", "results": [{"ticker", "overall_balance", ...}]}`, at most 60 a page. Balances are decimal texts in both and
stay exact here.

What an indexer sends is not trusted: sizes, pages and numbers are bounded, redirects are not followed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol
from urllib.parse import quote

import httpx

PAGE = 60
MAX_PAGES = 20
MAX_ANSWER_BYTES = 1024 * 1024
_MAX_AMOUNT = Decimal(10) ** 38


class IndexerFault(Exception):
    """The indexer could not be asked, or answered what it should not; the message names no credential."""


class Indexer(Protocol):
    """Who can say what an address holds."""

    name: str

    async def balances(self, address: str) -> Mapping[str, Decimal]:
        """Return every ticker of which *address* holds something, with the amount.

        Raises:
            IndexerFault: nobody can say now.
        """


class UniSat:
    """The UniSat open API.

    Args:
        url: its base, without a trailing slash.
        key: the API key.
    """

    name = "unisat"

    def __init__(self, client: httpx.AsyncClient, url: str, key: str) -> None:
        self._client = client
        self._url = url
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    async def balances(self, address: str) -> Mapping[str, Decimal]:
        """See `Indexer`."""
        held: dict[str, Decimal] = {}
        target = f"{self._url}/v1/indexer/address/{quote(address, safe='')}/brc20/summary"
        start = 0
        for _ in range(MAX_PAGES):
            document = await _get(self._client, target, {"start": start, "limit": PAGE}, self._headers)
            if document.get("code") != 0:
                raise IndexerFault(f"it answered code {str(document.get('code'))[:16]}")
            data = document.get("data")
            rows = data.get("detail") if isinstance(data, dict) else None
            total = _collect(held, rows, "overallBalance", data.get("total") if isinstance(data, dict) else None)
            start += len(rows or ())
            if start >= total or not rows:
                return held
        raise IndexerFault(f"the address holds more than {MAX_PAGES * PAGE} tickers")


class Hiro:
    """The Hiro ordinals API.

    Args:
        url: its base, without a trailing slash.
        key: the API key; empty without one.
    """

    name = "hiro"

    def __init__(self, client: httpx.AsyncClient, url: str, key: str) -> None:
        self._client = client
        self._url = url
        self._headers = {"x-api-key": key} if key else {}

    async def balances(self, address: str) -> Mapping[str, Decimal]:
        """See `Indexer`."""
        held: dict[str, Decimal] = {}
        target = f"{self._url}/ordinals/v1/brc-20/balances/{quote(address, safe='')}"
        offset = 0
        for _ in range(MAX_PAGES):
            document = await _get(self._client, target, {"offset": offset, "limit": PAGE}, self._headers)
            rows = document.get("results")
            total = _collect(held, rows, "overall_balance", document.get("total"))
            offset += len(rows or ())
            if offset >= total or not rows:
                return held
        raise IndexerFault(f"the address holds more than {MAX_PAGES * PAGE} tickers")


async def _get(
    client: httpx.AsyncClient, url: str, parameters: Mapping[str, int], headers: Mapping[str, str]
) -> dict[str, Any]:
    try:
        async with client.stream("GET", url, params=dict(parameters), headers=dict(headers)) as response:
            if response.status_code != 200:
                raise IndexerFault(f"it answered status {response.status_code}")
            body = bytearray()
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > MAX_ANSWER_BYTES:
                    raise IndexerFault(f"its answer has more than {MAX_ANSWER_BYTES} bytes")
    except httpx.HTTPError as error:
        raise IndexerFault(f"it cannot be reached ({type(error).__name__})") from None
    try:
        document = json.loads(bytes(body), parse_float=Decimal)
    except (ValueError, RecursionError):
        raise IndexerFault("its answer is not JSON") from None
    if not isinstance(document, dict):
        raise IndexerFault("its answer is not an object")
    return document


def _collect(held: dict[str, Decimal], rows: Any, key: str, total: Any) -> int:
    """Add the balances of one page to *held*; return how many rows there are in all."""
    if not isinstance(rows, list) or type(total) is not int or total < 0:
        raise IndexerFault("its answer lacks the list of balances")
    for row in rows:
        ticker = row.get("ticker") if isinstance(row, dict) else None
        if not isinstance(ticker, str) or not 1 <= len(ticker) <= 64:
            raise IndexerFault("its answer has a balance without a ticker")
        amount = _amount(row.get(key))
        if amount:
            held[ticker] = held.get(ticker, Decimal(0)) + amount
    return total


def _amount(value: Any) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal) or len(str(value)) > 80:
        raise IndexerFault("its answer has a balance that is no number")
    try:
        amount = Decimal(value)
    except InvalidOperation:
        raise IndexerFault("its answer has a balance that is no number") from None
    if not amount.is_finite() or not 0 <= amount < _MAX_AMOUNT:
        raise IndexerFault("its answer has a balance that cannot be")
    return amount
