"""Databases of their own for tests, on the PostgreSQL server that NGPU_TEST_POSTGRES names."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import sqlalchemy as sa


@contextmanager
def new_database() -> Iterator[str]:
    """Make an empty database, yield its URL, and drop it with whoever still uses it."""
    server = os.environ["NGPU_TEST_POSTGRES"]
    name = f"ngpu_test_{secrets.token_hex(6)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        try:
            yield sa.make_url(server).set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
