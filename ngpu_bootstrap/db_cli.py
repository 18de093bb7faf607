"""The commands `ngpu-bootstrap db ...`: see `db_commands` for what they do."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ngpu_bootstrap.cli_options import ConfigOption, DataDirOption, JsonOption, settings_of
from ngpu_daemon.entry import run_main

db_app = typer.Typer(help="The database: bring it up to date, check it, write it out.", no_args_is_help=True)


@db_app.command("upgrade")
def db_upgrade(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Bring the database to this version's schema, with its data in place. A daemon does it itself on SQLite."""

    def main() -> None:
        before, now = _database(config, data_dir).upgrade()
        if as_json:
            typer.echo(json.dumps({"before": before, "now": now}))
        elif before == now:
            typer.echo(f"the schema is at {now} already")
        else:
            typer.echo(f"the schema was at {before or 'nothing'} and is at {now}")

    run_main(main)


@db_app.command("check")
def db_check(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Look whether the database is whole; exit code 1 and the reasons when it is not."""

    def main() -> int:
        found = _database(config, data_dir).check()
        if as_json:
            typer.echo(json.dumps(found))
        else:
            for key in ("kind", "schema", "bootstraps", "receipts", "bodies"):
                typer.echo(f"{key:<12}{found.get(key, '')}")
            for state, count in found.get("tasks", {}).items():
                typer.echo(f"{state:<12}{count}")
            typer.echo("\n".join(found["problems"]) or "nothing is wrong with it")
        return 1 if found["problems"] else 0

    run_main(main)


@db_app.command("export")
def db_export(
    out: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Write everything as JSON, one row a line, while the daemon runs or not: clients' requests and answers as well."""

    def main() -> None:
        database = _database(config, data_dir)
        if out is None:
            database.export(sys.stdout)
            return
        with open(os.open(out, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
            rows = database.export(file)
        typer.echo(f"{rows} rows in {out}")

    run_main(main)


def _database(config: Path | None, data_dir: Path | None) -> Any:
    from ngpu_bootstrap.db_commands import Database  # loaded here: other commands need no database

    return Database(settings_of(config, data_dir=data_dir))
