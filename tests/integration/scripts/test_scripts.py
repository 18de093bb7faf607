"""``scripts/verify-receipt`` and ``scripts/peers`` as their users run them."""

import hashlib
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from ngpu_protocol.acknowledgements import Acknowledgement, sign_acknowledgement
from ngpu_protocol.identity import Account
from ngpu_protocol.networks import network_named
from ngpu_protocol.orders import TaskOrder, sign_order
from ngpu_protocol.receipt_file import ReceiptFile
from ngpu_protocol.receipts import FIRST_PREVIOUS, TaskReceipt, sign_receipt

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
CHAIN_ID = network_named("local").chain_id
NODE, BOOTSTRAP = (Account.from_key(bytes([number]) * 32) for number in (1, 2))
REQUEST, RESPONSE = b"What is a receipt?", b"A signed word."


def run(script: str, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments],
        input=stdin, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def receipt_file(**changes: Any) -> ReceiptFile:
    order = TaskOrder(
        task_id="20261121_03_41_47_01234567890123456789", attempt=1, bootstrap=BOOTSTRAP.address, node=NODE.address,
        session=bytes(32), workspace="100000000000000001", revision=1, port=8000, method="POST", target="/echo",
        detach=False, issued_at_ms=1_000_000, deadline_ms=1_100_000,
    )  # fmt: skip
    fields: dict[str, Any] = {
        "order_hash": order.digest(CHAIN_ID), "node": NODE.address, "bootstrap": BOOTSTRAP.address, "sequence": 1,
        "previous": FIRST_PREVIOUS, "image_digest": bytes(32), "request_hash": hashlib.sha256(REQUEST).digest(),
        "request_bytes": len(REQUEST), "status": 200, "response_hash": hashlib.sha256(RESPONSE).digest(),
        "response_bytes": len(RESPONSE), "outcome": "complete", "started_at_ms": 1_000_010, "ended_at_ms": 1_000_060,
        "duration_ms": 50, "gpus": (), "reserved_gpu_ms": 0, "busy_gpu_ms": 0, "meter": "none",
    }  # fmt: skip
    receipt = TaskReceipt(**{**fields, **changes})
    acknowledgement = Acknowledgement(
        receipt_hash=receipt.digest(CHAIN_ID), node=NODE.address, bootstrap=BOOTSTRAP.address,
        sequence=receipt.sequence, verdict="verified", reason="", at_ms=1_000_100,
    )  # fmt: skip
    return ReceiptFile(
        sign_order(order, BOOTSTRAP, CHAIN_ID),
        sign_receipt(receipt, NODE, CHAIN_ID),
        sign_acknowledgement(acknowledgement, BOOTSTRAP, CHAIN_ID),
        CHAIN_ID,
    )


def test_a_good_receipt_holds_every_rule(tmp_path: Path) -> None:
    file = tmp_path / "receipt.json"
    file.write_text(receipt_file().to_json())
    shown = run("verify_receipt.py", str(file))
    assert shown.returncode == 0, shown.stderr
    assert "every rule holds" in shown.stdout
    assert NODE.address in shown.stdout
    as_json = json.loads(run("verify_receipt.py", "-", "--json", stdin=file.read_text()).stdout)
    assert as_json["ok"] is True
    assert all(rule["holds"] for rule in as_json["rules"])


def test_the_broken_rule_is_named(tmp_path: Path) -> None:
    document = receipt_file().to_document()
    document["receipt"]["responseBytes"] += 1
    file = tmp_path / "receipt.json"
    file.write_text(json.dumps(document))
    shown = run("verify_receipt.py", str(file))
    assert shown.returncode == 1
    assert "broken: signer" in shown.stdout
    file.write_text(receipt_file(busy_gpu_ms=5).to_json())
    assert "broken: busy" in run("verify_receipt.py", str(file)).stdout


