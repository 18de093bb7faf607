"""The store's tests run on both kinds of database: `directory` is a place for a store on one of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.postgres import new_database
from tests.unit.store.builders import DATABASE_FILE


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.needs_postgres)])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Yield a folder that `a_store` opens a store in: a SQLite file there, or a PostgreSQL database it names."""
    if request.param == "sqlite":
        yield tmp_path
        return
    with new_database() as url:
        (tmp_path / DATABASE_FILE).write_text(url)
        yield tmp_path
