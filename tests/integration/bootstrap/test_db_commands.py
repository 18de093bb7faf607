"""`ngpu-bootstrap db`: upgrading, checking, exporting, on both kinds of database."""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trio
from typer.testing import CliRunner

from ngpu_bootstrap.cli import app
from ngpu_bootstrap.config import BootstrapSettings
from ngpu_bootstrap.db_commands import Database
from ngpu_bootstrap.store.schema import HEAD
from ngpu_bootstrap.store.store import open_store
from tests.support.postgres import new_database
from tests.unit.store.builders import BOOTSTRAP, a_finish, a_receipt, a_start, a_task, a_workspace

RELEASED = Path(__file__).parents[1] / "store" / "released"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.needs_postgres)])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BootstrapSettings]:
    data_dir = tmp_path / "data"
    data_dir.mkdir(mode=0o700)
    if request.param == "sqlite":
        yield BootstrapSettings(data_dir=data_dir, network="local")
        return
    with new_database() as url:
        yield BootstrapSettings(data_dir=data_dir, network="local", store=url)


def fill(settings: BootstrapSettings) -> None:
    async def main() -> None:
        location = settings.store or settings.data_dir / "bootstrap.db"
        bodies = settings.data_dir / "bodies"
        async with open_store(location, network="local", bootstrap=BOOTSTRAP, bodies=bodies) as store:
            await store.add_workspace(a_workspace())
            await store.accept_and_begin(a_task(1, request=b"x" * 100_000), a_start(1))
            await store.finish(a_finish(1, a_receipt(1)))
            await store.accept(a_task(2))

    trio.run(main)


def test_a_database_is_made_checked_and_written_out(settings: BootstrapSettings) -> None:
    database = Database(settings)
    assert database.upgrade() == (None, HEAD)
    assert database.upgrade() == (HEAD, HEAD)
    fill(settings)
    found = database.check()
    assert found["problems"] == []
    assert (found["tasks"], found["receipts"]) == ({"accepted": 1, "finished": 1}, 1)
    out = io.StringIO()
    rows = database.export(out)
    head, *lines = (json.loads(line) for line in out.getvalue().splitlines())
    assert (head["schema"], len(lines)) == (HEAD, rows)
    tables = [line["table"] for line in lines]
    assert {"tasks", "bodies", "receipts", "workspaces"} <= set(tables)
    assert tables.index("tasks") < tables.index("bodies")  # whoever reads it in finds what a row refers to
    [long] = [line["row"] for line in lines if line["table"] == "bodies" and line["row"]["part"] == "request"]
    assert (long["size"], long["path"], len(long["content"]["base64"])) == (100_000, "", 133_336)


def test_what_is_missing_is_named(settings: BootstrapSettings) -> None:
    fill(settings)
    for file in (settings.data_dir / "bodies").glob("*/*"):
        file.unlink()
    [problem] = Database(settings).check()["problems"]
    assert problem.startswith("1 bodies are missing")
    other = settings.model_copy(update={"network": "main"})
    assert any("belongs to network 'local'" in problem for problem in Database(other).check()["problems"])


def test_an_old_file_is_upgraded_by_the_command(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir(mode=0o700)
    with closing(sqlite3.connect(data_dir / "bootstrap.db")) as connection:
        connection.executescript((RELEASED / "0001.sql").read_text())
    config = tmp_path / "config.toml"
    config.write_text(f'data_dir = {json.dumps(str(data_dir))}\nnetwork = "local"\n')
    run = CliRunner()
    checked = run.invoke(app, ["db", "check", "--config", str(config), "--json"])
    assert checked.exit_code == 1
    assert "db upgrade" in json.loads(checked.stdout)["problems"][0]
    upgraded = run.invoke(app, ["db", "upgrade", "--config", str(config), "--json"])
    assert json.loads(upgraded.stdout) == {"before": "0001", "now": HEAD}
    assert run.invoke(app, ["db", "check", "--config", str(config)]).exit_code == 0
    out = tmp_path / "export.jsonl"
    assert run.invoke(app, ["db", "export", "--config", str(config), "--out", str(out)]).exit_code == 0
    assert out.stat().st_mode & 0o777 == 0o600
