"""The ledger's tables and how an older ledger becomes one of today's.

`PRAGMA user_version` counts the migrations that ran; each runs in one transaction with its count, so a crash between
two leaves a ledger that the next start continues with. Migrations are only ever appended. (Alembic, which the
bootstrap uses, would load SQLAlchemy into every node for four tables that only `ledger.py` touches.)
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from ngpu_node.errors import NodeConfigurationError

#: One script per version of the schema, oldest first.
MIGRATIONS: tuple[str, ...] = (
    """
    -- the last link of each bootstrap's chain, which is not always the last row of receipts: see Ledger.adopt_head
    CREATE TABLE chains (
        bootstrap TEXT PRIMARY KEY,
        sequence  INTEGER NOT NULL,
        hash      BLOB NOT NULL
    ) WITHOUT ROWID;

    CREATE TABLE receipts (
        bootstrap       TEXT NOT NULL,
        sequence        INTEGER NOT NULL,
        hash            BLOB NOT NULL,      -- the receipt's digest, 32 bytes
        task_id         TEXT NOT NULL,
        attempt         INTEGER NOT NULL,
        signed_order    BLOB NOT NULL,      -- as on the wire, signature included
        signed_receipt  BLOB NOT NULL,
        written_at_ms   INTEGER NOT NULL,
        acknowledgement BLOB,               -- as on the wire, signature included; NULL until it came
        verdict         TEXT
    );
    CREATE UNIQUE INDEX receipts_chain ON receipts (bootstrap, sequence);
    CREATE INDEX receipts_owed ON receipts (bootstrap, sequence) WHERE acknowledgement IS NULL;
    CREATE INDEX receipts_task ON receipts (task_id);

    -- answers of detached attempts, kept for whoever asks until they expire (execution/spool.py)
    CREATE TABLE answers (
        service         TEXT NOT NULL,
        task_id         TEXT NOT NULL,
        attempt         INTEGER NOT NULL,
        status          INTEGER NOT NULL,
        head            BLOB NOT NULL,      -- msgpack [[name, value], ...]
        body            BLOB,               -- NULL when it lies in a file of the spool
        body_file       TEXT,
        body_bytes      INTEGER NOT NULL,
        signed_receipt  BLOB NOT NULL,
        receipt_hash    BLOB NOT NULL,
        ended_at_ms     INTEGER NOT NULL,
        acknowledged_at_ms INTEGER,
        PRIMARY KEY (service, task_id, attempt)
    ) WITHOUT ROWID;
    CREATE INDEX answers_receipt ON answers (receipt_hash);
    CREATE INDEX answers_age ON answers (ended_at_ms);
    """,
    """
    -- what the GPUs named in receipts are, so that earnings can be told by model (earnings.py)
    CREATE TABLE gpus (
        id    BLOB PRIMARY KEY,
        model TEXT NOT NULL
    ) WITHOUT ROWID;
    """,
    """
    -- what the owner asked in each session that had prices (ngpu_protocol/prices.py)
    CREATE TABLE price_lists (
        session     BLOB PRIMARY KEY,
        signed_list BLOB NOT NULL           -- as on the wire, signature included
    ) WITHOUT ROWID;

    -- what a bootstrap says it saw of a receipt it disputes (ngpu_protocol/observations.py), by the receipt's digest
    CREATE TABLE observations (
        receipt_hash       BLOB PRIMARY KEY,
        signed_observation BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX receipts_disputed ON receipts (bootstrap, sequence) WHERE verdict = 'disputed';
    """,
    """
    -- a bootstrap's word for the sibling that acknowledges in its place (ngpu_protocol/stand_ins.py)
    CREATE TABLE stand_ins (
        bootstrap       TEXT NOT NULL,
        sibling         TEXT NOT NULL,
        signed_stand_in BLOB NOT NULL,      -- as on the wire, signature included
        PRIMARY KEY (bootstrap, sibling)
    ) WITHOUT ROWID;

    -- receipts a bootstrap says it asked for and was not given (ngpu_protocol/gap_claims.py)
    CREATE TABLE gap_claims (
        bootstrap     TEXT NOT NULL,
        from_sequence INTEGER NOT NULL,
        to_sequence   INTEGER NOT NULL,
        signed_claim  BLOB NOT NULL,        -- as on the wire, signature included
        claimed_at_ms INTEGER NOT NULL,
        PRIMARY KEY (bootstrap, from_sequence)
    ) WITHOUT ROWID;
    """,
    """
    -- what the GPUs were in each run of this node, as it was said first: earnings are by what a card was then
    CREATE TABLE session_gpus (
        session BLOB NOT NULL,
        id      BLOB NOT NULL,
        model   TEXT NOT NULL,
        PRIMARY KEY (session, id)
    ) WITHOUT ROWID;
    """,
)


def connect(path: Path) -> sqlite3.Connection:
    """Open the ledger at *path*, made if missing and migrated if old, ready for durable commits.

    Raises:
        NodeConfigurationError: a later version of this software wrote it, or it is no ledger.
    """
    try:
        # isolation_level None: transactions are ours to begin; the module would begin and end them at odd moments
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=512)
    except sqlite3.OperationalError as error:
        raise NodeConfigurationError(f"cannot open the ledger {path}: {error}") from error
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # FULL syncs the log at each commit: a receipt that left survives the machine, not only the process
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA busy_timeout = 5000")
        _migrate(connection, path)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise NodeConfigurationError(
            f"the ledger {path} cannot be used ({error}): restore it from a backup, or move it away and keep it"
        ) from error
    except BaseException:
        connection.close()
        raise
    path.chmod(0o600)
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise NodeConfigurationError(
            f"the ledger {path} was written by a later version of ngpu-node (schema {version}, this one knows "
            f"{len(MIGRATIONS)}): update ngpu-node"
        )
    for number in range(version, len(MIGRATIONS)):
        # executescript commits whatever is open before it starts, so the transaction is part of the script
        connection.executescript(f"BEGIN;\n{MIGRATIONS[number]}\nPRAGMA user_version = {number + 1};\nCOMMIT;")
