"""What an address holds, asked of the indexer within bounds and remembered for a while.

One address is asked for once, however many want to know at that moment; so many are asked for at once and no more;
answers are remembered in a table that is bounded, refusals for a shorter time. Nobody waits longer than the time limit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal

import structlog
import trio

from ngpu_bootstrap.brc20.addresses import AddressProblem, Network, parse_bitcoin_address
from ngpu_bootstrap.brc20.indexers import Indexer, IndexerFault
from ngpu_bootstrap.errors import BadRequest, NotServed

log = structlog.get_logger(__name__)

# A fault is remembered for so long, so that an indexer that is down is not asked by every call.
FAULT_S = 5.0
MAX_WAITING = 256


@dataclass(frozen=True, slots=True)
class _Known:
    until_s: float
    balances: Mapping[str, Decimal]
    fault: str = ""


class Brc20Checker:
    """Says what addresses hold.

    Args:
        indexer: who is asked; None where the operator configured none.
        network: whose addresses are looked up.
        ticker: the asset that is meant where nobody names one.
        cache_s: how long an answer is remembered.
        at_once: addresses asked for at once.
    """

    def __init__(
        self,
        indexer: Indexer | None,
        *,
        network: Network,
        ticker: str,
        timeout_s: float,
        cache_s: float,
        cache_size: int,
        at_once: int,
        now_s: Callable[[], float] = trio.current_time,
    ) -> None:
        self._indexer = indexer
        self._network = network
        self.ticker = ticker
        self._timeout_s = timeout_s
        self._cache_s = cache_s
        self._cache_size = cache_size
        self._slots = trio.CapacityLimiter(at_once)
        self._now_s = now_s
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._asking: dict[str, trio.Event] = {}
        self._waiting = 0

    def __len__(self) -> int:
        return len(self._known)

    @property
    def is_configured(self) -> bool:
        """Whether there is an indexer to ask."""
        return self._indexer is not None

    async def balances(self, text: str) -> Mapping[str, Decimal]:
        """Return what the address in *text* holds, by ticker.

        Raises:
            BadRequest: it is no address, or of another network.
            NotServed: 503; no indexer is configured, or it cannot say now.
        """
        try:
            address = parse_bitcoin_address(text)
        except AddressProblem as problem:
            raise BadRequest("bad_btc_address", f"this is no Bitcoin address: {problem}") from None
        if address.network != self._network:
            raise BadRequest(
                "wrong_btc_network", f"this is an address of {address.network}; {self._network} is looked up here"
            )
        if self._indexer is None:
            raise NotServed(
                503,
                "indexer_unconfigured",
                "no BRC-20 indexer is configured here: the operator sets [brc20] indexer",
            )
        known = await self._look_up(self._indexer, address.text)
        if known.fault:
            raise NotServed(
                503,
                "indexer_unavailable",
                f"the BRC-20 indexer {self._indexer.name} cannot say now: {known.fault}; come again later",
                retry_after_s=5,
            )
        return known.balances

    async def _look_up(self, indexer: Indexer, address: str) -> _Known:
        deadline_s = trio.current_time() + self._timeout_s
        while True:
            known = self._known.get(address)
            if known is not None and self._now_s() < known.until_s:
                self._known.move_to_end(address)
                return known
            asking = self._asking.get(address)
            if asking is None:
                return await self._ask(indexer, address)
            with trio.move_on_at(deadline_s) as patience:
                await asking.wait()  # and look again: who asked may have left before there was an answer
            if patience.cancelled_caught:
                return _Known(0.0, {}, f"no answer within {self._timeout_s:g} s")

    async def _ask(self, indexer: Indexer, address: str) -> _Known:
        if self._waiting >= MAX_WAITING:
            return _Known(0.0, {}, "too many addresses are being looked up")
        done = self._asking[address] = trio.Event()
        self._waiting += 1
        known: _Known | None = None
        try:
            with trio.move_on_after(self._timeout_s) as patience:
                async with self._slots:
                    try:
                        found = await indexer.balances(address)
                        known = _Known(self._now_s() + self._cache_s, found)
                    except IndexerFault as fault:
                        known = self._fault(indexer, str(fault))
            if patience.cancelled_caught:
                known = self._fault(indexer, f"no answer within {self._timeout_s:g} s")
        finally:
            self._waiting -= 1
            del self._asking[address]
            if known is not None:
                self._remember(address, known)
            done.set()
        assert known is not None
        return known

    def _fault(self, indexer: Indexer, why: str) -> _Known:
        log.warning("indexer_unavailable", indexer=indexer.name, reason=why)
        return _Known(self._now_s() + min(FAULT_S, self._cache_s), {}, why)

    def _remember(self, address: str, known: _Known) -> None:
        self._known[address] = known
        self._known.move_to_end(address)
        while len(self._known) > self._cache_size:
            self._known.popitem(last=False)
