"""The vendor's clients as its document has them, pointed at a bootstrap: every example of a request, Python and curl.

`sensetime/` holds the examples, byte for byte but for what is not valid JSON or Python in the document itself (`false`
in Python, commas before a brace in curl's bodies). What a reader of the document fills in is filled in here: the host,
the token, ids and links that earlier answers gave.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import trio
from PIL import Image

from ngpu_protocol.losses import LossFile, check_loss_file
from tests.integration.whole_path.rig import ROOT, Daemon, Network, SharedNetwork, add_workspace

EXAMPLES = Path(__file__).parent / "sensetime"
OSS_LINK = re.compile(r"https://bkmk\.oss-accelerate\.aliyuncs\.com/[^\"]+")


@dataclass
class Studio:
    """The bootstrap with a studio and a chat workspace behind it, as the vendor's clients see them."""

    url: str
    studio_token: str
    chat_token: str
    folder: Path
    network: SharedNetwork
    servers: list[subprocess.Popen[str]]

    def run(self, name: str, changes: Mapping[str, str]) -> tuple[int, Any]:
        """Run the example *name*, with *changes* to its text; return the status and the answer's JSON."""
        text = (EXAMPLES / f"{name}.txt").read_text()
        for host in ("https://lm_experience.sensetime.com", "http://miaohua.sensetime.com"):
            text = text.replace(host, self.url)
        for old, new in changes.items():
            assert old in text, f"{name} has no {old}"
            text = text.replace(old, new)
        file = self.folder / name
        file.write_text(text)
        environment = {**os.environ, "API_SECRET_KEY": self.chat_token, "no_proxy": "*", "PYTHONIOENCODING": "utf-8"}
        if name.endswith(".py"):
            done = subprocess.run(
                [sys.executable, str(file)], capture_output=True, text=True, timeout=60, env=environment, check=False
            )
            assert done.returncode == 0, done.stderr
            status, _, body = done.stdout.partition("\n")
            # what the document prints with response.json() is Python's way of writing a dictionary
            return int(status), json.loads(body) if body.startswith('{"') else ast.literal_eval(body.strip())
        command = text.replace("curl ", "curl --silent --show-error --write-out '\\n%{http_code}' ", 1)
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, timeout=60, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        body, _, status = done.stdout.rpartition("\n")
        return int(status), json.loads(body)

    def until_done(self, name: str, changes: Mapping[str, str]) -> dict[str, Any]:
        """Run the example *name* once what it asks for is done: until then the same is asked without a process."""
        asked = {"token": self.studio_token, "task_id": list(changes.values())[-1]}
        for _ in range(400):
            answer = httpx.post(f"{self.url}/api/v1b/{name.partition('.')[0]}", json=asked, trust_env=False).json()
            if answer["state"] == "done":
                break
            assert answer["state"] in ("pending", "training"), answer
            time.sleep(0.1)
        status, done = self.run(name, changes)
        assert (status, done["state"]) == (200, "done"), done
        return dict(done)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    folder = tmp_path_factory.mktemp("sensetime")
    servers: list[subprocess.Popen[str]] = []

    def serve(example: str, *arguments: str) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments, "--port", "0"],
            cwd=ROOT / "examples" / example, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        servers.append(process)
        assert process.stdout is not None
        found = re.search(r":(\d+)$", process.stdout.readline().strip())
        assert found, f"{example} did not say where it listens"
        return f"http://127.0.0.1:{found[1]}"

    try:
        # a studio of its own beside each node: only where calls stick to one does a client find again what it made
        at = {
            "studio": [serve("studio", "tiny_studio", "--data", str(folder / f"data{number}")) for number in range(2)],
            "chat": [serve("chat", "ngram_chat", "serve", "--token-delay-ms", "2")] * 2,
        }
        lines = ("[profiles]", 'enabled = ["sensetime"]', "[profiles.settings.sensetime]", "node_away_s = 2.0")
        with SharedNetwork(folder, nodes=2, bootstrap_lines=lines) as network:
            made: dict[str, str] = {}

            async def add(net: Network, _: Any) -> None:
                for name, urls in at.items():
                    # one slot: a job holds it, and questions about it need none
                    spec = {"name": name, "service": f"vendor/{name}", "ports": [8000], "apis": [], "concurrency": 1}
                    workspace, made[name] = await add_workspace(net.bootstrap, spec)
                    for node, url in zip(net.nodes, urls, strict=True):
                        await register(node, name, url)
                    await serves(net, workspace, made[name])
                made["url"] = net.bootstrap.where["http"][0]

            network.run(add)
            yield Studio(made["url"], made["studio"], made["chat"], folder, network, servers)
    finally:
        for process in servers:
            process.kill()
            process.wait(10)


