"""One model on two nodes, each with a true model server beside it: found, spread, killed, withdrawn, remembered."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import trio

from ngpu_node.admin import ask
from tests.integration.profiles.rig import listed, receipt_of, register
from tests.integration.whole_path.rig import Daemon, Network, free_port, network
from tests.integration.whole_path.workspace import Workspace

ROOT = Path(__file__).parents[3]
MODEL = [("examples", "ngram", 0)]
CHAT = {"model": "ngram", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}
# a server is looked at every 5 s, and at once when a call was not answered; the rest is for a loaded machine
WITHDRAWN_WITHIN_S = 20.0


@contextmanager
def chat_server(delay_ms: int = 1) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run examples/chat as a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "ngram_chat", "serve", "--port", str(port), "--texts", str(ROOT / "README.md")]
    process = subprocess.Popen([*command, "--token-delay-ms", str(delay_ms)], cwd=ROOT / "examples" / "chat")
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


async def command(node: Daemon, *arguments: str) -> str:
    """Return what a command of the node's owner prints."""
    line = [sys.executable, "-m", "ngpu_node.cli", *arguments, "--config", str(node.folder / "config.toml")]
    return (await trio.run_process(line, cwd=ROOT, capture_stdout=True)).stdout.decode()


async def shown(node: Daemon) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = json.loads(await ask(node.folder / "data" / "admin.sock", "/models"))["models"]
    return models


async def names_listed(net: Network) -> list[str]:
    return [one["id"] for one in (await net.call("GET", "/v1/models")).document["data"]]


