"""The image generation API of akashgen-api-go (the document with `POST /api/generate`), on bootstrap and nodes.

`test_the_documents_curl…` runs real processes with `examples/paint` behind real nodes; the rest scripts a node, to see
what the document says of limits and errors.
"""

# ruff: noqa: RUF001 - the document's own words

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
from PIL import Image

from ngpu_bootstrap.profiles.catalogue import read_shipped
from ngpu_bootstrap.profiles.job_declaration import SubmittedJob
from ngpu_protocol.control import GpuOffer
from ngpu_protocol.http1 import Client, Exchange, tcp_opener
from tests.integration.bootstrap.rig import Answered, Bootstrap, running, settings_for, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, new_account
from tests.integration.profiles.rig import register
from tests.integration.whole_path.rig import ROOT, add_workspace, free_port, network

SAMPLERS = """
euler, euler_cfg_pp, euler_ancestral, euler_ancestral_cfg_pp, heun, heunpp2,
dpm_2, dpm_2_ancestral, lms, dpm_fast, dpm_adaptive, dpmpp_2s_ancestral,
dpmpp_2s_ancestral_cfg_pp, dpmpp_sde, dpmpp_sde_gpu, dpmpp_2m, dpmpp_2m_cfg_pp,
dpmpp_2m_sde, dpmpp_2m_sde_gpu, dpmpp_3m_sde, dpmpp_3m_sde_gpu, ddpm, lcm,
ipndm, ipndm_v, deis, ddim, uni_pc, uni_pc_bh2
"""
SCHEDULERS = "normal, karras, exponential, sgm_uniform, simple, ddim_uniform, beta, linear_quadratic"
REQUEST = {"prompt": "a quiet lake", "negative": "blurry", "sampler": "dpmpp_2m", "scheduler": "karras"}
PICTURE = b"\x89PNG\r\n\x1a\nnot really"
SPEC = {"name": "paint", "service": "demo/echo", "ports": [8080], "concurrency": 32, "request_timeout_s": 30}


def names(text: str) -> list[str]:
    return [name.strip() for name in text.replace("\n", " ").split(",")]


def test_what_the_document_fixes_is_what_is_shipped() -> None:
    profile = read_shipped("akashgen")
    route = profile.routes[0]
    assert route.body_schema is not None
    properties = route.body_schema["properties"]
    assert properties["sampler"]["enum"] == names(SAMPLERS)
    assert len(names(SAMPLERS)) == 29
    assert properties["scheduler"]["enum"] == names(SCHEDULERS)
    assert len(names(SCHEDULERS)) == 8
    assert route.gpu_types == ("RTX4090", "A10", "A100", "V100-32Gi", "H100")
    job = route.job
    assert isinstance(job, SubmittedJob)
    limits = (job.submit_timeout_s, job.poll_timeout_s, job.fetch_timeout_s, job.interval_s, job.duration_s)
    assert limits == (30, 10, 30, 1, 300)
    assert route.at_once == 10
    assert profile.listen.endswith(":6571")
    own = {"generate_timeout_s": 7.0, "max_polling_duration_s": 8.0, "max_concurrent_requests": 3}
    changed = read_shipped("akashgen", {"akashgen": own}).routes[0]
    assert isinstance(changed.job, SubmittedJob)
    assert (changed.job.submit_timeout_s, changed.job.duration_s, changed.at_once) == (7, 8, 3)


class Akash:
    """A workspace with AkashGen's calls on a scripted node."""

    def __init__(self, node: ScriptedNode) -> None:
        self.node = node
        self.asked: list[str] = []
        self.bodies: list[bytes] = []
        self.gate: trio.Event | None = None
        self.refuses = False
        self.state: dict[str, Any] = {"status": "succeeded", "result": "/api/images/1.png"}
        node.script = self

    async def __call__(self, asked: Asked) -> None:
        body = await asked.read()
        target = asked.signed.order.target
        self.asked.append(target)
        if self.refuses:
            await asked.answer(422, b'{"detail": "no"}', [(b"content-type", b"application/json")])
        elif target == "/api/generate":
            self.bodies.append(body)
            await self._json(asked, {"job_id": "j1"})
        elif target.startswith("/api/status"):
            if self.gate is not None:
                await self.gate.wait()
            await self._json(asked, [{"job_id": "j1", **self.state}])
        else:
            await asked.answer(200, PICTURE, [(b"content-type", b"image/png")])

    async def _json(self, asked: Asked, document: Any) -> None:
        await asked.answer(200, json.dumps(document).encode(), [(b"content-type", b"application/json")])


