"""The tables, in SQLAlchemy Core: names, types and indexes as the newest migration leaves them.

A change here needs a migration in ``migrations/versions`` (a test compares the two). Types are kept to text, integers
and bytes, with JSON as text, so that rows go to any driver as they are: the writer binds them without type processing.

Task ids begin with their time of acceptance, so their unique indexes grow at the right edge.
"""

from __future__ import annotations

import sqlalchemy as sa

# SQLite gives an integer key without a second index only when the type is INTEGER; elsewhere counts outgrow 32 bits.
_COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_MS = sa.BigInteger

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _text(name: str, default: str = "") -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=False, server_default=default)


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default="0")


# what this database belongs to: key "network"
about = sa.Table(
    "about",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

workspaces = sa.Table(
    "workspaces",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("owner"),
    _text("name"),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("created_at_ms", _MS, nullable=False),
    sa.Column("updated_at_ms", _MS, nullable=False),
    sa.Column("removed_at_ms", _MS),
)

workspace_revisions = sa.Table(
    "workspace_revisions",
    metadata,
    sa.Column("workspace", sa.Text, sa.ForeignKey("workspaces.id"), primary_key=True),
    sa.Column("revision", sa.Integer, primary_key=True),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("created_at_ms", _MS, nullable=False),
)

workspace_tokens = sa.Table(
    "workspace_tokens",
    metadata,
    sa.Column("label", sa.Text, primary_key=True),
    sa.Column("workspace", sa.Text, sa.ForeignKey("workspaces.id"), nullable=False, index=True),
    sa.Column("hash", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("created_at_ms", _MS, nullable=False),
    sa.Column("expires_at_ms", _MS),
)

# what a client confided for one revision (ngpu_protocol.workspace_secrets), sealed to the key of the bootstrap that
# took it: of before there were boxes for several
workspace_secrets = sa.Table(
    "workspace_secrets",
    metadata,
    sa.Column("workspace", sa.Text, sa.ForeignKey("workspaces.id"), primary_key=True),
    sa.Column("revision", sa.Integer, primary_key=True),
    sa.Column("sealed", sa.LargeBinary, nullable=False),
)

# the same, sealed to each bootstrap that may read it
workspace_secret_boxes = sa.Table(
    "workspace_secret_boxes",
    metadata,
    sa.Column("workspace", sa.Text, sa.ForeignKey("workspaces.id"), primary_key=True),
    sa.Column("revision", sa.Integer, primary_key=True),
    sa.Column("bootstrap", sa.Text, primary_key=True),
    sa.Column("sealed", sa.LargeBinary, nullable=False),
)

# a new revision on its way to the nodes, or one that failed: until the row goes, clients are served by the base
workspace_rollouts = sa.Table(
    "workspace_rollouts",
    metadata,
    sa.Column("workspace", sa.Text, sa.ForeignKey("workspaces.id"), primary_key=True),
    sa.Column("base", sa.Integer, nullable=False),
    sa.Column("target", sa.Integer, nullable=False),
    sa.Column("began_at_ms", _MS, nullable=False),
    sa.Column("failed_at_ms", _MS),
    _text("node"),
    _text("reason"),
    _text("detail"),
)

# which nodes are to run an image, and the revision each was told
deployments = sa.Table(
    "deployments",
    metadata,
    sa.Column("workspace", sa.Text, sa.ForeignKey("workspaces.id"), primary_key=True),
    sa.Column("node", sa.Text, primary_key=True),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("assigned_at_ms", _MS, nullable=False),
)

tasks = sa.Table(
    "tasks",
    metadata,
    sa.Column("number", _COUNT, primary_key=True, autoincrement=True),
    sa.Column("task_id", sa.Text, nullable=False, unique=True),
    sa.Column("workspace", sa.Text, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    _text("api"),
    _text("method"),
    sa.Column("port", sa.Integer, nullable=False),
    _text("target"),
    _text("headers", "[]"),
    _text("request_url"),
    _text("token_label"),
    _text("btc_address"),
    _text("user_ip"),
    sa.Column("idempotency_key", sa.Text),
    sa.Column("detach", sa.Integer, nullable=False),
    sa.Column("wrapped", sa.Integer, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("accepted_at_ms", _MS, nullable=False),
    sa.Column("deadline_at_ms", _MS, nullable=False),
    sa.Column("state", sa.Integer, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    _text("node"),
    _text("node_ip"),
    sa.Column("dispatched_at_ms", _MS),
    sa.Column("finished_at_ms", _MS),
    _count("result_code"),
    _text("message"),
    _text("reason"),
    _count("status"),
    _text("content_type"),
    _text("encoding"),
    _text("verdict"),
    _text("rule"),
    # whose it is to bring to an end, among several bootstraps on one database; empty: of before there were several
    _text("bootstrap"),
    sa.Column("cancel_asked_at_ms", _MS),
    # what was found out about the address, as JSON; empty while nothing was
    _text("brc20"),
    # the workspace whose token asked for it, where that is another than the one it ran on
    _text("caller"),
    # the client's key for tasks that belong on one node, its bytes as Latin-1
    _text("affinity"),
    # most tasks have no key: they cost this index nothing
    sa.Index(
        "uq_tasks_idempotency_key",
        "workspace",
        "idempotency_key",
        unique=True,
        sqlite_where=sa.text("idempotency_key IS NOT NULL"),
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    ),
    # lists: newest first within a workspace; `number` breaks ties and is the cursor
    sa.Index("ix_tasks_listing", "workspace", "accepted_at_ms", "number"),
    sa.Index(
        "ix_tasks_calls",
        "caller",
        "accepted_at_ms",
        "number",
        sqlite_where=sa.text("caller <> ''"),
        postgresql_where=sa.text("caller <> ''"),
    ),
    # the same of one node; a task that waits for one costs this index nothing
    sa.Index(
        "ix_tasks_of_node",
        "workspace",
        "node",
        "accepted_at_ms",
        "number",
        sqlite_where=sa.text("node <> ''"),
        postgresql_where=sa.text("node <> ''"),
    ),
    # recovery reads only these, however many tasks are done
    sa.Index(
        "ix_tasks_unfinished",
        "state",
        sqlite_where=sa.text("state < 3"),
        postgresql_where=sa.text("state < 3"),
    ),
)

# apart from `tasks`, so that changing a task's state never rewrites its bodies
bodies = sa.Table(
    "bodies",
    metadata,
    sa.Column("task_id", sa.Text, sa.ForeignKey("tasks.task_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("part", sa.Text, primary_key=True),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("content", sa.LargeBinary),
    _text("path"),
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("task_id", sa.Text, sa.ForeignKey("tasks.task_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("node", sa.Text, nullable=False),
    _text("node_ip"),
    sa.Column("session", sa.LargeBinary, nullable=False),
    sa.Column("signed_order", sa.LargeBinary, nullable=False),
    sa.Column("began_at_ms", _MS, nullable=False),
    sa.Column("ended_at_ms", _MS),
    _text("outcome"),
    _text("reason"),
    _count("status"),
    sqlite_with_rowid=False,
)

# no foreign key: receipts outlive the tasks they were for (they are what is paid)
receipts = sa.Table(
    "receipts",
    metadata,
    sa.Column("bootstrap", sa.Text, primary_key=True),
    sa.Column("node", sa.Text, primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("task_id", sa.Text, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    sa.Column("previous", sa.LargeBinary, nullable=False),
    sa.Column("raw", sa.LargeBinary, nullable=False),
    sa.Column("acknowledgement", sa.LargeBinary, nullable=False),
    _text("verdict"),
    _text("rule"),
    _text("expected"),
    _text("actual"),
    _text("outcome"),
    _text("meter"),
    _count("started_at_ms"),
    _count("ended_at_ms"),
    _count("duration_ms"),
    _count("reserved_gpu_ms"),
    _count("busy_gpu_ms"),
    sa.Column("received_at_ms", _MS, nullable=False),
    # of an attempt whose task was removed: what the receipt answers
    sa.Column("signed_order", sa.LargeBinary),
    # of a task that was removed: whose it was, where that is not the workspace that ran it
    sa.Column("caller", sa.Text),
    sa.Index("ix_receipts_task", "task_id", "attempt"),
    # one in thousands: they are listed without reading the others
    sa.Index(
        "ix_receipts_disputed",
        "node",
        "sequence",
        sqlite_where=sa.text("verdict = 'disputed'"),
        postgresql_where=sa.text("verdict = 'disputed'"),
    ),
    sqlite_with_rowid=False,
)

# the last receipt up to which a chain has no gap
chains = sa.Table(
    "chains",
    metadata,
    sa.Column("bootstrap", sa.Text, primary_key=True),
    sa.Column("node", sa.Text, primary_key=True),
    sa.Column("head_sequence", sa.BigInteger, nullable=False),
    sa.Column("head_hash", sa.LargeBinary, nullable=False),
)

chain_faults = sa.Table(
    "chain_faults",
    metadata,
    sa.Column("bootstrap", sa.Text, primary_key=True),
    sa.Column("node", sa.Text, primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("hash", sa.LargeBinary, primary_key=True),
    sa.Column("raw", sa.LargeBinary, nullable=False),
    sa.Column("expected", sa.LargeBinary, nullable=False),
    sa.Column("actual", sa.LargeBinary, nullable=False),
    sa.Column("found_at_ms", _MS, nullable=False),
)

# receipts a node is asked for, and since when; with a claim they were given up (dispatch/gaps.py)
chain_gaps = sa.Table(
    "chain_gaps",
    metadata,
    sa.Column("bootstrap", sa.Text, primary_key=True),
    sa.Column("node", sa.Text, primary_key=True),
    sa.Column("from_sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("to_sequence", sa.BigInteger, nullable=False),
    sa.Column("asked_at_ms", _MS, nullable=False),
    sa.Column("claim", sa.LargeBinary, nullable=False),
)

# who shares this database; one whose lease has ended is taken for dead
bootstraps = sa.Table(
    "bootstraps",
    metadata,
    sa.Column("address", sa.Text, primary_key=True),
    sa.Column("lease_until_ms", _MS, nullable=False),
    sa.Column("started_at_ms", _MS, nullable=False),
    _text("about", "{}"),
)

# which nodes are connected to which bootstrap, and what they report of their deployments (`leases.Told` by workspace,
# as JSON); each writes its own, and those of one whose lease has ended mean nothing
node_presence = sa.Table(
    "node_presence",
    metadata,
    sa.Column("bootstrap", sa.Text, primary_key=True),
    sa.Column("node", sa.Text, primary_key=True),
    sa.Column("reports", sa.Text),
)

# whom to tell of a task's end, and how that goes
webhooks = sa.Table(
    "webhooks",
    metadata,
    sa.Column("task_id", sa.Text, sa.ForeignKey("tasks.task_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("url", sa.Text, nullable=False),
    _text("token_label"),
    sa.Column("tries", sa.Integer, nullable=False, server_default="0"),
    sa.Column("next_at_ms", _MS, nullable=False),
    sa.Column("done_at_ms", _MS),
    sa.Column("status", sa.Integer, nullable=False, server_default="0"),
    _text("problem"),
    sa.Index(
        "ix_webhooks_due",
        "next_at_ms",
        sqlite_where=sa.text("done_at_ms IS NULL"),
        postgresql_where=sa.text("done_at_ms IS NULL"),
    ),
)

nodes = sa.Table(
    "nodes",
    metadata,
    sa.Column("address", sa.Text, primary_key=True),
    _text("name"),
    _text("peer_id"),
    _text("software"),
    sa.Column("session", sa.LargeBinary, nullable=False),
    sa.Column("first_seen_ms", _MS, nullable=False),
    sa.Column("last_seen_ms", _MS, nullable=False),
)

# what the GPUs named in receipts are, so that statements can be told by model
node_gpus = sa.Table(
    "node_gpus",
    metadata,
    sa.Column("node", sa.Text, primary_key=True),
    sa.Column("gpu", sa.LargeBinary, primary_key=True),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("seen_at_ms", _MS, nullable=False),
)

# what a node offered in a session of its, as it said first: what a receipt of that session may name
session_gpus = sa.Table(
    "session_gpus",
    metadata,
    sa.Column("bootstrap", sa.Text, primary_key=True),
    sa.Column("node", sa.Text, primary_key=True),
    sa.Column("session", sa.LargeBinary, primary_key=True),
    sa.Column("gpu", sa.LargeBinary, primary_key=True),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("seen_at_ms", _MS, nullable=False),
)

# what a node asked in a session of its, by its own signature (ngpu_protocol.prices)
price_lists = sa.Table(
    "price_lists",
    metadata,
    sa.Column("bootstrap", sa.Text, primary_key=True),
    sa.Column("node", sa.Text, primary_key=True),
    sa.Column("session", sa.LargeBinary, primary_key=True),
    sa.Column("signed_list", sa.LargeBinary, nullable=False),
    sa.Column("given_at_ms", _MS, nullable=False),
)

# what a bootstrap says it saw of a receipt it disputes, by its own signature (ngpu_protocol.observations); the
# receipt itself is in `receipts`, or in `chain_faults` where it has no place in the chain
observations = sa.Table(
    "observations",
    metadata,
    sa.Column("bootstrap", sa.Text, primary_key=True),
    sa.Column("node", sa.Text, primary_key=True),
    sa.Column("receipt_hash", sa.LargeBinary, primary_key=True),
    sa.Column("task_id", sa.Text, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("acknowledgement", sa.LargeBinary, nullable=False),
    sa.Column("signed_observation", sa.LargeBinary, nullable=False),
)

brc20_policies = sa.Table(
    "brc20_policies",
    metadata,
    sa.Column("workspace", sa.Text, primary_key=True),
    sa.Column("policy", sa.Text, nullable=False),
)

# whom a node's work pays, by its own signature
node_bindings = sa.Table(
    "node_bindings",
    metadata,
    sa.Column("node", sa.Text, primary_key=True),
    sa.Column("wallet", sa.Text, nullable=False),
    _text("org_name"),
    sa.Column("sequence", sa.BigInteger, nullable=False),
    sa.Column("signature", sa.LargeBinary, nullable=False),
    sa.Column("bound_at_ms", _MS, nullable=False),
)

# what existing NGPU clients know as accounts, products, images, groups and workspaces (`compat`)


def _user() -> sa.Column[int]:
    return sa.Column("user", _COUNT, sa.ForeignKey("cloud_users.id", ondelete="CASCADE"), nullable=False, index=True)


cloud_users = sa.Table(
    "cloud_users",
    metadata,
    sa.Column("id", _COUNT, primary_key=True, autoincrement=True),
    sa.Column("email", sa.Text, nullable=False, unique=True),
    sa.Column("password", sa.Text, nullable=False),
    sa.Column("created_at_ms", _MS, nullable=False),
)

cloud_sessions = sa.Table(
    "cloud_sessions",
    metadata,
    sa.Column("hash", sa.LargeBinary, primary_key=True),
    _user(),
    sa.Column("expires_at_ms", _MS, nullable=False),
)

cloud_products = sa.Table(
    "cloud_products",
    metadata,
    sa.Column("id", _COUNT, primary_key=True, autoincrement=True),
    sa.Column("document", sa.Text, nullable=False),
)

cloud_images = sa.Table(
    "cloud_images",
    metadata,
    sa.Column("id", _COUNT, primary_key=True, autoincrement=True),
    _user(),
    sa.Column("document", sa.Text, nullable=False),
    sa.Column("created_at_ms", _MS, nullable=False),
)

cloud_groups = sa.Table(
    "cloud_groups",
    metadata,
    sa.Column("id", _COUNT, primary_key=True, autoincrement=True),
    _user(),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("created_at_ms", _MS, nullable=False),
)

cloud_workspaces = sa.Table(
    "cloud_workspaces",
    metadata,
    sa.Column("workspace", sa.Text, primary_key=True),
    _user(),
    sa.Column("document", sa.Text, nullable=False),
    sa.Column("created_at_ms", _MS, nullable=False),
)

# why an attempt went where it did (scheduling.placement), of some of the last ones
placements = sa.Table(
    "placements",
    metadata,
    sa.Column("task_id", sa.Text, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("at_ms", _MS, nullable=False, index=True),
    sa.Column("document", sa.Text, nullable=False),
)

# one row of each bootstrap, which alone writes it: several on one database add theirs up
node_standings = sa.Table(
    "node_standings",
    metadata,
    sa.Column("bootstrap", sa.Text, primary_key=True),
    sa.Column("node", sa.Text, primary_key=True),
    sa.Column("good", sa.Float, nullable=False),
    sa.Column("bad", sa.Float, nullable=False),
    sa.Column("at_ms", _MS, nullable=False),
    _count("verified"),
    _count("skewed"),
    _count("disputed"),
    _text("rules", "{}"),
    _text("last_rule"),
    _text("last_task"),
    _count("last_disputed_at_ms"),
)

# tasks that are jobs of a workspace: which node has each, under which id, and how far it is (`profiles.jobs`)
jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("task_id", sa.Text, sa.ForeignKey("tasks.task_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("workspace", sa.Text, nullable=False),
    sa.Column("caller", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("declared", sa.Text, nullable=False),
    _text("key"),
    _text("node"),
    sa.Column("phase", sa.Text, nullable=False),
    sa.Column("since_ms", _MS, nullable=False),
    _text("state"),
    _text("result"),
    # the workspace's own answer to the submission, for a client that comes again with its key
    sa.Column("submission", sa.LargeBinary),
    # what the bootstrap signed about one whose node is gone (`ngpu_protocol.losses`)
    sa.Column("loss", sa.LargeBinary),
    sa.Index("ix_jobs_key", "caller", "name", "key"),
)

# the tasks by which clients asked for a job
job_calls = sa.Table(
    "job_calls",
    metadata,
    sa.Column("task_id", sa.Text, sa.ForeignKey("tasks.task_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("job", sa.Text, sa.ForeignKey("tasks.task_id", ondelete="CASCADE"), nullable=False, index=True),
)

# hashes of clients' keys whose calls go to one node, for what has state there
sticky_keys = sa.Table(
    "sticky_keys",
    metadata,
    sa.Column("key", sa.LargeBinary, primary_key=True),
    sa.Column("workspace", sa.Text, nullable=False),
    sa.Column("node", sa.Text, nullable=False),
    sa.Column("used_at_ms", _MS, nullable=False),
    sa.Index("ix_sticky_keys_workspace", "workspace", "used_at_ms"),
)

# tasks that were run again elsewhere, and what came of it
rechecks = sa.Table(
    "rechecks",
    metadata,
    sa.Column("number", _COUNT, primary_key=True, autoincrement=True),
    sa.Column("bootstrap", sa.Text, nullable=False),
    sa.Column("workspace", sa.Text, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("task_id", sa.Text, nullable=False),
    sa.Column("at_ms", _MS, nullable=False),
    _text("outcome"),
    _text("first_node"),
    _text("second_node"),
    _text("third_node"),
    _text("second_task"),
    _text("third_task"),
    _text("loser"),
    sa.Index("ix_rechecks_workspace", "workspace", "number"),
    # few lose: the others cost this index nothing
    sa.Index(
        "ix_rechecks_loser",
        "loser",
        "number",
        sqlite_where=sa.text("loser <> ''"),
        postgresql_where=sa.text("loser <> ''"),
    ),
)

# tasks that wait to be run again elsewhere
waiting_rechecks = sa.Table(
    "waiting_rechecks",
    metadata,
    sa.Column("task_id", sa.Text, primary_key=True),
    sa.Column("bootstrap", sa.Text, nullable=False),
    sa.Column("workspace", sa.Text, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("at_ms", _MS, nullable=False),
    sa.Column("node", sa.Text, nullable=False),
    _text("ip"),
    _text("wallet"),
    _text("models"),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    sa.Column("request", sa.LargeBinary, nullable=False),
    sa.Index("ix_waiting_rechecks_bootstrap", "bootstrap", "at_ms"),
)

# what became of GPU challenges: the last few of each node
challenges = sa.Table(
    "challenges",
    metadata,
    sa.Column("number", _COUNT, primary_key=True, autoincrement=True),
    sa.Column("bootstrap", sa.Text, nullable=False),
    sa.Column("node", sa.Text, nullable=False),
    sa.Column("gpu", sa.LargeBinary, nullable=False),
    sa.Column("at_ms", _MS, nullable=False),
    _text("model"),
    _count("memory_bytes"),
    _text("finding"),
    _text("detail"),
    _count("product_ms"),
    _count("product_limit_ms"),
    _count("chains_ms"),
    _count("chains_limit_ms"),
    _text("task_id"),
    sa.Index("ix_challenges_node", "node", "number"),
)

# which bootstrap challenges a node now, and until when at most
challenge_claims = sa.Table(
    "challenge_claims",
    metadata,
    sa.Column("node", sa.Text, primary_key=True),
    sa.Column("bootstrap", sa.Text, nullable=False),
    sa.Column("until_ms", _MS, nullable=False),
)