async def register(node: Daemon, model: str, url: str) -> None:
    body = {"project": "vendor", "model": model, "api": url, "type": 0, "paths": ["/"]}
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.post(f"{node.where['models']}/api/v0/ai/model/register", json=body)
    assert answer.status_code == 200, answer.text


async def serves(net: Network, workspace: str, token: str) -> None:
    """Return once the workspace is ready on every node."""
    while True:
        answer = await net.call("GET", f"/api/v1/workspaces/{workspace}", token=token)
        if sum(one["state"] == "ready" for one in answer.document.get("deployments", ())) == len(net.nodes):
            return
        await trio.sleep(0.1)


def picture(path: Path, colour: tuple[int, int, int]) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:] = colour
    pixels[::9] = 20
    Image.fromarray(pixels).save(path, "PNG")


def fetched(link: str) -> Image.Image:
    """Return the picture at a link, asked for as a browser would: with nothing but the link."""
    answer = httpx.get(link, trust_env=False, timeout=30)
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(answer.content))


@pytest.mark.parametrize("name", ["chat.py", pytest.param("chat.sh", marks=pytest.mark.needs_curl)])
def test_a_chat_is_answered_in_the_vendors_envelope(studio: Studio, name: str) -> None:
    changes = {"xxxxxxxxxx": studio.chat_token} if name == "chat.py" else {}
    status, answer = studio.run(name, changes)
    assert (status, answer["code"], answer["msg"], answer["data"]["status"]) == (200, 200, "ok", 0)
    assert answer["data"]["choices"][0]["content"]
    usage = answer["data"]["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_streamed_chat_ends_with_done(studio: Studio) -> None:
    body = {"messages": [{"role": "user", "content": "Say this is a test!"}], "stream": True, "user": "test"}
    headers = {"Authorization": studio.chat_token}
    url = f"{studio.url}/nlp/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers, trust_env=False, timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        task_id = answer.headers["ngpu-task-id"]
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["code"] == 200 for line in lines[:-1])
    receipt = verified(studio, task_id, studio.chat_token)
    assert (receipt["outcome"], receipt["status"]) == ("complete", 200)


def verified(studio: Studio, task_id: str, token: str) -> dict[str, Any]:
    """Return the receipt of a task, once it is there; it must be verified."""
    for _ in range(100):
        answer = httpx.get(
            f"{studio.url}/api/v1/tasks/{task_id}/receipt", headers={"Ngpu-Token": token}, trust_env=False
        )
        if answer.status_code == 200:
            break
        time.sleep(0.1)
    document = answer.json()
    assert document["acknowledgement"]["verdict"] == "verified", document
    return dict(document["receipt"])


@pytest.mark.parametrize("kind", ["py", pytest.param("sh", marks=pytest.mark.needs_curl)])
def test_pictures_are_submitted_polled_and_fetched_by_their_links(studio: Studio, kind: str) -> None:
    token = {'"token": ""': f'"token": "{studio.studio_token}"'}
    status, answer = studio.run(f"task_submit.{kind}", token)
    assert status == 200, answer
    asked = {**token, "f3e5b59c-7416-11ed-a160-00163e025c94": answer["task_id"]}
    done = studio.until_done(f"task_result.{kind}", asked)
    assert (done["error_msg"], len(done["images"])) == ("", 2)
    for index, image in enumerate(done["images"]):
        assert (image["save_index"], image["share"], image["shareable"]) == (index, False, True)
        assert fetched(image["large"]).size == (960, 960)
        assert max(fetched(image["middle"]).size) == 256


