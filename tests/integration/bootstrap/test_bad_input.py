"""Bad input at the clients' listener: each gets its own status and words, and nothing secret is logged."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

from ngpu_daemon.logs import configure_logging
from tests.integration.bootstrap.rig import Bootstrap, running, settings_for, wait_ready
from tests.integration.bootstrap.scripted_node import ScriptedNode, connected, new_account


def run(tmp_path: Path, test: Any, **changes: Any) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account())
        async with (
            running(settings_for(tmp_path / "bootstrap", **changes)) as bootstrap,
            connected(node, bootstrap.multiaddr),
        ):
            await wait_ready(bootstrap)
            await test(bootstrap, node)

    trio.run(main)


JSON = [(b"content-type", b"application/json")]
UNKNOWN = "123456789-" + "a" * 48
# method, target, headers, body, token ("" is the workspace's, None is none), status, reason
CASES: list[tuple[str, str, list[tuple[bytes, bytes]], bytes, str | None, int, str]] = [
    ("POST", "/user/draw", JSON, b"{", "", 400, "malformed_json"),
    ("POST", "/user/draw", JSON, b"\xff\xfe", "", 400, "malformed_json"),
    ("POST", "/user/schedulingTask?paramUrl=x", JSON, b'{"data":', "", 400, "malformed_json"),
    ("POST", "/user/draw", [], b"{}", None, 401, "token_missing"),
    ("GET", "/proxy/8080/", [], b"", None, 401, "token_missing"),
    ("GET", "/proxy/8080/", [], b"", UNKNOWN, 401, "token_unknown"),
    ("GET", "/proxy/8080/", [(b"authorization", b"Basic dTpw")], b"", None, 401, "token_unknown"),
    ("GET", "/proxy/22/", [], b"", "", 404, "port_undeclared"),
    ("POST", "/user/schedulingTask?paramUrl=x&paramPort=22", [], b"", "", 404, "port_undeclared"),
    ("GET", "/proxy/x/", [], b"", "", 400, "bad_port"),
    ("GET", "/proxy/8080/../x", [], b"", "", 400, "path_climbs"),
    ("GET", "/proxy/8080/%2e%2e/x", [], b"", "", 400, "path_climbs"),
    ("GET", "/proxy/8080/a%2f..%2fx", [], b"", "", 400, "path_climbs"),
    ("GET", "/proxy/8080/..%5cx", [], b"", "", 400, "path_climbs"),
    ("GET", "/proxy/8080/..\\x", [], b"", "", 400, "path_climbs"),
    ("GET", "/proxy/8080/%252e%252e/x", [], b"", "", 400, "path_climbs"),
    ("POST", "/user/schedulingTask?paramUrl=a/..%2Fb", [], b"", "", 400, "path_climbs"),
    ("POST", "/user/schedulingTask?paramUrl=http://169.254.169.254/", [], b"", "", 400, "absolute_url"),
    ("POST", "/user/schedulingTask?paramUrl=%2F%2Fhost%2F", [], b"", "", 400, "absolute_url"),
    ("POST", "/user/schedulingTask", [], b"", "", 400, "param_url_missing"),
    ("POST", "/user/schedulingTask?paramUrl=a&paramUrl=b", [], b"", "", 400, "duplicate_parameter"),
    ("GET", "/user/queryTask?taskID=1&taskID=2", [], b"", None, 400, "duplicate_parameter"),
    ("GET", "/user/queryTask", [], b"", None, 400, "task_id_missing"),
    ("GET", "/user/queryTask?taskID=%25", [], b"", None, 400, "bad_task_id"),
    ("GET", "/user/queryTask?taskID=" + "1" * 5000, [], b"", None, 400, "bad_task_id"),
    ("GET", "/user/queryTask?taskID=" + "1" * 1_000_000, [], b"", None, 431, "head_too_large"),
    ("GET", "/user/queryTask?taskID=" + "1" * 20_000, [], b"", None, 414, "target_too_long"),
    ("GET", "/user/queryTaskList?startTime=yesterday", [], b"", "", 400, "bad_time"),
    ("GET", "/user/queryTaskList?startTime=2024-04-12&endTime=2024-04-11", [], b"", "", 400, "times_reversed"),
    ("GET", "/user/queryTaskList?limit=1&limit=2", [], b"", "", 400, "duplicate_parameter"),
    ("GET", "/user/queryTaskList?limit=0", [], b"", "", 400, "bad_limit"),
    ("GET", "/user/queryTaskList?limit=-5", [], b"", "", 400, "bad_limit"),
    ("GET", "/user/queryTaskList?cursor=zz", [], b"", "", 400, "bad_cursor"),
    ("GET", "/user/queryTaskList?cursor=" + "9" * 38 + "-1", [], b"", "", 400, "bad_cursor"),
    ("GET", "/user/queryTaskList?cursor=" + "9" * 20 + "-" + "9" * 18, [], b"", "", 400, "bad_cursor"),
    ("GET", "/user/getTasksFromNode", [], b"", "", 400, "node_missing"),
    ("GET", "/user/getTasksFromNode?nodeAddr=0x%25", [], b"", "", 400, "bad_node"),
    ("GET", "/user/queryNodes?endTime=2024-02-30", [], b"", "", 400, "bad_time"),
    ("GET", "/user/getDetailed", [], b"", "", 400, "task_id_missing"),
    ("GET", "/user/getDetailed?taskID=20261120%25", [], b"", "", 400, "bad_task_id"),
    ("GET", "/user/getDetailed?taskID=x&taskId=y", [], b"", "", 400, "duplicate_parameter"),
    ("GET", "/user/getDetailed?taskID=20261120_18_24_28_" + "0" * 20, [], b"", "", 404, "task_unknown"),
    ("GET", "/user/getDetailed?taskID=20261120_18_24_28_" + "0" * 20, [], b"", UNKNOWN, 401, "token_unknown"),
    ("DELETE", "/user/queryTaskList", [], b"", "", 405, "method_not_allowed"),
    ("GET", "/user/queryTask?taskID=20261120_18_24_28_" + "0" * 20, [], b"", None, 404, "task_unknown"),
    ("POST", "/user/nothing", [], b"", "", 404, "api_unknown"),
    ("POST", "/user/queryTask?taskID=1", [], b"", "", 405, "method_not_allowed"),
    ("PUT", "/user/draw", [], b"", "", 405, "method_not_allowed"),
    ("POST", "/user/draw", [], b"x" * 3000, "", 413, "body_too_large"),
    ("POST", "/proxy/8080/", [], b"x" * 200_000, "", 413, "body_too_large"),
    ("POST", "/api/v1/workspaces", JSON, b"x" * 200_000, None, 413, "body_too_large"),
    ("GET", "/proxy/8080/" + "a" * 9000, [], b"", "", 414, "target_too_long"),
    ("GET", "/nothing/here", [], b"", None, 404, "not_found"),
    ("POST", "/user/draw", [(b"idempotency-key", b"k" * 300)], b"", "", 400, "bad_idempotency_key"),
]


def test_each_bad_request_gets_its_own_status_and_words(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        for method, target, headers, body, token, status, reason in CASES:
            answer = await bootstrap.call(method, target, body, headers, token=token)
            where = f"{method} {target[:60]}"
            assert answer.status == status, where
            document = json.loads(answer.body)
            assert document["reason"] == reason, where
            message = document["msg"] if target.startswith("/user/") else document["message"]
            assert len(message) > 10, where
            if target.startswith("/user/"):
                assert document["result_code"] == status, where
            if status == 401:
                assert (answer.header(b"www-authenticate") or b"").startswith(b"Bearer"), where
        assert not node.orders
        # and the bootstrap is as well as before
        assert (await bootstrap.call("POST", "/proxy/8080/", b"fine")).body == b"fine"

    limits = {"request_body_bytes": 100_000, "task_body_bytes": 2_000, "api_body_bytes": 100_000}
    run(tmp_path, test, limits=limits)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /proxy/8080/ HTTP/1.1\r\nHost: x\r\nX-A: a\x00b\r\n\r\n",
        b"GET /proxy/8080/ HTTP/1.1\r\nHost: x\r\nX-A: a\x0bb\r\n\r\n",
        b"GET /proxy/8080/ HTTP/1.1\r\nHost: x\r\nX-A: a\rb\r\n\r\n",
        b"GET /proxy/8080/\x01 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /proxy/8080/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"GET /proxy/8080/ HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
)
def test_bytes_that_are_no_clean_http_are_refused_and_reach_nobody(tmp_path: Path, request_bytes: bytes) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        stream = await trio.open_tcp_stream("127.0.0.1", bootstrap.port)
        async with stream:
            await stream.send_all(request_bytes)
            with trio.fail_after(60):
                answered = await stream.receive_some(10_000)
        assert answered.startswith(b"HTTP/1.1 400 ")
        assert not node.orders

    run(tmp_path, test)


def test_another_workspaces_token_is_forbidden_and_no_token_needs_only_the_id(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        made = json.loads((await bootstrap.call("POST", "/user/draw", b"{}")).body)
        task_id = made["taskID"]
        other = await bootstrap.admin(
            "POST", "/api/v1/workspaces", {"name": "other", "service": "demo/echo", "ports": [1]}
        )
        for target in (
            f"/user/queryTask?taskID={task_id}",
            f"/api/v1/tasks/{task_id}",
            f"/api/v1/tasks/{task_id}/receipt",
        ):
            assert (await bootstrap.call("GET", target, token=None)).status == 200
            assert (await bootstrap.call("GET", target)).status == 200
            foreign = await bootstrap.call("GET", target, token=other["token"])
            assert (foreign.status, json.loads(foreign.body)["reason"]) == (403, "token_foreign")
            assert (await bootstrap.call("GET", target, token=UNKNOWN)).status == 401

        for attempt in (0, -1, 2**31, 2**70, "x"):
            answer = await bootstrap.call("GET", f"/api/v1/tasks/{task_id}/receipt?attempt={attempt}")
            assert answer.status == 422, attempt

    run(tmp_path, test)


def test_workspaces_are_managed_with_an_operator_key_only(tmp_path: Path) -> None:
    from ngpu_bootstrap.credentials import reveal
    from ngpu_bootstrap.operator_keys import OperatorKeys

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        keys = OperatorKeys(bootstrap.data_dir)
        key = reveal(keys.add("alice"))
        spec = {"name": "new", "image": "ngpu/new:1", "ports": [80], "replicas": 1}
        body = json.dumps(spec).encode()
        for token, status in ((None, 401), ("", 403), ("op_alice-" + "0" * 48, 401), (key, 201)):
            answer = await bootstrap.call("POST", "/api/v1/workspaces", body, JSON, token=token)
            assert answer.status == status
        created = json.loads(answer.body)
        made = created["workspace"]["spec"]["id"]
        assert created["token"].startswith(made + "-")
        listed = json.loads((await bootstrap.call("GET", "/api/v1/workspaces", token=key)).body)
        assert [one["spec"]["id"] for one in listed["workspaces"]] == [bootstrap.workspace, made]
        assert (await bootstrap.call("GET", f"/api/v1/workspaces/{made}", token=created["token"])).status == 200
        assert (await bootstrap.call("GET", f"/api/v1/workspaces/{made}")).status == 403
        called = await bootstrap.call("GET", "/proxy/80/", token=key)
        assert (called.status, json.loads(called.body)["reason"]) == (403, "operator_key")
        assert (await bootstrap.call("DELETE", f"/api/v1/workspaces/{made}", token=key)).status == 200
        assert (await bootstrap.call("GET", "/proxy/80/", token=created["token"])).status == 401
        assert (await bootstrap.call("DELETE", f"/api/v1/workspaces/{made}", token=key)).status == 404
        keys.remove("alice")
        assert (await bootstrap.call("GET", "/api/v1/workspaces", token=key)).status == 401

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("document", "status", "words"),
    [
        (b"{", 400, "JSON"),
        (b'{"name": "x", "image": "i", "ports": [0]}', 422, "ports"),
        (b'{"name": "x", "ports": [1]}', 422, "exactly one of image"),
        (b'{"name": "x", "image": "i", "ports": [1], "portz": 1}', 422, "portz"),
        (b'{"id": "5", "name": "x", "image": "i", "ports": [1]}', 422, "given by the bootstrap"),
        (b'{"name": "x", "image": "i", "ports": [1], "env": {"A": "se\\u0000cret"}}', 422, "NUL"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong_and_not_the_value(
    tmp_path: Path, document: bytes, status: int, words: str
) -> None:
    from ngpu_bootstrap.credentials import reveal
    from ngpu_bootstrap.operator_keys import OperatorKeys

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        key = reveal(OperatorKeys(bootstrap.data_dir).add("alice"))
        answer = await bootstrap.call("POST", "/api/v1/workspaces", document, JSON, token=key)
        assert answer.status == status
        assert words in json.loads(answer.body)["message"]
        assert b"cret" not in answer.body

    run(tmp_path, test)


def test_the_pages_for_people_and_monitors(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        await bootstrap.call("POST", "/proxy/8080/", b"x")
        health = await bootstrap.call("GET", "/health", token=None)
        assert (health.status, health.body) == (200, b'{"status":"ok"}')
        assert (await bootstrap.call("GET", "/ready", token=None)).status == 200
        page = await bootstrap.call("GET", "/docs", token=None)
        assert page.status == 200
        assert b"/api/v1/workspaces" in page.body
        assert b"http://" not in page.body.replace(b"http://127.0.0.1", b"")
        assert b"<script" not in page.body
        document = json.loads((await bootstrap.call("GET", "/openapi.json", token=None)).body)
        assert "/api/v1/tasks/{task_id}/receipt" in document["paths"]
        assert {"/user/schedulingTask", "/user/queryTaskList", "/brc20/checkAddress"} <= set(document["paths"])
        assert without_example(document) == []
        assert "`" not in page.body.decode().partition("<h1>Shapes</h1>")[0]
        metrics = (await bootstrap.call("GET", "/metrics", token=None)).body.decode()
        assert 'ngpu_tasks_total{api="proxy",state="finished"} 1.0' in metrics
        assert 'ngpu_verdicts_total{rule="",verdict="verified"} 1.0' in metrics
        assert "ngpu_peers 1.0" in metrics
        nodes = json.loads((await bootstrap.call("GET", "/api/v1/nodes", token=None)).body)["nodes"]
        assert [one["node_addr"] for one in nodes] == [node.account.address]

    run(tmp_path, test)


def without_example(document: Any) -> list[str]:
    """Return the JSON bodies and successful JSON answers in an OpenAPI document that show no example."""
    lacking = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            contents = {"body": operation.get("requestBody", {}).get("content", {})}
            contents |= {status: a.get("content", {}) for status, a in operation["responses"].items() if status < "3"}
            for where, content in contents.items():
                if "application/json" in content and "example" not in content["application/json"]:
                    lacking.append(f"{method} {path} {where}")
    return lacking


def test_metrics_behind_a_proxy_need_an_operator_key(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        assert (await bootstrap.call("GET", "/metrics", token=None)).status == 401

    run(tmp_path, test, behind_proxy=True)


def test_nothing_secret_is_logged(tmp_path: Path) -> None:
    out = io.StringIO()
    before = structlog.get_config()
    configure_logging("debug", "json", stream=out)

    async def test(bootstrap: Bootstrap, node: ScriptedNode) -> None:
        secret = bootstrap.token.partition("-")[2]
        for token in (f"ngpu_{bootstrap.token}", bootstrap.token):
            await bootstrap.call("POST", "/proxy/8080/own?own=mysecretquery", b"mysecretbody", token=token)
        await bootstrap.call("GET", f"/proxy/8080/?ngpu_token={bootstrap.token}", token=None)
        await bootstrap.call("GET", f"/proxy/22/?ngpu_token={bootstrap.token}", token=None)
        await bootstrap.call("GET", "/proxy/8080/", token=f"{bootstrap.workspace}-{'f' * 48}")
        await bootstrap.call("POST", "/user/draw", b'{"data": "mysecretbody"}')
        await bootstrap.call("POST", "/user/draw", b'{"data": "mysecretbody', JSON)
        task_id = node.orders[0].order.task_id
        view = await bootstrap.admin("GET", f"/api/v1/tasks/{task_id}")
        for text in (out.getvalue(), json.dumps(view)):
            assert secret not in text
            assert "f" * 48 not in text
            assert "mysecretbody" not in text
        assert "attempt" in out.getvalue()
        for order in node.orders:
            assert secret not in order.order.target
        assert secret.encode() not in (bootstrap.data_dir / "bootstrap.db-wal").read_bytes()

    try:
        run(tmp_path, test)
    finally:
        structlog.configure(**before)
