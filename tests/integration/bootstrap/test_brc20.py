"""BRC-20 over HTTP, against local indexers that answer in the two published formats, whole and broken."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import trio
from typer.testing import CliRunner

from ngpu_bootstrap.cli import app
from ngpu_protocol.http1 import Exchange, header, serve_tcp
from tests.integration.bootstrap.rig import Bootstrap, running, settings_for, task_when, wait_ready
from tests.integration.bootstrap.scripted_node import ScriptedNode, connected, new_account

JSON = [(b"content-type", b"application/json")]
RICH = "bc1pp8vyhh2ma0ntzjwr26xxrn5r0w296yu68wdwle5rrhgtv3a2lgkqtyayus"
POOR = "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa"
HELD: dict[str, dict[str, str]] = {RICH: {"AINN": "100.9", "ordi": "0.5", "zero": "0"}, POOR: {}}


class StubIndexer:
    """Answers as UniSat and as Hiro do, one balance a page, unless told to be broken."""

    def __init__(self) -> None:
        self.broken: bytes | int | None = None
        self.keys: list[str] = []
        self.asked = 0

    async def handle(self, exchange: Exchange) -> None:
        self.asked += 1
        request = exchange.request
        parameters = {name: int(values[0]) for name, values in parse_qs(request.query or "").items()}
        if isinstance(self.broken, int):
            await exchange.respond_json(self.broken, {"error": "broken"})
            return
        if self.broken is not None:
            await exchange.respond(200, [(b"content-type", b"application/json")], self.broken)
            return
        parts = request.path.split("/")
        if request.path.startswith("/v1/indexer/address/"):
            self.keys.append((header(request.headers, b"authorization") or b"").decode())
            rows = [
                {"ticker": ticker, "overallBalance": amount, "transferableBalance": "0", "availableBalance": amount}
                for ticker, amount in HELD[parts[4]].items()
            ]
            page = rows[parameters["start"] :][:1]
            data = {"height": 1, "start": parameters["start"], "total": len(rows), "detail": page}
            await exchange.respond_json(200, {"code": 0, "msg": "ok", "data": data})
        else:
            assert request.path.startswith("/ordinals/v1/brc-20/balances/")
            self.keys.append((header(request.headers, b"x-api-key") or b"").decode())
            rows = [
                {"ticker": t, "available_balance": a, "transferrable_balance": "0.0", "overall_balance": a}
                for t, a in HELD[parts[5]].items()
            ]
            page = rows[parameters["offset"] :][:1]
            answer = {"limit": 60, "offset": parameters["offset"], "total": len(rows), "results": page}
            await exchange.respond_json(200, answer)


@asynccontextmanager
async def indexing() -> AsyncIterator[tuple[StubIndexer, str]]:
    stub = StubIndexer()
    async with trio.open_nursery() as nursery:
        bound = await nursery.start(functools.partial(serve_tcp, stub.handle, host="127.0.0.1"))
        yield stub, f"http://{bound[0]}"
        nursery.cancel_scope.cancel()


def run(tmp_path: Path, test: Any, **section: Any) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account())
        async with indexing() as (stub, url):
            brc20 = {"url": url, "cache_s": 0.0, "timeout_s": 2.0} | section if section else {}
            async with (
                running(settings_for(tmp_path / "bootstrap", brc20=brc20)) as bootstrap,
                connected(node, bootstrap.multiaddr),
            ):
                await wait_ready(bootstrap)
                await test(bootstrap, stub)

    trio.run(main)


async def checked(bootstrap: Bootstrap, query: str, status: int = 200) -> dict[str, Any]:
    answer = await bootstrap.call("GET", f"/brc20/checkAddress{query}", token=None)
    document: dict[str, Any] = json.loads(answer.body)
    assert answer.status == status, document
    return document


@pytest.mark.parametrize(("indexer", "key"), [("unisat", "Bearer k3y"), ("hiro", "k3y")])
def test_an_address_is_checked_as_the_documents_have_it(tmp_path: Path, indexer: str, key: str) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("k3y\n")
    key_file.chmod(0o600)

    async def test(bootstrap: Bootstrap, stub: StubIndexer) -> None:
        rich = {"exists": True, "names": ["AINN", "ordi"], "balances": [100, 0], "amounts": ["100.9", "0.5"]}
        assert await checked(bootstrap, f"?address={RICH}") == rich
        assert await checked(bootstrap, f"&address={RICH}") == rich
        assert (await checked(bootstrap, f"?address={RICH}&ticker=ORDI"))["exists"] is True
        assert (await checked(bootstrap, f"?address={RICH}&ticker=sats"))["exists"] is False
        none = {"exists": False, "names": [], "balances": [], "amounts": []}
        assert await checked(bootstrap, f"?address={POOR}") == none
        assert set(stub.keys) == {key}

    run(tmp_path, test, indexer=indexer, key_file=key_file)


def test_bad_addresses_and_methods_say_what_is_wrong(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, stub: StubIndexer) -> None:
        for query, reason in (
            ("", "btc_address_missing"),
            ("?address=", "btc_address_missing"),
            ("?address=bc1qnope", "bad_btc_address"),
            ("?address=%00", "bad_btc_address"),
            ("?address=" + "1" * 5000, "bad_btc_address"),
            ("?address=mipcBbFg9gMiCh81Kj8tqqdgoZub1ZJRfn", "wrong_btc_network"),
            (f"?address={RICH}&address={POOR}", "duplicate_parameter"),
            (f"?address={RICH}&ticker={'x' * 99}", "bad_ticker"),
        ):
            document = await checked(bootstrap, query, 400)
            assert (document["result_code"], document["reason"]) == (400, reason)
            assert len(document["msg"]) > 10
        assert (await bootstrap.call("POST", "/brc20/checkAddress", token=None)).status == 405
        assert (await bootstrap.call("GET", "/brc20/other", token=None)).status == 404
        assert stub.asked == 0

    run(tmp_path, test, indexer="hiro")


@pytest.mark.parametrize("indexer", ["unisat", "hiro"])
def test_an_indexer_that_is_down_or_answers_nonsense_is_said_to_be(tmp_path: Path, indexer: str) -> None:
    broken: list[bytes | int] = [
        500,
        401,
        302,
        b"<html>",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"code": -1, "msg": "no"}',
        b'{"code": 0, "data": {"total": 1, "detail": [{"ticker": "a"}]}, "total": 1, "results": [{"ticker": "a"}]}',
        b'{"code": 0, "data": {"total": 1, "detail": [{"ticker": "a", "overallBalance": "NaN"}]},'
        b' "total": 1, "results": [{"ticker": "a", "overall_balance": "1e999"}]}',
        b" " * 2_000_000,
    ]

    async def test(bootstrap: Bootstrap, stub: StubIndexer) -> None:
        for answer in broken:
            stub.broken = answer
            document = await checked(bootstrap, f"?address={RICH}", 503)
            assert (document["result_code"], document["reason"]) == (503, "indexer_unavailable"), answer
        stub.broken = None
        assert (await checked(bootstrap, f"?address={RICH}"))["exists"] is True

    run(tmp_path, test, indexer=indexer)


def test_without_an_indexer_the_answer_says_so_and_tasks_run(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, stub: StubIndexer) -> None:
        assert (await checked(bootstrap, f"?address={RICH}", 503))["reason"] == "indexer_unconfigured"
        body = json.dumps({"btc_address": RICH, "data": "x"}).encode()
        assert (await bootstrap.call("POST", "/user/draw", body, JSON)).status == 200
        assert stub.asked == 0

    run(tmp_path, test)


def test_a_client_checks_so_many_a_minute(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, stub: StubIndexer) -> None:
        for _ in range(2):
            await checked(bootstrap, f"?address={RICH}")
        assert (await checked(bootstrap, f"?address={RICH}", 429))["reason"] == "too_many_checks"

    run(tmp_path, test, indexer="hiro", checks_per_minute=2)


def test_a_workspaces_policy_is_applied_when_a_task_is_submitted(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, stub: StubIndexer) -> None:
        policy = f"/api/v1/workspaces/{bootstrap.workspace}/brc20"

        async def submit(address: str | None) -> tuple[int, dict[str, Any]]:
            body = {"data": "x"} | ({"btc_address": address} if address is not None else {})
            answer = await bootstrap.call("POST", "/user/schedulingTask?paramUrl=draw", json.dumps(body).encode(), JSON)
            return answer.status, json.loads(answer.body)

        async def noted(task_id: str) -> Any:
            await task_when(bootstrap, task_id, lambda view: view["state"] == 3)
            with trio.fail_after(60):
                while True:
                    answer = await bootstrap.call("GET", f"/user/getDetailed?taskID={task_id}")
                    if (found := json.loads(answer.body)["taskInfo"]["brc20"]) is not None:
                        return found
                    await trio.sleep(0.02)

        # record is what counts where nobody said otherwise
        assert json.loads((await bootstrap.call("GET", policy)).body)["mode"] == "record"
        status, accepted = await submit(RICH)
        found = await noted(accepted["taskID"])
        assert (status, found["ticker"], found["amount"]) == (200, "AINN", "100.9")
        status, accepted = await submit("not an address")
        assert (await noted(accepted["taskID"]))["problem"] == "bad_btc_address"
        # require: the address, what it holds, and somebody who can say
        wanted = b'{"mode": "require", "ticker": "AINN", "minimum": "100.9"}'
        assert (await bootstrap.call("PUT", policy, wanted, JSON)).status == 200
        assert (await submit(RICH))[0] == 200
        for address, status, reason in (
            (None, 403, "btc_address_missing"),
            (POOR, 403, "brc20_insufficient"),
            ("not an address", 400, "bad_btc_address"),
        ):
            code, document = await submit(address)
            assert (code, document["result_code"], document["reason"]) == (status, status, reason)
        stub.broken = 500
        assert (await submit(RICH))[1]["reason"] == "indexer_unavailable"
        stub.broken = None
        # the transparent form is no way around it
        assert (await bootstrap.call("POST", "/proxy/8080/", b"x")).status == 403
        with_address = await bootstrap.call("POST", "/proxy/8080/", b"x", [(b"btcaddress", RICH.encode())])
        assert with_address.status == 200
        # ignore asks nobody
        await bootstrap.call("PUT", policy, b'{"mode": "ignore"}', JSON)
        before = stub.asked
        assert (await submit("whatever"))[0] == 200
        assert stub.asked == before
        for wrong in (b'{"mode": "must"}', b'{"minimum": "-1"}', b'{"minimum": "x"}', b'{"tick": "a"}'):
            assert (await bootstrap.call("PUT", policy, wrong, JSON)).status == 422

    run(tmp_path, test, indexer="unisat")


def test_a_policy_is_set_on_the_command_line_with_a_daemon_and_without(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "bootstrap")
    store = tmp_path / "bootstrap"

    def command(*arguments: str) -> Any:
        environment = {"NGPU_BOOTSTRAP_NETWORK": "local"}
        return CliRunner().invoke(app, ["brc20", *arguments, "--data-dir", str(store)], env=environment)

    async def main() -> str:
        async with running(settings) as bootstrap:
            wanted = ["set", bootstrap.workspace, "require", "--ticker", "ordi", "--minimum", "0.50", "--json"]
            made = await trio.to_thread.run_sync(command, *wanted)
            assert json.loads(made.stdout) == {"mode": "require", "ticker": "ordi", "minimum": "0.5"}
            refused = await bootstrap.call("POST", "/user/draw", b'{"data": "x"}', JSON)
            assert (refused.status, json.loads(refused.body)["reason"]) == (403, "btc_address_missing")
            return bootstrap.workspace

    workspace = trio.run(main)
    assert command("show", workspace).stdout == "require: 0.5 of ordi\n"
    assert command("set", workspace, "ignore").stdout == "ignore\n"
    assert command("show", workspace).stdout == "ignore\n"
    for arguments, words in (
        (("set", workspace, "auction"), "not a policy: mode"),
        (("set", workspace, "require", "--minimum", "much"), "write a decimal"),
        (("show", "12"), "there is no workspace 12"),
    ):
        said = command(*arguments)
        assert said.exit_code == 1
        assert words in said.stderr
        assert "Traceback" not in said.stderr