def test_a_painting_is_one_task_from_its_submission_to_its_pictures(studio: Studio) -> None:
    headers = {"Ngpu-Token": studio.studio_token}
    with httpx.Client(base_url=studio.url, trust_env=False, timeout=30) as client:
        body = {"prompt": "sea", "n_images": 1, "output_size": "128x128", "token": studio.studio_token}
        submitted = client.post("/api/v1b/task_submit", json=body)
        task_id, key = submitted.headers["ngpu-task-id"], submitted.json()["task_id"]
        for _ in range(300):
            polled = client.get(f"/user/queryTask?taskID={task_id}", headers=headers).json()
            if polled["result_code"] != 100:
                break
            time.sleep(0.1)
        result = json.loads(polled["data"])
        assert (polled["state"], result["state"], len(result["images"])) == (3, "done", 1), "nobody asked but us"
        assert fetched(result["images"][0]["large"]).size == (128, 128), "its links open as those of task_result do"
        asked = client.post("/api/v1b/task_result", json={"task_id": key, "token": studio.studio_token})
        assert fetched(asked.json()["images"][0]["large"]).size == (128, 128)
        info = client.get(f"/user/getDetailed?taskID={task_id}", headers=headers).json()["taskInfo"]
        assert (info["job"]["name"], info["job"]["id"], info["job"]["phase"]) == ("sensetime.painting", key, "done")
        assert info["job"]["calls"] == [asked.headers["ngpu-task-id"]]
        calls = [(one["call"], one["receipt"]["verdict"]) for one in info["attempts"]]
        assert calls[0] == ("POST /api/v1b/task_submit", "verified")
        assert set(calls[1:]) == {("POST /api/v1b/task_result", "verified")}
        # nodes and the store have the public id where the token stood
        assert studio.studio_token not in json.dumps(info)
        other = client.post("/api/v1b/task_result", json={"task_id": key, "token": studio.chat_token})
        unknown = client.post("/api/v1b/task_result", json={"task_id": "x" * len(key), "token": studio.chat_token})
        assert (other.status_code, unknown.status_code) == (404, 404)
        assert other.text.replace(key, "") == unknown.text.replace("x" * len(key), "")


def test_the_forms_are_the_documents(studio: Studio) -> None:
    status, form = studio.run("get_generation_form.py", {})
    assert (status, form["code"], form["msg"]) == (200, 0, "")
    fields = {one["name"]: one for one in form["info"]}
    assert set(fields) == {
        "model_name", "prompt", "neg_prompt", "n_images", "scale", "select_seed", "resolution", "init_img",
        "controlnet_model",
    }  # fmt: skip
    assert (fields["scale"]["min"], fields["scale"]["max"], fields["scale"]["default"]) == (1, 20, 7)
    assert fields["resolution"]["choices"]["2:3"] == ["512x768", "640x960", "768x1152", "1024x1536"]
    status, form = studio.run("get_train_form.py", {})
    assert (status, form["code"]) == (200, 0)
    assert form["info"]["main_body"] == ["Style", "Human", "Architecture", "Plants", "Animals"]
    assert form["info"]["base_model"] == ["商汤自研作画模型 Beta", "水彩风"]


