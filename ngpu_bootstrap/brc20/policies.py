"""What a workspace asks of its callers' BTC addresses: nothing, a note, or a least amount of a ticker. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Ticker = Annotated[str, StringConstraints(min_length=1, max_length=16, pattern=r"^[!-~]+$")]


class Brc20Policy(BaseModel):
    """A workspace's policy on BRC-20 assets.

    `ignore`: addresses are noted with tasks and not looked up. `record`: the balance is looked up and noted with the
    task, whatever it is; the call never waits for it. `require`: a call without an address that holds `minimum` of
    `ticker` is refused, and so it is while nobody can say.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["ignore", "record", "require"] = Field(default="record", description="what is done about an address")
    ticker: Ticker | None = Field(default=None, description="the asset; none: the bootstrap's own default")
    minimum: Annotated[Decimal, Field(gt=0, max_digits=38, decimal_places=18)] = Field(
        default=Decimal("0.000000000000000001"), description="least amount under `require`, a decimal as text"
    )


def held_of(balances: Mapping[str, Decimal], ticker: str) -> Decimal:
    """Return how much of *ticker* there is; tickers are the same in any case."""
    wanted = ticker.casefold()
    return sum((amount for name, amount in balances.items() if name.casefold() == wanted), Decimal(0))


def plain(amount: Decimal) -> str:
    """Return the exact decimal text of *amount*, without an exponent or trailing zeros."""
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
