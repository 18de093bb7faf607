"""What may be called of a registered model server, and where on it that lies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngpu_node.model_paths import ModelPaths, declared_path

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("api", "kind", "chat", "embeddings"),
    [
        (CHAT, 0, CHAT, "/v1/embeddings"),
        ("", 0, CHAT, "/v1/embeddings"),
        ("/", 0, CHAT, "/v1/embeddings"),
        ("/v1", 0, CHAT, "/v1/embeddings"),
        ("/v1/", 1, CHAT, "/v1/embeddings"),
        ("/llm/v1/chat/completions", 0, "/llm/v1/chat/completions", "/llm/v1/embeddings"),
        ("/llm/v1/completions", 0, "/llm/v1/chat/completions", "/llm/v1/embeddings"),
        ("/llm/v1", 0, "/llm/v1/chat/completions", "/llm/v1/embeddings"),
        ("/v1/models", 0, CHAT, "/v1/embeddings"),
        ("/llm/v1/models/", 1, "/llm/v1/chat/completions", "/llm/v1/embeddings"),
        ("/llm/v1/audio/transcriptions", 0, "/llm/v1/chat/completions", "/llm/v1/embeddings"),
        ("/generate", 0, "/generate", "/v1/embeddings"),
        ("/generate", 1, CHAT, "/v1/embeddings"),
        ("/generate", 9, CHAT, "/v1/embeddings"),
    ],
)
def test_the_interface_lies_where_the_registered_url_says(api: str, kind: int, chat: str, embeddings: str) -> None:
    paths = ModelPaths(api, kind)
    assert paths.target("POST", f"{CHAT}?a=%2F&b") == f"{chat}?a=%2F&b"
    assert paths.target("POST", "/v1/embeddings") == embeddings


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/"),
        ("GET", "/slots"),
        ("POST", "/v1/load_lora_adapter"),
        ("DELETE", "/v1/models/Llama3-8B"),
        ("POST", "/v1/models"),
        ("GET", CHAT),
        ("POST", f"{CHAT}/"),
        ("POST", f"/{CHAT}"),
        ("POST", "/V1/chat/completions"),
        ("POST", "/v1/chat/completions%2f.."),
        ("POST", "/v1/audio"),
        ("POST", "/v1/audio/../load_lora_adapter"),
        ("POST", "/v1/audio/x/%2e%2E/%2e./api/delete"),
        ("POST", "/v1/audio/..;x/api"),
        ("POST", "/v1/audio/%252e%252e/api"),
        ("POST", "/v1/audio/..%5capi"),
        ("POST", "/v1/audio/..%2Fapi"),
        ("GET", "/v1/models/../../slots"),
        ("DELETE", "/api/delete"),
    ],
)
def test_nothing_else_on_the_servers_port_is_reached(method: str, target: str) -> None:
    assert ModelPaths(CHAT, 0).target(method, target) is None


def test_a_registration_declares_what_may_be_called_besides() -> None:
    paths = ModelPaths("/sd/txt2img", 1, ["/health", "/api/"])
    assert paths.target("POST", "/v1/images/generations") == "/sd/txt2img"
    for target in ("/sd/txt2img", "/health", "/api/", "/api/task?id=/../x", "/api/a%20b"):
        assert paths.target("GET", target) == target
    for target in ("/healthz", "/health/", "/api", "/apiary", "/api/../sd", "/sd/", "/sd/txt2img/x"):
        assert paths.target("GET", target) is None, target
    everything = ModelPaths("", 0, ["/"])
    assert everything.target("PATCH", "/a/../b") == "/a/../b"
    assert everything.target("POST", "/v1/audio/speech") == "/v1/audio/speech"


def test_models_with_a_slash_in_their_name_are_looked_up() -> None:
    paths = ModelPaths("/llm/v1", 0)
    assert paths.target("GET", "/v1/models/meta%2Fsmall") == "/llm/v1/models/meta%2Fsmall"
    assert paths.target("HEAD", "/v1/models") == "/llm/v1/models"


@pytest.mark.parametrize("path", ["", "x", "/a?b", "/a#b", "/a b", "/\u00e9", "/../x", "/%2e%2e/", "/a\n", "/" * 300])
def test_what_is_no_path_is_not_declared(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        declared_path(path)


@given(st.text(alphabet="/.%2eEfF5c;v1audio\\", max_size=30))
def test_no_spelling_leaves_a_declared_folder(rest: str) -> None:
    found = ModelPaths(CHAT, 0, ["/own/"]).target("GET", "/own/" + rest)
    if found is not None:
        decoded = found.replace("%2e", ".").replace("%2E", ".").replace("%2f", "/").replace("%2F", "/")
        assert ".." not in [part.partition(";")[0] for part in decoded.replace("\\", "/").split("/")]
