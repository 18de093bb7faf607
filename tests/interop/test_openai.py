"""OpenAI's official clients, Python and JavaScript, against a bootstrap, two nodes and model servers behind them."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import openai
import pytest
import trio

from ngpu_protocol.http1 import Exchange, serve_tcp
from tests.integration.profiles.model_server import MODELS, PICTURE, ModelServer
from tests.integration.profiles.rig import PROJECT, listed, receipt_of, register
from tests.integration.whole_path.rig import Network, SharedNetwork, free_port
from tests.integration.whole_path.workspace import Workspace
from tests.interop.npm import install, run

FOLDER = Path(__file__).parent / "openai"
ROOT = Path(__file__).parents[2]
MESSAGES = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedNetwork]:
    """A network with the test's model server, the true chat example, and a server that dies once it is registered."""
    folder = tmp_path_factory.mktemp("openai")
    photos = folder / "photos"
    photos.mkdir()
    lines = ("[models]", f"output_folders = [{json.dumps(str(photos))}]")
    port = free_port()
    command = [sys.executable, "-m", "ngram_chat", "serve", "--port", str(port), "--texts", str(ROOT / "README.md")]
    chat = subprocess.Popen([*command, "--token-delay-ms", "1"], cwd=ROOT / "examples" / "chat")
    try:
        with SharedNetwork(folder, workspace=ModelServer(photos=photos), nodes=2, node_lines=lines) as shared:

            async def prepare(net: Network, workspace: Workspace) -> None:
                for node in net.nodes:
                    names = [(PROJECT, model, kind) for model, kind in MODELS.items()]
                    await register(node, net.workspace_port, names)
                    await register(node, port, [("examples", "ngram", 0)])
                await listed(net, *MODELS, "ngram")

            shared.run(prepare)
            yield shared
    finally:
        chat.kill()
        chat.wait()


class _Asked:
    """The official client, and the network it talks to."""

    def __init__(self, shared: SharedNetwork) -> None:
        self.shared = shared
        self.origin = ""
        self.token = ""

        async def look(net: Network, workspace: Workspace) -> None:
            self.origin, self.token = net.bootstrap.where["http"][0], net.token

        shared.run(look)
        self.client = openai.OpenAI(base_url=f"{self.origin}/v1", api_key=self.token, max_retries=0, timeout=30)

    def forget(self) -> None:
        """Have the model server remember nothing of what came before."""

        async def nothing(net: Network, workspace: Workspace) -> None:
            pass

        self.shared.run(nothing)

    def wait_until_the_server_saw_it(self, within_s: float = 20.0) -> None:
        """Return once the model server noticed that a client of a stream of its own has left."""
        until_s = time.monotonic() + within_s
        while not self.shared.workspace.left.is_set():
            assert time.monotonic() < until_s, "the server never saw its client leave"
            time.sleep(0.02)

    def outcome(self, task_id: str) -> str:
        """Return the outcome in the verified receipt of a task."""
        found: list[str] = []

        async def look(net: Network, workspace: Workspace) -> None:
            found.append((await receipt_of(net, task_id))["receipt"]["outcome"])

        self.shared.run(look)
        return found[0]


@pytest.fixture(scope="module")
def asked(shared: SharedNetwork) -> _Asked:
    return _Asked(shared)