async def generate(bootstrap: Bootstrap, body: Any, *, token: str | None = None) -> Answered:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await bootstrap.call("POST", "/api/generate", content, [(b"content-type", b"application/json")], token=token)


Test = Callable[[Bootstrap, list[Akash]], Awaitable[None]]


def run(
    tmp_path: Path,
    test: Test,
    *,
    nodes: tuple[str, ...] = ("",),
    open_to_all: bool = True,
    public: dict[str, Any] | None = None,
    **own: Any,
) -> None:
    data = tmp_path / "bootstrap"

    async def main() -> None:
        async with running(settings_for(data), workspace=SPEC) as first:
            known = (first.workspace, first.token)
        profiles: dict[str, Any] = {
            "enabled": ["akashgen"],
            "bind": {"akashgen": known[0]},
            "settings": {"akashgen": {"polling_interval_s": 0.05, **own}},
        }
        if open_to_all:
            opened = {"workspace": known[0], "calls_per_minute": 1000, "at_once": 100, **(public or {})}
            profiles["public"] = {"akashgen": opened}
        async with AsyncExitStack() as stack:
            settings = settings_for(data, profiles=profiles)
            bootstrap = await stack.enter_async_context(running(settings, known=known))
            workspaces = []
            for model in nodes:
                node = ScriptedNode(new_account())
                if model:
                    node.gpus = (GpuOffer(id=b"\x01" * 32, model=model, memory_bytes=24 << 30),)
                workspaces.append(Akash(node))
                await stack.enter_async_context(connected(node, bootstrap.multiaddr))
            await wait_ready(bootstrap, len(nodes))
            with trio.fail_after(60):
                await test(bootstrap, workspaces)

    trio.run(main)


def test_the_picture_comes_back_as_bytes_with_its_type_and_the_body_went_as_it_came(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, workspaces: list[Akash]) -> None:
        (workspace,) = workspaces
        body = b'{ "prompt" : "lake", "negative":"", "sampler":"lcm","scheduler":"beta" , "more": 1}'
        answer = await generate(bootstrap, body)
        assert (answer.status, answer.body, answer.header(b"content-type")) == (200, PICTURE, b"image/png")
        assert workspace.bodies == [body]
        assert workspace.asked == ["/api/generate", "/api/status?ids=j1", "/api/images/1.png"]
        task_id = (answer.header(b"ngpu-task-id") or b"").decode()
        info = json.loads((await bootstrap.call("GET", f"/user/getDetailed?taskID={task_id}")).body)["taskInfo"]
        assert [one["receipt"]["verdict"] for one in info["attempts"]] == ["verified"] * 3

    run(tmp_path, test)


def test_what_is_missing_or_not_supported_is_400_and_says_what_is(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, workspaces: list[Akash]) -> None:
        cases: list[tuple[Any, list[str]]] = [
            ({**REQUEST, "sampler": "karras"}, ["sampler", *names(SAMPLERS)]),
            ({**REQUEST, "scheduler": "euler"}, ["scheduler", *names(SCHEDULERS)]),
            ({**REQUEST, "prompt": ""}, ["prompt"]),
            ({**REQUEST, "prompt": 5}, ["prompt", "string"]),
            ({"prompt": "x"}, ["sampler", "scheduler", "required"]),
            ({}, ["prompt", "sampler", "scheduler", "required"]),
            (b"{", ["JSON"]),
            (b"", []),
            (b"[]", ["object"]),
            (b"prompt=x&sampler=lcm&scheduler=beta", ["JSON"]),
            (b'{"prompt":"x","sampler":"lcm","scheduler":"beta","sampler":"none"}', ["sampler", "more than once"]),
        ]
        for body, words in cases:
            answer = await generate(bootstrap, body)
            document = json.loads(answer.body)
            assert (answer.status, document["error"]) == (400, "Invalid request format"), (body, answer.body)
            assert all(word in document["details"] for word in words), document
        assert not workspaces[0].asked

    run(tmp_path, test)


