"""The gateway's ready-made interfaces, sadTalker and videoReTalker, by the shipped declaration with a stub behind.

The stub stands where a real image would: it answers the two paths, once at once and once by a job of its own.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import trio

from tests.integration.bootstrap.rig import Bootstrap, running, settings_for, task_when, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, new_account

TEXT = (Path(__file__).resolve().parents[3] / "examples/talker/workspace.toml").read_text()
SHIPPED = tomllib.loads(TEXT)
# the documents' own request
REQUEST = {
    "image_url": "https://twinsync.oss-cn-hangzhou.aliyuncs.com/video/1683730315image.jpeg",
    "text": "你好，我是马斯克。听说今天是中国的腊八节，不知道大家吃了腊八粥了没有？我在美国祝大家腊八节快乐！",  # noqa: RUF001
    "pronouncer": "fable",
    "backGroundName": "laba",
    "btc_address": "bc1pv0egqadxd60ae4r7v77gewpvjvsza09kccsxztzx8c8pqccn0rgqqw7np5",
}
VIDEO = {"result_code": 200, "result_url": "https://videos.example/1.mp4"}


def declared(**of_apis: Any) -> dict[str, Any]:
    """The shipped declaration, served by a registered program in place of an image."""
    document = {key: value for key, value in SHIPPED.items() if key not in ("image", "gpu_count", "gpu_types")}
    apis = [{**api, **of_apis} for api in SHIPPED["apis"]]
    return {**document, "service": "demo/echo", "apis": apis}


class Talker:
    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    async def __call__(self, asked: Asked) -> None:
        body = await asked.read()
        self.asked.append((asked.signed.order.target, json.loads(body) if body else None))
        answer = VIDEO if "status" not in asked.signed.order.target else {"status": "done", **VIDEO}
        if asked.signed.order.target == "/sadTalker/submit":
            answer = {"task_id": "t1"}
        await asked.answer(200, json.dumps(answer).encode(), [(b"content-type", b"application/json")])


async def result(bootstrap: Bootstrap, name: str, body: Any) -> tuple[str, Any]:
    answer = await bootstrap.call("POST", f"/user/{name}", json.dumps(body).encode())
    assert answer.status == 200, answer.body
    made = json.loads(answer.body)
    assert made["result_code"] == 200
    assert made["taskId"] == made["taskID"] == made["task_id"]
    await task_when(bootstrap, made["taskId"], lambda view: view["state"] == 3)
    polled = json.loads((await bootstrap.call("GET", f"/user/{name}?taskID={made['taskId']}", token=None)).body)
    return made["taskId"], polled


def test_the_documents_request_is_answered_whatever_image_is_behind_it(tmp_path: Path) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account(), script=(talker := Talker()))
        settings = settings_for(tmp_path / "bootstrap", compat={"ngpu_cloud": True})
        async with (
            running(settings, workspace=declared()) as bootstrap,
            connected(node, bootstrap.multiaddr),
        ):
            await wait_ready(bootstrap)
            task_id, polled = await result(bootstrap, "sadTalker", REQUEST)
            assert (polled["result_code"], polled["result_url"]) == (200, VIDEO["result_url"])
            assert json.loads(polled["data"]) == VIDEO
            assert talker.asked == [("/sadTalker", REQUEST)]
            info = json.loads((await bootstrap.call("GET", f"/user/getDetailed?taskID={task_id}")).body)["taskInfo"]
            assert (info["btcaddress"], info["method"]) == (REQUEST["btc_address"], "sadTalker")
            clip = {"video_url": "https://x.example/v.mp4", "audio_url": "https://x.example/a.wav"}
            _, polled = await result(bootstrap, "videoReTalker", clip)
            assert (polled["result_code"], polled["result_url"]) == (200, VIDEO["result_url"])

            async def out_of_memory(asked: Asked) -> None:
                await asked.read()
                await asked.answer(500, b"out of memory", [(b"content-type", b"text/plain")])

            node.script = out_of_memory
            _, polled = await result(bootstrap, "sadTalker", REQUEST)
            assert (polled["result_code"], polled["data"]) == (104, "out of memory"), "its clients' loop ends"

    trio.run(main)


def test_a_body_without_its_fields_is_told_so_before_a_node_is_asked(tmp_path: Path) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account(), script=(talker := Talker()))
        async with (
            running(settings_for(tmp_path / "bootstrap"), workspace=declared()) as bootstrap,
            connected(node, bootstrap.multiaddr),
        ):
            await wait_ready(bootstrap)
            for body, words in (
                (b'{"text":"x"}', "image_url is required"),
                (b'{"image_url":"https://x","text":5}', "text must be of type string"),
                (b"{", "not valid JSON"),
                (b"[]", "must be of type object"),
            ):
                answer = await bootstrap.call("POST", "/user/sadTalker", body)
                document = json.loads(answer.body)
                assert (answer.status, document["result_code"]) == (400, 400)
                assert words in document["msg"]
            assert not talker.asked
            assert not node.orders

    trio.run(main)


def test_a_program_of_other_paths_and_jobs_drops_in_by_editing_the_declarations_text(tmp_path: Path) -> None:
    """What an operator does with the shipped file: names what runs, changes a path, takes the # off the last table."""
    text = TEXT
    for old, new in (
        ('image = "your-registry/talker:1"\n', 'service = "demo/echo"\n'),
        ('path = "/sadTalker"', 'path = "/v2/animate?quality=high"'),
        ("gpu_count = 1\n", ""),
        ('gpu_types = ["RTX4090", "A10", "A100"]\n', ""),
        ('path = "/videoReTalker"', 'path = "/v2/lips"'),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    head, _, table = text.partition("#   [apis.job]")
    text = head + "[apis.job]" + table.replace("\n#", "\n")  # of the last API, videoReTalker
    asked: list[tuple[str, Any]] = []

    async def program(one: Asked) -> None:
        body, target = await one.read(), one.signed.order.target
        asked.append((target, json.loads(body) if body else None))
        answer: Any = VIDEO
        if target == "/v2/lips":
            answer = {"task_id": "j 7"}
        elif target.startswith("/status"):
            answer = {"status": "done" if len(asked) > 3 else "busy", **VIDEO}
        await one.answer(200, json.dumps(answer).encode(), [(b"content-type", b"application/json")])

    async def main() -> None:
        settings = settings_for(tmp_path / "bootstrap", compat={"ngpu_cloud": True})
        node = ScriptedNode(new_account(), script=program)
        async with (
            running(settings, workspace=tomllib.loads(text)) as bootstrap,
            connected(node, bootstrap.multiaddr),
        ):
            await wait_ready(bootstrap)
            _, polled = await result(bootstrap, "sadTalker", REQUEST)
            assert (polled["result_code"], polled["result_url"]) == (200, VIDEO["result_url"])
            clip = {"video_url": "https://x.example/v.mp4", "audio_url": "https://x.example/a.wav"}
            _, polled = await result(bootstrap, "videoReTalker", clip)
            assert (polled["result_code"], polled["result_url"]) == (200, VIDEO["result_url"])
            assert asked[:2] == [("/v2/animate?quality=high", REQUEST), ("/v2/lips", clip)]
            assert {target for target, _ in asked[2:]} == {"/status?task_id=j%207"}

    trio.run(main)


def test_an_image_that_runs_jobs_of_its_own_drops_in_by_one_table_more(tmp_path: Path) -> None:
    job = {
        "id": ["/task_id"],
        "poll": {"target": "/status?task_id={id}"},
        "state": ["/status"],
        "done": ["done"],
        "interval_s": 0.05,
    }

    async def main() -> None:
        node = ScriptedNode(new_account(), script=(talker := Talker()))
        workspace = declared(job=job, path="/sadTalker/submit")
        async with (
            running(settings_for(tmp_path / "bootstrap"), workspace=workspace) as bootstrap,
            connected(node, bootstrap.multiaddr),
        ):
            await wait_ready(bootstrap)
            _, polled = await result(bootstrap, "sadTalker", REQUEST)
            assert json.loads(polled["data"])["result_url"] == VIDEO["result_url"]
            assert talker.asked == [("/sadTalker/submit", REQUEST), ("/status?task_id=t1", None)]

    trio.run(main)
