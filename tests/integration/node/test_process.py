"""The command `ngpu-node` as an owner runs it: its own process, its keystore, signals, and `kill -9`."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test
from typer.testing import CliRunner

from ngpu_daemon.datadir import DataDirectory
from ngpu_daemon.keystore import Kdf, write_keystore
from ngpu_daemon.settings import load_settings
from ngpu_node.cli import app
from ngpu_node.config import NodeSettings
from ngpu_protocol.http1 import Exchange, HttpError
from ngpu_protocol.receipts import Outcome
from tests.integration.node.rig import eventually
from tests.integration.node.scripted_bootstrap import a_bootstrap
from tests.integration.node.test_daemon import SPEC, a_workspace
from tests.unit.node.builders import NODE

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "ngpu_node.cli"]


def command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def prepared(folder: Path, *multiaddrs: str) -> Path:
    """Make a keystore and a configuration; return the latter."""
    directory = DataDirectory(folder / "data")
    directory.prepare()
    if not directory.keystore.exists():
        write_keystore(directory.keystore, NODE, "secret", Kdf.LIGHT)
    (folder / "passphrase").write_text("secret\n")
    (folder / "passphrase").chmod(0o600)
    config = folder / "node.toml"
    lines = [
        f"data_dir = {json.dumps(str(directory.path))}",
        f"passphrase_file = {json.dumps(str(folder / 'passphrase'))}",
        'network = "local"',
        'listen = ["/ip4/127.0.0.1/tcp/0"]',
        'model_listen = "127.0.0.1:0"',
        'engine = "none"',
        "drain_s = 3",
    ]
    for multiaddr in multiaddrs:
        lines += ["[[bootstraps]]", f"multiaddrs = [{json.dumps(multiaddr)}]", 'service = "acme"']
    config.write_text("\n".join(lines) + "\n")
    return config


class NodeProcess:
    def __init__(self, process: trio.Process, data_dir: Path) -> None:
        self.process = process
        self.data_dir = data_dir

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)


@asynccontextmanager
async def a_process(config: Path, **environment: str) -> AsyncIterator[NodeProcess]:
    """Run `ngpu-node run`; whatever happens it is gone at the end."""
    data_dir = config.parent / "data"
    (data_dir / "node.json").unlink(missing_ok=True)
    log = (config.parent / "log").open("ab")
    process = await trio.lowlevel.open_process(
        [*COMMAND, "run", "--config", str(config)], cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **environment}
    )
    try:
        await eventually((data_dir / "node.json").exists)
        yield NodeProcess(process, data_dir)
    finally:
        log.close()
        if process.returncode is None:
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def workspace(exchange: Exchange) -> None:
    """Answers at once, but to /hang never."""
    if exchange.request.target == "/hang":
        await trio.sleep_forever()
    await exchange.respond(200, [], await exchange.receive_all(10**6))


@trio_test
async def test_kill_9_in_the_middle_of_a_task_loses_no_receipt_of_a_finished_one(tmp_path: Path) -> None:
    async with a_bootstrap() as bootstrap:
        bootstrap.acknowledges = False
        config = prepared(tmp_path, bootstrap.multiaddr)
        finished = []
        async with a_process(config) as node, a_workspace(node, workspace):  # type: ignore[arg-type]
            await bootstrap.wish(SPEC)
            await bootstrap.until_ready()
            async with trio.open_nursery() as nursery:

                async def hang() -> None:
                    with pytest.raises(HttpError):
                        await bootstrap.ask(target="/hang")

                nursery.start_soon(hang)
                for number in range(20):
                    answer = await bootstrap.ask(b"%d" % number)
                    assert answer.receipt is not None
                    finished.append(answer.receipt)
                node.kill()
            await node.process.wait()
            sessions = {hello.session for hello in bootstrap.hellos}
            bootstrap.heartbeats.clear()
            async with a_process(config) as again:
                await eventually(lambda: len(bootstrap.offers) == 20)
                assert [receipt for _, receipt in bootstrap.offers] == finished
                assert bootstrap.hellos[-1].session not in sessions
                # the model server needs not register again, and the chain goes on
                await bootstrap.wish(SPEC)
                await bootstrap.until_ready()
                answer = await bootstrap.ask(b"next")
                assert answer.receipt is not None
                assert answer.receipt.receipt.sequence == 21
                # an order of before the crash is void
                old = bootstrap.order(session=next(iter(sessions)))
                refused = await bootstrap.send(old)
                assert refused.field("ngpu-refused") == "wrong_session"
                again.kill()


@trio_test
async def test_sigterm_ends_what_does_not_finish_in_time_with_a_receipt_and_exits_0(tmp_path: Path) -> None:
    async with a_bootstrap() as bootstrap:
        config = prepared(tmp_path, bootstrap.multiaddr)
        async with a_process(config) as node, a_workspace(node, workspace):  # type: ignore[arg-type]
            await bootstrap.wish(SPEC)
            await bootstrap.until_ready()
            outcomes: list[str] = []

            async def hang() -> None:
                answer = await bootstrap.ask(target="/hang")
                assert answer.receipt is not None
                assert (answer.status, answer.field("ngpu-error")) == (503, "node_stopping")
                outcomes.append(answer.receipt.receipt.outcome)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(hang)
                await trio.sleep(0.3)
                node.process.send_signal(signal.SIGTERM)
            with trio.fail_after(60):
                await node.process.wait()
            assert node.process.returncode == 0
            assert outcomes == [Outcome.NODE_STOPPING]
            assert not (node.data_dir / "admin.sock").exists()
            assert not (node.data_dir / "node.json").exists()


@trio_test
async def test_a_node_that_cannot_keep_receipts_stops_and_no_answer_without_one_looks_complete(tmp_path: Path) -> None:
    async with a_bootstrap() as bootstrap:
        config = prepared(tmp_path, bootstrap.multiaddr)
        finished = []
        async with a_process(config) as node, a_workspace(node, workspace):  # type: ignore[arg-type]
            await bootstrap.wish(SPEC)
            await bootstrap.until_ready()
            # a disk that is full, as far as this process can tell
            resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE, (300_000, 300_000))

            async def until_it_breaks() -> None:
                while len(finished) < 1000:
                    answer = await bootstrap.ask(b"x")
                    assert answer.receipt is not None
                    finished.append(answer.receipt)

            with pytest.raises(HttpError):
                await until_it_breaks()
            with trio.fail_after(60):
                await node.process.wait()
            assert node.process.returncode == 1
        bootstrap.acknowledges = False
        async with a_process(config) as again:
            await eventually(lambda: len(bootstrap.offers) >= len(finished))
            offered = [receipt for _, receipt in bootstrap.offers]
            assert offered[: len(finished)] == finished
            again.kill()


@trio_test
async def test_systemd_is_told_when_it_is_ready_and_that_it_lives(tmp_path: Path) -> None:
    told: list[str] = []
    address = str(tmp_path / "notify")
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM) as manager:
        await manager.bind(address)

        async def listen() -> None:
            while True:
                told.append((await manager.recv(1000)).decode())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            config = prepared(tmp_path)
            async with a_process(config, NOTIFY_SOCKET=address, WATCHDOG_USEC="1000000") as node:
                await eventually(lambda: "WATCHDOG=1" in told)
                assert told[0].startswith("READY=1")
                node.process.send_signal(signal.SIGTERM)
                with trio.fail_after(60):
                    await node.process.wait()
                await eventually(lambda: any(message.startswith("STOPPING=1") for message in told))
            nursery.cancel_scope.cancel()


def test_status_shows_the_running_node_and_says_when_there_is_none(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    nobody = command("status", "--config", config)
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert nobody.stderr.startswith("error: no daemon answers on ")
    assert len(nobody.stderr.splitlines()) == 1

    async def main() -> None:
        async with a_process(config):
            found = await trio.to_thread.run_sync(command, "status", "--config", str(config), "--json")
            assert json.loads(found.stdout)["node"] == NODE.address
            shown = await trio.to_thread.run_sync(command, "status", "--config", str(config))
            assert NODE.address in shown.stdout
            assert "no bootstraps" in shown.stdout
            second = await trio.to_thread.run_sync(command, "run", "--config", str(config))
            assert second.returncode == 1
            assert "in use" in second.stderr

    trio.run(main)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("slotz = 3", 'did you mean "slots"'),
        ('model_listen = "0.0.0.0:80"', "not a loopback address"),
        ('network = "Not A Name"', "network"),
        ('[[bootstraps]]\nmultiaddrs = ["127.0.0.1:80"]', "not a multiaddr"),
        ("slots = 0", "slots"),
    ],
)
def test_a_configuration_mistake_is_one_line_that_names_it(tmp_path: Path, line: str, words: str) -> None:
    config = tmp_path / "node.toml"
    config.write_text(line + "\n")
    found = CliRunner().invoke(app, ["run", "--config", str(config), "--data-dir", str(tmp_path / "data")])
    assert found.exit_code == 1
    assert words in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_a_wrong_passphrase_is_one_line_before_anything_listens(tmp_path: Path) -> None:
    config = prepared(tmp_path)
    (tmp_path / "passphrase").write_text("wrong\n")
    found = command("run", "--config", config)
    assert found.returncode == 1
    assert found.stderr.startswith("error: the passphrase does not open")
    assert len(found.stderr.splitlines()) == 1


def test_init_then_sample_config_make_a_node_that_can_be_configured(tmp_path: Path) -> None:
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("secret\n")
    passphrase.chmod(0o600)
    arguments = ["--data-dir", str(tmp_path / "data"), "--passphrase-file", str(passphrase), "--kdf", "light", "--json"]
    made = CliRunner().invoke(app, ["init", *arguments])
    assert json.loads(made.stdout)["peerId"].startswith("16Uiu2HA")
    sample = CliRunner().invoke(app, ["sample-config"])
    assert sample.exit_code == 0
    (tmp_path / "sample.toml").write_text(sample.stdout)
    assert load_settings(NodeSettings, tmp_path / "sample.toml") == NodeSettings()


def test_help_teaches_the_first_steps() -> None:
    found = CliRunner().invoke(app, ["--help"])
    assert found.exit_code == 0
    for word in ("init", "sample-config", "run", "status", "`bootstraps` names whom to serve"):
        assert word in " ".join(found.stdout.split())