def test_failures_and_timeouts_are_500_with_error_and_details(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, workspaces: list[Akash]) -> None:
        (workspace,) = workspaces
        workspace.state = {"status": "failed", "error": "CUDA out of memory"}
        answer = await generate(bootstrap, REQUEST)
        document = json.loads(answer.body)
        assert (answer.status, document["error"]) == (500, "生成图像失败"), "words may be set"
        assert "CUDA out of memory" in document["details"]
        workspace.state = {"status": "processing"}
        answer = await generate(bootstrap, REQUEST)
        document = json.loads(answer.body)
        assert (answer.status, document["error"]) == (500, "生成图像失败")
        assert "0.5 s" in document["details"]
        # what the workspace says of a job it does not take is no answer of this API's
        workspace.refuses = True
        answer = await generate(bootstrap, REQUEST)
        document = json.loads(answer.body)
        assert (answer.status, set(document)) == (500, {"error", "details", "reason", "task_id"})
        assert document["details"] == 'the workspace refused the job with status 422: {"detail": "no"}'

    run(tmp_path, test, max_polling_duration_s=0.5, words_500="生成图像失败")


@pytest.mark.parametrize("call", ["/api/generate", "/api/status", "/api/images/1.png"])
def test_each_of_the_documents_time_limits_ends_its_call_with_500(tmp_path: Path, call: str) -> None:
    async def test(bootstrap: Bootstrap, workspaces: list[Akash]) -> None:
        (workspace,) = workspaces
        answers = workspace.node.script

        async def silent(asked: Asked) -> None:
            if asked.signed.order.target.startswith(call):
                await asked.read()
                await trio.sleep_forever()
            await answers(asked)

        workspace.node.script = silent
        with trio.fail_after(60):
            answer = await generate(bootstrap, REQUEST)
        document = json.loads(answer.body)
        assert (answer.status, document["error"]) == (500, "Failed to generate image"), document
        assert len(document["details"]) > 10
        # and its place is free again
        workspace.node.script = answers
        assert (await generate(bootstrap, REQUEST)).status == 200

    limits = {"generate_timeout_s": 0.4, "status_timeout_s": 0.4, "image_fetch_timeout_s": 0.4}
    run(tmp_path, test, **limits, max_polling_duration_s=3.0, max_concurrent_requests=1)


def test_a_node_that_is_gone_is_said_in_the_callers_words(tmp_path: Path) -> None:
    async def main() -> None:
        data = tmp_path / "bootstrap"
        async with running(settings_for(data), workspace=SPEC) as first:
            known = (first.workspace, first.token)
        own = read_shipped("akashgen")
        file = tmp_path / "akashgen.toml"
        shipped = (ROOT / "ngpu_bootstrap/profiles/shipped/akashgen.toml").read_text()
        file.write_text(shipped.replace("fetch = true", "fetch = true\naway_s = 0.3"))
        assert own.name == "akashgen"
        settings = settings_for(
            data,
            profiles={
                "enabled": ["akashgen"],
                "files": [file],
                "bind": {"akashgen": known[0]},
                "settings": {"akashgen": {"polling_interval_s": 0.05}},
            },
        )
        async with running(settings, known=known) as bootstrap:
            node = ScriptedNode(new_account())
            workspace = Akash(node)
            answers: list[Answered] = []
            async with trio.open_nursery() as nursery, connected(node, bootstrap.multiaddr):
                await wait_ready(bootstrap)
                workspace.gate = trio.Event()

                async def call() -> None:
                    answers.append(await generate(bootstrap, REQUEST, token=known[1]))

                nursery.start_soon(call)
                with trio.fail_after(60):
                    while len(workspace.asked) < 2:  # noqa: ASYNC110
                        await trio.sleep(0.01)
            document = json.loads(answers[0].body)
            assert answers[0].status == 500
            assert node.account.address in document["details"]
            assert "submit it again" in document["details"]

    trio.run(main)


