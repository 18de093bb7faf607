"""The bootstrap's memory: workspaces, tasks with attempts and bodies, receipts with their chains, nodes.

``store`` is the way in (class Store), ``records`` are the values that go in and out, ``errors`` what can go wrong.
Inside: ``operations`` turns a record into statements, ``handoff`` carries it to the one writing thread,
``group_commit`` makes batches durable, ``readers`` and ``queries`` answer questions, ``bodies`` keeps what is too long
for a row, ``chains`` knows a node's receipts, ``tables`` and ``migrations`` the schema, ``schema`` brings a database up
to date, ``database`` is the seam between SQLite and PostgreSQL.
"""