def test_python_chats_with_and_without_a_stream(asked: _Asked) -> None:
    raw = asked.client.chat.completions.with_raw_response.create(model="Llama3-8B", messages=MESSAGES)
    assert raw.parse().choices[0].message.content.endswith("today?")
    assert asked.outcome(raw.headers["ngpu-task-id"]) == "complete"
    stream = asked.client.chat.completions.create(model="Llama3-8B", messages=MESSAGES, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == "word0 word1 word2 word3 word4 "
    assert asked.outcome(stream.response.headers["ngpu-task-id"]) == "complete"


def test_python_chats_with_a_true_model(asked: _Asked) -> None:
    words = {"model": "ngram", "messages": MESSAGES, "seed": 1, "max_tokens": 12}
    whole = asked.client.chat.completions.create(**words).choices[0].message.content
    pieces = asked.client.chat.completions.create(**words, stream=True)
    assert whole
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == whole


def test_python_leaves_a_stream_and_the_receipt_says_so(asked: _Asked) -> None:
    asked.forget()
    stream = asked.client.chat.completions.create(model="slow-stream", messages=MESSAGES, stream=True)
    assert next(iter(stream)).choices[0].delta.content == "word0 "
    stream.close()
    asked.wait_until_the_server_saw_it()
    assert asked.outcome(stream.response.headers["ngpu-task-id"]) == "client_gone"


def test_python_makes_and_edits_images(asked: _Asked) -> None:
    made = asked.client.images.generate(model="SuperImage", prompt="an otter", n=2)
    assert made.data is not None
    assert len(made.data) == 2
    for one in made.data:
        assert asked.client._client.get(one.url).content == PICTURE
    edited = asked.client.images.edit(model="SuperEdit", image=("otter.png", PICTURE, "image/png"), prompt="a beret")
    assert edited.data is not None
    assert edited.data[0].url.startswith(f"{asked.origin}/v1/files/")


def test_python_uses_the_other_calls(asked: _Asked) -> None:
    client = asked.client
    assert {model.id for model in client.models.list()} >= {*MODELS, "ngram"}
    assert client.models.retrieve("Llama3-8B").owned_by == PROJECT
    assert client.completions.create(model="Llama3-8B", prompt="Hello").choices[0].text == " there"
    vectors = client.embeddings.create(model="embedder", input="a", encoding_format="float")
    assert vectors.data[0].embedding == [0.5, -0.25]
    assert client.audio.speech.create(model="speaker", input="a", voice="alloy").content.startswith(b"ID3")
    said = client.audio.transcriptions.create(model="speaker", file=("a.wav", b"RIFF" + bytes(2000)))
    assert said.text == "said"


def test_python_raises_its_own_errors_for_ours(asked: _Asked) -> None:
    create = partial(asked.client.chat.completions.create, messages=MESSAGES)
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="gpt-9")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{asked.origin}/v1", api_key="sk-wrong", max_retries=0).models.list()
    with pytest.raises(openai.APIError, match="out of memory"):
        list(create(model="error-event", stream=True))
    stream = create(model="broken-stream", stream=True)
    pieces = []
    with pytest.raises(openai.APIError):
        pieces.extend(stream)
    assert asked.outcome(stream.response.headers["ngpu-task-id"]) == "workspace_broke"


def test_python_is_told_when_the_server_is_gone(asked: _Asked) -> None:
    async def with_dying_server(net: Network, workspace: Workspace) -> None:
        async def ready(exchange: Exchange) -> None:
            await exchange.respond(200, [], b"")

        async with trio.open_nursery() as nursery:
            bound = await nursery.start(partial(serve_tcp, ready, host="127.0.0.1", port=0))
            await register(net.nodes[0], bound[0].port, [(PROJECT, "gone", 0)])
            await listed(net, "gone")
            nursery.cancel_scope.cancel()

    asked.shared.run(with_dying_server)
    with pytest.raises(openai.InternalServerError) as caught:
        asked.client.chat.completions.create(model="gone", messages=MESSAGES)
    assert caught.value.status_code in (502, 503)
    assert caught.value.body


@pytest.mark.needs_node
def test_javascript_does_all_of_it_too(asked: _Asked) -> None:
    install(FOLDER)
    asked.forget()
    given = {"baseURL": f"{asked.origin}/v1", "apiKey": asked.token, "picture": base64.b64encode(PICTURE).decode()}
    said = json.loads(run(FOLDER, "clients.mjs", json.dumps(given), timeout_s=60))
    assert said["chat"].endswith("today?")
    assert said["stream"] == "word0 word1 word2 word3 word4 "
    asked.wait_until_the_server_saw_it()
    assert {asked.outcome(said[one]) for one in ("cancelled", "aborted")} == {"client_gone"}
    assert len(said["images"]) == 2
    assert all(url.startswith(f"{asked.origin}/v1/files/") for url in [*said["images"], said["edit"]])
    assert base64.b64decode(said["picture"]) == PICTURE
    assert set(said["models"]) >= set(MODELS)
    assert (said["model"], said["completion"], said["transcription"]) == (PROJECT, " there", "said")
    assert said["speech"] == ["audio/mpeg", 1003]
    assert said["stranger"] == {"name": "AuthenticationError", "status": 401, "code": "invalid_api_key"}
    assert said["embedding"] == [0.5, -0.25]
    assert said["unknown"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found"}
    assert said["broken"]["name"] == "APIError"
    assert said["event"]["name"] == "APIError"
    assert said["gone"]["status"] in (404, 502, 503)