def test_without_a_credential_nothing_runs_unless_the_operator_opened_it(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, workspaces: list[Akash]) -> None:
        answer = await generate(bootstrap, REQUEST)
        assert answer.status == 401
        assert set(json.loads(answer.body)) >= {"error", "details"}
        assert (await generate(bootstrap, REQUEST, token=bootstrap.token)).status == 200

    run(tmp_path, test, open_to_all=False)


def test_beyond_the_limit_calls_wait_and_beyond_the_queue_they_get_429(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, workspaces: list[Akash]) -> None:
        (workspace,) = workspaces
        workspace.gate = trio.Event()
        statuses: list[int] = []

        async def call() -> None:
            statuses.append((await generate(bootstrap, REQUEST)).status)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(call)
            with trio.fail_after(60):
                while workspace.asked.count("/api/status?ids=j1") < 2:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            await trio.sleep(0.2)
            assert workspace.asked.count("/api/generate") == 2, "two run, two wait"
            refused = await generate(bootstrap, REQUEST)
            assert refused.status == 429
            assert set(json.loads(refused.body)) >= {"error", "details"}
            assert refused.header(b"retry-after") is not None
            workspace.gate.set()
        assert statuses == [200] * 4

    run(tmp_path, test, max_concurrent_requests=2, max_waiting_requests=2)


def test_the_public_waits_for_its_own_places_and_a_token_does_not(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, workspaces: list[Akash]) -> None:
        (workspace,) = workspaces
        workspace.gate = trio.Event()
        statuses: list[int] = []

        async def call(token: str | None = None) -> None:
            statuses.append((await generate(bootstrap, REQUEST, token=token)).status)

        async def asked(many: int) -> None:
            while workspace.asked.count("/api/status?ids=j1") < many:  # noqa: ASYNC110
                await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await asked(1)
            nursery.start_soon(call)  # waits
            await trio.sleep(0.1)
            refused = await generate(bootstrap, REQUEST)
            assert (refused.status, json.loads(refused.body)["reason"]) == (429, "queue_full")
            nursery.start_soon(call, bootstrap.token)
            await asked(2)
            assert workspace.asked.count("/api/generate") == 2
            workspace.gate.set()
        assert statuses == [200] * 3

    run(tmp_path, test, public={"at_once": 1, "queue": 1})


def test_the_preferred_gpu_is_taken_first(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, workspaces: list[Akash]) -> None:
        for _ in range(6):
            assert (await generate(bootstrap, REQUEST)).status == 200
        assert [len(one.bodies) for one in workspaces] == [0, 6, 0]

    run(tmp_path, test, nodes=("NVIDIA A100 80GB PCIe", "NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3"))


async def _nothing(exchange: Exchange) -> None:
    await exchange.respond(404, [], b"")


def real(tmp_path: Path, test: Callable[[Any, int], Awaitable[None]], *lines: str) -> None:
    """Run bootstrap, two nodes and `examples/paint` as processes, the profile bound to it on a listener of its own."""

    command = [sys.executable, "-m", "procedural_paint", "--port", "0"]
    paint = subprocess.Popen(command, cwd=ROOT / "examples" / "paint", stdout=subprocess.PIPE, text=True)

    async def main(painting: int) -> None:
        extra = ('log_format = "json"', *lines)
        async with network(tmp_path, _nothing, nodes=2, bootstrap_lines=extra) as net:
            spec = {"service": "demo/paint", "ports": [8000], "apis": [], "concurrency": 4}
            for node in net.nodes:
                await register(node, painting, [("demo", "paint", 1)], paths=["/"])
            net.workspace, net.token = await add_workspace(net.bootstrap, spec)
            port = free_port()
            config = net.bootstrap.folder / "config.toml"
            text = config.read_text().replace("drain_s = 3", "drain_s = 20")
            config.write_text(
                text
                + '[profiles]\nenabled = ["akashgen"]\n'
                + f'[profiles.bind]\nakashgen = "{net.workspace}"\n'
                + f'[profiles.listen]\nakashgen = "127.0.0.1:{port}"\n'
                + f'[profiles.public.akashgen]\nworkspace = "{net.workspace}"\ncalls_per_minute = 600\nat_once = 10\n'
            )
            assert await net.bootstrap.terminate() == 0
            await net.bootstrap.start()
            await net.connect_client()
            await net.ready()
            await test(net, port)

    try:
        assert paint.stdout is not None
        found = re.search(r":(\d+)$", paint.stdout.readline().strip())
        assert found
        trio.run(main, int(found[1]))
    finally:
        paint.kill()
        paint.wait()