def test_a_style_is_trained_on_uploaded_pictures_and_painted_in(studio: Studio) -> None:
    token = studio.studio_token
    for number in (1, 2):
        picture(studio.folder / f"pic{number}.png", (20, 40 + number, 220))
    uploaded: list[list[str]] = []
    for _ in range(2):
        status, answer = studio.run(
            "upload_imgs.py",
            {"/local/": f"{studio.folder}/", "import requests": f"import requests\ntoken = '{token}'"},
        )
        assert (status, answer["code"], len(answer["info"])) == (200, 0, 2), answer
        uploaded.append(answer["info"])
    assert fetched(uploaded[0][0]).size == (64, 64)

    text = (EXAMPLES / "dataset.py.txt").read_text()
    ids = []
    for links in uploaded:
        documented = OSS_LINK.findall(text)
        status, answer = studio.run("dataset.py", {**dict(zip(documented, links, strict=True)), "xxxx": token})
        assert (status, answer["code"]) == (200, 0), answer
        ids.append(answer["info"]["dataset_id"])
    status, listed = studio.run("dataset_all.py", {"xxx": token})
    assert (status, listed["page"], listed["per_page"], listed["totalPages"]) == (200, 1, 20, 1)
    entry = next(one for one in listed["items"] if one["id"] == ids[0])
    assert (entry["name"], entry["description"], entry["images_num"]) == ("dataset1", "dataset1 description", 2)
    assert fetched(entry["demo_picture"]).size == (64, 64)

    with_token = {'"token": ""': f'"token": "{token}"'}
    status, answer = studio.run("train_submit.py", {**with_token, "[5, 7]": json.dumps(ids)})
    assert (status, answer["code"]) == (200, 0), answer
    trained = studio.until_done("train_progress.py", {**with_token, "xxxxxx": answer["info"]["task_id"]})
    assert (trained["model_name"], trained["training_progress"], trained["main_body"]) == ("train_model1", 1.0, "Style")

    status, answer = studio.run("task_submit.py", {**with_token, "Artist_V0.1.3": "train model1", "960x960": "128x128"})
    assert status == 200, answer
    asked = {**with_token, "f3e5b59c-7416-11ed-a160-00163e025c94": answer["task_id"]}
    image = fetched(studio.until_done("task_result.py", asked)["images"][0]["large"])
    red, _, blue = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(axis=0)
    assert blue > red + 60, "the trained style is that of the uploaded pictures"


def test_a_picture_is_painted_over_and_along_its_contours(studio: Studio) -> None:
    picture(studio.folder / "pic1.png", (250, 250, 250))
    picture(studio.folder / "pic2.png", (250, 120, 20))
    _, answer = studio.run(
        "upload_imgs.py",
        {"/local/": f"{studio.folder}/", "import requests": f"import requests\ntoken = '{studio.studio_token}'"},
    )
    link = answer["info"][0]
    token = {'"token": ""': f'"token": "{studio.studio_token}"'}
    for control in ("", "canny"):
        changes = {
            **token,
            '"init_img": ""': f'"init_img": "{link}"',
            '"controlnet_model": ""': f'"controlnet_model": "{control}"',
            "960x960": "128x128",
        }
        status, answer = studio.run("task_submit.py", changes)
        assert status == 200, answer
        asked = {**token, "f3e5b59c-7416-11ed-a160-00163e025c94": answer["task_id"]}
        assert len(studio.until_done("task_result.py", asked)["images"]) == 2


def test_links_are_good_for_what_they_name_and_nothing_else(studio: Studio) -> None:
    picture(studio.folder / "pic1.png", (1, 2, 3))
    picture(studio.folder / "pic2.png", (4, 5, 6))
    _, answer = studio.run(
        "upload_imgs.py",
        {"/local/": f"{studio.folder}/", "import requests": f"import requests\ntoken = '{studio.studio_token}'"},
    )
    first, second = answer["info"]
    path, _, query = first.partition("?")
    assert "Signature=" in query
    assert studio.studio_token not in first
    expires = re.search(r"Expires=(\d+)", query)
    assert expires is not None
    later = query.replace(expires[0], f"Expires={int(expires[1]) + 1}")
    for link in (path, f"{second.partition('?')[0]}?{query}", f"{path}?{later}", f"{path}?{query[:-2]}"):
        refused = httpx.get(link, trust_env=False)
        assert refused.status_code in (401, 403), (link, refused.text)
        assert set(refused.json()) >= {"code", "info", "msg"}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/nlp/v1/chat/completions", {"messages": []}, 401),
        ("/api/v1b/task_submit", {"prompt": "x", "token": "1-" + "0" * 48}, 401),
        ("/api/v1b/task_submit", {"prompt": "x"}, 401),
        ("/api/v1b/task_submit", {"prompt": "x", "n_images": 100, "token": "studio"}, 400),
        ("/api/v1b/task_result", {"task_id": "nobody's", "token": "studio"}, 404),
        ("/api/v1b/train_progress", {"task_id": "nobody's", "token": "studio"}, 404),
        ("/api/v1b/dataset", {"name": "d", "images": ["https://elsewhere/x.png"], "token": "studio"}, 400),
        ("/api/v1b/nothing", {"token": "studio"}, 404),
    ],
)
def test_errors_are_in_the_vendors_form(studio: Studio, path: str, body: dict[str, Any], status: int) -> None:
    if body.get("token") == "studio":
        body = {**body, "token": studio.studio_token}
    answer = httpx.post(studio.url + path, json=body, trust_env=False)
    assert answer.status_code == status, answer.text
    if path != "/api/v1b/nothing":
        document = answer.json()
        assert document["code"] not in (0, 200)
        assert document["msg"]
    assert studio.studio_token not in answer.text


