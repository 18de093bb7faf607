"""`GET /brc20/checkAddress`, as the documents have it: what a BTC address holds."""

from __future__ import annotations

import math
import time
from decimal import ROUND_FLOOR

from ngpu_bootstrap.brc20.checker import Brc20Checker
from ngpu_bootstrap.brc20.policies import held_of, plain
from ngpu_bootstrap.errors import BadRequest, NotServed, Refusal
from ngpu_bootstrap.front.answers import Answer, json_answer
from ngpu_bootstrap.front.guards import AddressBuckets
from ngpu_bootstrap.front.paths import parse_parameters

PATH = "/brc20/checkAddress"
_MAX_TICKER = 16


class Brc20Api:
    """Answers the calls under `/brc20/`. They need no token, so each client's address has a bound.

    Args:
        per_minute: checks of one client.
    """

    def __init__(self, checker: Brc20Checker, *, per_minute: int) -> None:
        self._checker = checker
        self._clients = AddressBuckets(burst=per_minute, per_s=per_minute / 60)

    async def answer(self, method: str, path: str, query: str | None, client: str) -> Answer:
        """Return the answer to a request.

        Raises:
            Refusal: what is wrong with it, or why it cannot be served.
        """
        if path != PATH:
            raise Refusal(404, "not_found", f"nothing is served at this path; {PATH} is")
        if method not in ("GET", "HEAD"):
            raise Refusal(405, "method_not_allowed", "this path takes GET", headers={"Allow": "GET"})
        parameters = parse_parameters(query, ("address", "ticker"))
        address = parameters.get("address", "")
        if not address:
            raise BadRequest("btc_address_missing", "name the address: ?address=<BTC address>")
        ticker = parameters.get("ticker") or self._checker.ticker
        if len(ticker) > _MAX_TICKER:
            raise BadRequest("bad_ticker", f"a ticker has at most {_MAX_TICKER} characters")
        wait_s = self._clients.take(client, time.monotonic())
        if wait_s:
            raise NotServed(
                429,
                "too_many_checks",
                "too many addresses were checked from this address; come again later",
                retry_after_s=math.ceil(wait_s),
            )
        balances = await self._checker.balances(address)
        names = sorted(balances)
        return json_answer(
            200,
            {
                "exists": held_of(balances, ticker) > 0,
                "names": names,
                "balances": [int(balances[name].to_integral_value(ROUND_FLOOR)) for name in names],
                "amounts": [plain(balances[name]) for name in names],
            },
        )
