"""What the commands about accounts and products do: they work on the database itself, whether or not a daemon runs.

Both sides only add and remove whole rows, each in a transaction, and the daemon keeps none of them in memory, so a
second writer is safe here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import sqlalchemy as sa

from ngpu_bootstrap.compat import passwords, rows
from ngpu_bootstrap.config import BootstrapSettings
from ngpu_bootstrap.store import schema
from ngpu_bootstrap.store.database import open_engine
from ngpu_daemon.errors import OperatorError

T = TypeVar("T")

PRODUCT_FIELDS = (
    "product_name",
    "gpu_name",
    "gpu_type",
    "gpu_model",
    "video_memory",
    "core_num",
    "memory",
    "storage",
    "net_band",
    "operating_system",
    "hour_price",
    "week_price",
    "month_price",
    "area",
    "description",
)
_EMAIL = re.compile(r"[^@\s]{1,64}@[^@\s]{1,255}")


class AccountError(OperatorError):
    """What was asked about accounts or products cannot be done; the message says why."""


class Accounts:
    """Accounts and products of one bootstrap's database."""

    def __init__(self, settings: BootstrapSettings) -> None:
        self._location = settings.store or settings.data_dir / "bootstrap.db"
        self._network = settings.network

    def users(self) -> list[rows.User]:
        """Return every account, oldest first."""
        return self._do(rows.users)

    def add_user(self, email: str, password: str) -> None:
        """Make an account; the password is kept as argon2id of what clients send for it."""
        if _EMAIL.fullmatch(email) is None:
            raise AccountError(f"{email[:64]!r} is no e-mail address")
        stored = passwords.stored_form(passwords.sent_form(password))
        at_ms = time.time_ns() // 1_000_000
        if not self._do(lambda connection: rows.add_user(connection, email, stored, at_ms)):
            raise AccountError(f"there is an account {email} already: remove it first")

    def remove_user(self, email: str) -> None:
        """Remove an account."""
        if not self._do(lambda connection: rows.remove_user(connection, email)):
            raise AccountError(f"there is no account {email[:64]}; `ngpu-bootstrap user list` shows them")

    def products(self) -> list[tuple[int, dict[str, Any]]]:
        """Return every product, oldest first."""
        return self._do(rows.products)

    def add_product(self, given: Mapping[str, str]) -> int:
        """Make a product; return its id."""
        if unknown := sorted(set(given) - set(PRODUCT_FIELDS)):
            raise AccountError(f"a product has no field {unknown[0][:64]}; it has {', '.join(PRODUCT_FIELDS)}")
        document = {name: given.get(name, "") for name in PRODUCT_FIELDS}
        return self._do(lambda connection: rows.add_product(connection, document))

    def remove_product(self, number: int) -> None:
        """Remove a product."""
        if not self._do(lambda connection: rows.remove_product(connection, number)):
            raise AccountError(f"there is no product {number}; `ngpu-bootstrap product list` shows them")

    def _do(self, work: Callable[[sa.Connection], T]) -> T:
        engine = open_engine(self._location)
        try:
            with engine.connect() as connection:
                schema.prepare_schema(connection, network=self._network)
                with connection.begin():
                    return work(connection)
        except sa.exc.DBAPIError as error:
            raise AccountError(f"the database cannot be used: {error.orig}") from None
        finally:
            engine.dispose()