def test_a_body_that_is_no_json_is_an_error_in_the_vendors_form(studio: Studio) -> None:
    for content in (b"{", b"[]", b""):
        answer = httpx.post(f"{studio.url}/api/v1b/task_submit", content=content, trust_env=False)
        assert answer.status_code in (400, 401), answer.text
        assert set(answer.json()) >= {"code", "info", "msg"}


def test_a_client_is_one_wherever_its_token_stands_and_however_it_writes_a_number(studio: Studio) -> None:
    picture(studio.folder / "one.png", (9, 9, 9))
    content, headers = (studio.folder / "one.png").read_bytes(), {"Authorization": studio.studio_token}
    with httpx.Client(base_url=f"{studio.url}/api/v1b", trust_env=False, timeout=30) as client:
        for first, second in ((headers, {}), ({}, headers), (headers, headers)):
            token = [] if first else [("token", (None, studio.studio_token))]
            answer = client.post("/upload_imgs", files=[*token, ("init_img", ("one.png", content))], headers=first)
            assert answer.status_code == 200, answer.text
            asked = {"name": "d", "images": answer.json()["info"], "token": "" if second else studio.studio_token}
            answer = client.post("/dataset", json=asked, headers=second)
            assert answer.status_code == 200, "pictures lie on the node that took them"
        for page in (1, "1", 1.0, None, ""):
            asked = {"token": studio.studio_token, "page": page, "per_page": "1"}
            answer = client.post("/dataset_all", json=asked)
            assert answer.status_code == 200, answer.text
            assert (answer.json()["page"], answer.json()["per_page"], len(answer.json()["items"])) == (1, 1, 1)
        for page in (0, -1, "x", 1.5, [], True):
            answer = client.post("/dataset_all", json={"token": studio.studio_token, "page": page})
            assert (answer.status_code, answer.json()["code"]) == (400, 400), answer.text
            assert "page" in answer.json()["msg"]


def test_a_form_is_bounded_in_the_vendors_form(studio: Studio) -> None:
    url, token = f"{studio.url}/api/v1b/upload_imgs", ("token", (None, studio.studio_token))
    picture(studio.folder / "one.png", (9, 9, 9))
    one = ("init_img", ("one.png", (studio.folder / "one.png").read_bytes()))
    cases: list[tuple[list[Any], int, str]] = [
        ([token], 400, "init_img"),  # missing
        ([one], 401, ""),  # no token
        ([token, one, ("other", (None, "x"))], 400, "other"),  # not a field of this form
        ([token, token, one], 400, "token"),  # which of the two counts would be a guess
        ([token, *[one] * 101], 400, ""),  # too many
    ]
    for files, status, says in cases:
        answer = httpx.post(url, files=files, trust_env=False, timeout=30)
        assert answer.status_code == status, (len(files), answer.text)
        assert set(answer.json()) >= {"code", "info", "msg"}
        assert says in answer.json()["msg"]
        assert studio.studio_token not in answer.text


def test_an_upload_over_the_limit_is_refused_before_it_is_read(studio: Studio) -> None:
    headers = {
        "Content-Type": "multipart/form-data; boundary=x",
        "Content-Length": str(70 * 1024 * 1024),
        "Expect": "100-continue",
    }
    with socket.create_connection(("127.0.0.1", int(studio.url.rpartition(":")[2])), timeout=20) as connection:
        lines = [f"{name}: {value}" for name, value in {"Host": "x", **headers}.items()]
        connection.sendall("\r\n".join(["POST /api/v1b/upload_imgs HTTP/1.1", *lines, "", ""]).encode())
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 "), answer
    assert b'"msg"' in answer