def test_the_documents_curl_draws_a_picture_on_real_nodes(tmp_path: Path) -> None:
    picture = tmp_path / "generated_image.png"

    async def test(net: Any, port: int) -> None:
        # the document's own, but for its port and where the file goes
        script = f"""
curl -sS -w '%{{http_code}} %{{content_type}}' -X POST http://localhost:{port}/api/generate \\
  -H "Content-Type: application/json" \\
  -d '{{
    "prompt": "宁静的湖泊，背景是山脉",
    "negative": "丑陋，模糊，低分辨率",
    "sampler": "dpmpp_2m",
    "scheduler": "karras"
  }}' \\
  --output {picture}
"""
        done = await trio.run_process(["sh", "-c", script], capture_stdout=True, capture_stderr=True)
        assert done.stdout == b"200 image/png", (done, picture.read_bytes()[:300])
        assert Image.open(picture).size == (512, 512)
        health = await trio.run_process(
            ["curl", "-sS", f"http://localhost:{port}/health"], capture_stdout=True, capture_stderr=True
        )
        assert json.loads(health.stdout) == {"status": "ok"}
        wrong = await trio.run_process(
            ["curl", "-sS", f"http://localhost:{port}/api/generate"], capture_stdout=True, capture_stderr=True
        )
        assert set(json.loads(wrong.stdout)) >= {"error", "details"}
        (task_id,) = (await net.call("GET", "/user/queryTaskList")).document["taskIds"]
        info = (await net.call("GET", f"/user/getDetailed?taskID={task_id}")).document["taskInfo"]
        calls = [one["call"].partition("?")[0] for one in info["attempts"]]
        assert calls[0] == "POST /api/generate"
        assert calls[1] == "GET /api/status"
        assert calls[-1].startswith("GET /api/images/")
        assert {one["receipt"]["verdict"] for one in info["attempts"]} == {"verified"}
        assert len({one["nodeaddr"] for one in info["attempts"]}) == 1
        # the node asked its workspace by itself: the question lasted as long as the job
        assert calls.count("GET /api/status") == 1
        held = info["attempts"][1]["receipt"]["duration_ms"]
        assert held >= 500, info["attempts"]
        lines = [json.loads(line) for line in net.bootstrap.log.splitlines() if line.startswith("{")]
        logged = next(line for line in lines if line.get("msg") == "HTTP Request" and line["path"] == "/api/generate")
        assert logged["level"] == "info"
        assert abs(logged["ts"] - time.time()) < 120
        assert (logged["method"], logged["status"], logged["client_ip"]) == ("POST", 200, "127.0.0.1")
        assert re.fullmatch(r"[0-9.]+s", logged["duration"])
        statuses = [
            (line["method"], line["path"], line["status"]) for line in lines if line.get("msg") == "HTTP Request"
        ]
        assert statuses[-2:] == [("GET", "/health", 200), ("GET", "/api/generate", 405)]

    real(tmp_path, test)


def test_a_request_in_flight_is_answered_before_the_bootstrap_ends(tmp_path: Path) -> None:
    async def test(net: Any, port: int) -> None:
        client = Client(tcp_opener("127.0.0.1", port), authority=f"127.0.0.1:{port}")
        codes: list[int] = []
        async with trio.open_nursery() as nursery:

            async def call() -> None:
                fields = [(b"content-type", b"application/json")]
                body = json.dumps(REQUEST).encode()
                async with client.request("POST", "/api/generate", fields, body) as response:
                    content = await response.read(1 << 24)
                    assert content[:4] == b"\x89PNG", content[:200]
                    codes.append(response.status)

            nursery.start_soon(call)
            with trio.fail_after(60):
                while not (await net.call("GET", "/user/queryTaskList")).document["taskIds"]:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            codes.append(await net.bootstrap.terminate())
        assert sorted(codes) == [0, 200]
        await client.aclose()

    real(tmp_path, test)