def test_bodies_and_the_receipt_before_are_judged_when_given(tmp_path: Path) -> None:
    first, second = receipt_file(), receipt_file(sequence=2, previous=bytes(32))
    for name, content in (
        ("first.json", first.to_json().encode()),
        ("second.json", second.to_json().encode()),
        ("request", REQUEST),
        ("response", RESPONSE + b"!"),
    ):
        (tmp_path / name).write_bytes(content)
    bodies = ("--request-body", str(tmp_path / "request"), "--response-body", str(tmp_path / "response"))
    shown = json.loads(run("verify_receipt.py", str(tmp_path / "first.json"), "--json", *bodies).stdout)
    broken = [rule["rule"] for rule in shown["rules"] if not rule["holds"]]
    assert "response_bytes" in broken
    assert "request_hash" not in broken
    chained = run("verify_receipt.py", str(tmp_path / "second.json"), "--previous", str(tmp_path / "first.json"))
    assert "broken: chain" in chained.stdout


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "ngpu-receipt", "version": 9}'])
def test_what_is_no_receipt_file_is_one_line_and_exit_2(content: str) -> None:
    shown = run("verify_receipt.py", "-", stdin=content)
    assert shown.returncode == 2
    assert shown.stderr.startswith("error: ")
    assert len(shown.stderr.splitlines()) == 1


class _Bootstrap(BaseHTTPRequestHandler):
    nodes: list[dict[str, Any]]

    def do_GET(self) -> None:
        body = json.dumps({"nodes": self.nodes}).encode()
        self.send_response(200 if self.path == "/api/v1/nodes" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def bootstrap() -> Iterator[str]:
    _Bootstrap.nodes = [
        {
            "node_addr": NODE.address, "peer_id": NODE.peer_id, "software": "ngpu-node/0.1.0", "admitted": True,
            "draining": False, "connected_at_ms": 0, "heard_at_ms": 0, "slots": 8, "slots_free": 7, "running": 1,
            "gpus": [{"id": "0x00", "model": "NVIDIA GeForce RTX 4090", "memory_bytes": 24 * 2**30}],
            "services": [{"project": "acme", "model": "llama", "type": "text-to-text", "copies": 2}],
            "deployments": [], "state": "serving", "region": "eu-central", "round_trip_ms": 1.5, "failure_rate": 0.0,
            "tried_again_at_ms": None,
            "standing": {"score": 0.5, "verified": 12, "disputed": 1},
        }
    ]  # fmt: skip
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Bootstrap)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_peers_shows_who_is_connected_and_what_they_offer(bootstrap: str) -> None:
    shown = run("peers.py", "--url", bootstrap)
    assert shown.returncode == 0, shown.stderr
    for part in (
        NODE.address,
        "1 of 8",
        "1.5 ms",
        "eu-central",
        "12 verified",
        "RTX 4090, 24 GiB",
        "acme/llama x2",
        "serving",
    ):
        assert part in shown.stdout
    assert json.loads(run("peers.py", "--url", bootstrap, "--json").stdout) == {"nodes": _Bootstrap.nodes}
    _Bootstrap.nodes = []
    assert run("peers.py", "--url", bootstrap).stdout == "no node is connected\n"


def test_peers_without_a_bootstrap_is_one_line_and_exit_1() -> None:
    shown = run("peers.py", "--url", "http://127.0.0.1:1")
    assert shown.returncode == 1
    assert shown.stderr.startswith("error: no bootstrap answers")
    assert len(shown.stderr.splitlines()) == 1


def test_peers_that_watches_looks_for_a_bootstrap_that_went_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("peers", SCRIPTS / "peers.py")
    assert spec is not None
    assert spec.loader is not None
    peers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peers)
    answers = iter([True, False, False, True])

    def answer(request: httpx.Request) -> httpx.Response:
        if not next(answers):
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json={"nodes": []})

    looks = iter(range(4))

    def sleep(seconds: float) -> None:
        if next(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(peers.time, "sleep", sleep)
    monkeypatch.setattr(sys, "argv", ["peers", "--watch", "--json"])
    whole = httpx.Client
    monkeypatch.setattr(peers.httpx, "Client", lambda **of: whole(transport=httpx.MockTransport(answer), **of))
    assert peers.main() == 0
    shown = capsys.readouterr()
    assert shown.out == '{"nodes": []}\n' * 2
    assert [line.partition(" ")[0] for line in shown.err.splitlines()] == ["no", "it"]
    assert "looking again every 2 s" in shown.err


def test_peers_whose_reader_has_enough_ends_quietly(bootstrap: str) -> None:
    _Bootstrap.nodes = _Bootstrap.nodes[:0]
    command = f"{sys.executable} {SCRIPTS / 'peers.py'} --url {bootstrap} --watch --json | head -n 1"
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (shown.stdout, shown.stderr) == ('{"nodes": []}\n', "")