# the last one here: it leaves one node less
def test_a_training_whose_node_is_lost_says_so_and_is_done_elsewhere_when_submitted_again(studio: Studio) -> None:
    """`kill -9` of the node and of the studio beside it, as when their machine fails, in the middle of a training."""
    token = studio.studio_token
    picture(studio.folder / "one.png", (20, 40, 220))
    content = (studio.folder / "one.png").read_bytes()
    with httpx.Client(base_url=studio.url, trust_env=False, timeout=30, headers={"Ngpu-Token": token}) as client:

        def post(call: str, **fields: Any) -> httpx.Response:
            return client.post(f"/api/v1b/{call}", json={"token": token, **fields})

        def submit(name: str, times: int) -> httpx.Response:
            """Upload a picture, make a dataset that has it *times* times, and train on that."""
            link = client.post("/api/v1b/upload_imgs", files={"token": token.encode(), "init_img": content}).json()
            made = post("dataset", name=name, images=link["info"] * min(times, 500)).json()["info"]["dataset_id"]
            return post("train_submit", name=name, dataset=[made] * max(1, times // 500))

        def detail(task_id: str) -> dict[str, Any]:
            return dict(client.get(f"/user/getDetailed?taskID={task_id}").json()["taskInfo"])

        submitted = submit("lost", 25_000)  # some minutes of work
        task_id, key = submitted.headers["ngpu-task-id"], submitted.json()["info"]["task_id"]
        assert post("train_progress", task_id=key).json()["state"] in ("pending", "training")
        node = detail(task_id)["job"]["nodeaddr"]
        before = detail(task_id)["gpudursion"]

        async def lose(net: Network, _: Any) -> None:
            (lost,) = (at for at, one in enumerate(net.nodes) if one.where["node"] == node)
            await net.nodes[lost].kill()
            studio.servers[lost].kill()

        studio.network.run(lose)
        for _ in range(600):
            answer = post("train_progress", task_id=key)
            document = answer.json()
            assert set(document) >= {"code", "info", "msg"}
            if answer.status_code == 502:  # its connection was cut under this very question
                continue
            assert node in document["msg"]
            assert "submit" in document["msg"], "what to do is said at once"
            if answer.status_code == 410:
                break
            assert (answer.status_code, document["code"], document["reason"]) == (503, 503, "job_node_away")
            assert answer.headers["retry-after"]
            time.sleep(0.1)
        assert (document["code"], document["reason"], document["task_id"]) == (410, "job_node_gone", task_id)
        assert "submit it again" in document["msg"]

        polled = client.get(f"/user/queryTask?taskID={task_id}").json()
        assert (polled["result_code"], polled["reason"], polled["state"]) == (502, "job_node_gone", 4)
        info = detail(task_id)
        assert (info["job"]["phase"], info["job"]["loss"]) == ("lost", polled["loss"])
        file = client.get(f"/api/v1/tasks/{task_id}/loss")
        assert [rule.rule for rule in check_loss_file(LossFile.from_json(file.content)) if not rule.holds] == []
        assert (file.json()["loss"]["jobId"], file.json()["loss"]["node"]) == (key, node)
        # the submission is receipted; the question that was cut is not, and nothing is billed for it
        receipts = {one["call"]: one["receipt"] for one in info["attempts"] if one["receipt"] is not None}
        assert set(receipts) == {"POST /api/v1b/train_submit"}
        assert info["gpudursion"] == before

        again = submit("again", 1)
        assert again.status_code == 200, again.text
        other = detail(again.headers["ngpu-task-id"])["job"]["nodeaddr"]
        assert other != node
        for _ in range(200):
            progress = post("train_progress", task_id=again.json()["info"]["task_id"]).json()
            if progress["state"] == "done":
                break
            time.sleep(0.1)
        assert progress["training_progress"] == 1.0