async def found_by_a_third(net: Network) -> list[str]:
    """Return the nodes a peer without any part in the network finds to serve the model."""
    at = ("--peer", net.bootstrap.where["multiaddrs"][0], "--network", "local")
    line = [sys.executable, str(ROOT / "scripts" / "dht.py"), "find", "model:examples/ngram", *at]
    done = await trio.run_process(
        line,
        cwd=ROOT,
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return sorted(one.split()[0] for one in done.stdout.decode().splitlines() if one.startswith("0x"))


@pytest.mark.timeout_s(300)
def test_a_model_on_two_nodes(tmp_path: Path) -> None:
    with chat_server() as one, chat_server(delay_ms=100) as two:
        trio.run(main, tmp_path, one, two)


async def main(
    tmp_path: Path, one: tuple[subprocess.Popen[bytes], int], two: tuple[subprocess.Popen[bytes], int]
) -> None:
    with trio.fail_after(280):
        async with network(tmp_path, Workspace(), nodes=2, bootstrap_lines=("[models]", "concurrency = 2")) as net:
            for node, (_, port) in zip(net.nodes, (one, two), strict=True):
                await register(node, port, MODEL)
            assert [entry["id"] for entry in await listed(net, "ngram")].count("ngram") == 1
            await said_by_the_owners_commands(net.nodes[0], one[1])
            await calls_are_spread(net)
            await found_in_the_dht(net)
            await one_dies_amid_a_stream(net, two[0])
            await registrations_outlive_the_node(net, one[0])


async def said_by_the_owners_commands(node: Daemon, port: int) -> None:
    (entry,) = [one for one in await shown(node) if one["model"] == "ngram"]
    assert (entry["healthy"], entry["type"], entry["running"]) == (True, "text-to-text", 0)
    assert entry["api"] == f"http://127.0.0.1:{port}/v1/chat/completions"
    assert json.loads(await command(node, "models", "--json"))["models"] == await shown(node)
    assert "healthy" in await command(node, "models")
    # what a running node has open: the owner's socket is his alone, the loopback port is nobody's web page's
    mode = (node.folder / "data" / "admin.sock").stat().st_mode
    assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o600)
    url = node.where["models"]
    assert url.startswith("http://127.0.0.1:")
    async with httpx.AsyncClient(base_url=url, trust_env=False) as program:
        assert (await program.get("/api/v0/id")).json()["peer_id"] == node.where["peer_id"]
        for fields in ({"host": "evil.example"}, {"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
            for method, path in (("GET", "/api/v0/id"), ("POST", "/api/v0/ai/project/unregister")):
                refused = await program.request(method, path, headers=fields, json={"project": "examples"})
                assert (refused.status_code, refused.json()["code"]) == (403, 1001), (fields, path)
        own = {"project": "P", "model": "m", "api": f"{url}/api/v0/chat/completion/proxy"}
        refused = await program.post("/api/v0/ai/model/register", json=own)
        assert (refused.status_code, refused.json()["code"]) == (400, 1001)


async def calls_are_spread(net: Network) -> None:
    """Each node takes two at once: of many, both take some."""
    took: Counter[str] = Counter()

    async def call() -> None:
        answer = await net.call("POST", "/v1/chat/completions", json.dumps(CHAT).encode())
        assert answer.status == 200, answer.body
        document = await receipt_of(net, answer.task_id)
        took[document["receipt"]["node"]] += 1

    async with trio.open_nursery() as nursery:
        for _ in range(12):
            nursery.start_soon(call)
    assert sorted(took) == sorted(node.where["node"] for node in net.nodes), took


async def found_in_the_dht(net: Network) -> None:
    nodes = sorted(node.where["node"] for node in net.nodes)
    found: list[str] = []
    with trio.move_on_after(45):
        while (found := await found_by_a_third(net)) != nodes:  # noqa: ASYNC110
            await trio.sleep(0.5)
    assert found == nodes


async def one_dies_amid_a_stream(net: Network, server: subprocess.Popen[bytes]) -> None:
    """The official client gets an error and no end; calls after it are served by the other."""
    slow = net.nodes[1].where["node"]
    client = openai.OpenAI(
        base_url=net.bootstrap.where["http"][0] + "/v1", api_key=net.token, max_retries=0, timeout=30,
        default_headers={"Ngpu-Node": slow},
    )  # fmt: skip

    def stream() -> tuple[str, str]:
        pieces, failed = [], ""
        chat = {**CHAT, "max_tokens": 400}
        answer = client.chat.completions.create(**chat, stream=True)  # type: ignore[call-overload]
        try:
            for chunk in answer:
                pieces.append(chunk.choices[0].delta.content or "")
                if len(pieces) == 3:
                    server.send_signal(signal.SIGKILL)
        except (openai.APIError, httpx.HTTPError) as error:
            failed = type(error).__name__
        return failed, answer.response.headers["ngpu-task-id"]

    failed, task_id = await trio.to_thread.run_sync(stream)
    died_s = time.monotonic()
    assert failed, "a stream whose server died looked whole"
    assert (await receipt_of(net, task_id))["receipt"]["outcome"] == "workspace_broke"
    for _ in range(4):
        answer = await net.call("POST", "/v1/chat/completions", json.dumps(CHAT).encode())
        assert answer.status == 200, answer.body
        assert (await receipt_of(net, answer.task_id))["receipt"]["node"] == net.nodes[0].where["node"]
    assert (await names_listed(net)).count("ngram") == 1
    with trio.move_on_after(WITHDRAWN_WITHIN_S):
        while any(one["healthy"] for one in await shown(net.nodes[1]) if one["model"] == "ngram"):  # noqa: ASYNC110
            await trio.sleep(0.1)
    took_s = time.monotonic() - died_s
    (entry,) = [one for one in await shown(net.nodes[1]) if one["model"] == "ngram"]
    assert not entry["healthy"]
    assert "nothing listens" in entry["detail"]
    assert took_s < WITHDRAWN_WITHIN_S
    print(f"withdrawn at the node {took_s:.2f} s after the death")


async def registrations_outlive_the_node(net: Network, server: subprocess.Popen[bytes]) -> None:
    node = net.nodes[0]
    assert await node.terminate() == 0
    token_file = node.folder / "token"
    token_file.write_text(net.token)
    token_file.chmod(0o600)
    with (node.folder / "config.toml").open("a") as config:
        config.write(f"[gateway]\nbootstrap_url = {json.dumps(net.bootstrap.where['http'][0])}\n")
        config.write(f"token_file = {json.dumps(str(token_file))}\n")
    await node.start()
    assert "ngram" in {one["id"] for one in await listed(net, "ngram")}
    await a_program_beside_the_node_calls_the_network(net, node)
    # and the last server's death, which no call meets, withdraws the model from the list
    server.kill()
    began_s = time.monotonic()
    with trio.move_on_after(WITHDRAWN_WITHIN_S):
        while "ngram" in await names_listed(net):  # noqa: ASYNC110
            await trio.sleep(0.05)
    assert "ngram" not in await names_listed(net)
    print(f"out of the list {time.monotonic() - began_s:.2f} s after a death that no call met")
    answer = await net.call("POST", "/v1/chat/completions", json.dumps(CHAT).encode())
    assert (answer.status, answer.document["error"]["code"]) == (503, "no_node"), answer.body


async def a_program_beside_the_node_calls_the_network(net: Network, node: Daemon) -> None:
    """What it asks is the owner's task at the bootstrap, with a receipt like any other."""
    call = "/api/v0/chat/completion"
    async with httpx.AsyncClient(base_url=node.where["models"], trust_env=False, timeout=30) as program:
        asked = {**CHAT, "project": "examples"}
        answer = await program.post(f"{call}/proxy", json=asked)
        assert answer.status_code == 200, answer.text
        await receipt_of(net, answer.headers["ngpu-task-id"])
        named = {**asked, "node_id": node.where["peer_id"], "stream": True}
        async with program.stream("POST", call, json=named) as stream:
            events = [line async for line in stream.aiter_lines() if line]
        assert events[-1] == "data: [DONE]"
        receipt = await receipt_of(net, stream.headers["ngpu-task-id"])
        assert receipt["receipt"]["node"] == node.where["node"]
        for wrong, status, code in (({"model": "gpt-9"}, 404, 1017), ({"node_id": "0x" + "11" * 20}, 404, 1017)):
            refused = await program.post(call, json={**named, **wrong})
            assert (refused.status_code, refused.json()["code"]) == (status, code), refused.text
        assert "examples" in (await program.get("/api/v0/ai/projects/list")).json()["data"]
        assert (await program.get("/api/v0/ai/projects/models?project=examples")).json()["data"] == ["ngram"]
        peers = (await program.get("/api/v0/ai/projects/peers?project=examples&model=ngram")).json()["data"]
        assert {one["node_id"]: one["connectivity"] for one in peers}[node.where["peer_id"]] == 1
