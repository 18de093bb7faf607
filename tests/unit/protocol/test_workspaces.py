"""What a workspace specification accepts, and what it says about the rest."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.workspaces import RESERVED_API_NAMES, Api, WorkspaceSpec, describe_errors

MINIMAL: dict[str, Any] = {"id": "1001", "name": "paint", "image": "registry:5000/paint:1", "ports": [8080]}
FULL: dict[str, Any] = {
    **MINIMAL,
    "revision": 2,
    "command": ["python", "-m", "paint"],
    "env": {"SEED": "1", "_x": ""},
    "ports": [8080, 8081],
    "apis": [
        {"name": "createImage", "path": "/sdapi/v1/txt2img", "port": 8080},
        {"name": "startSync", "method": "GET", "path": "/start?fast=1", "port": 8081, "mode": "async"},
    ],
    "concurrency": 8,
    "request_timeout_s": 600,
    "gpu_count": 2,
    "gpu_types": ["RTX4090", "NVIDIA GeForce RTX 3090"],
    "readiness_path": "/health",
    "memory_bytes": 8 * 2**30,
    "cpus": 2.5,
    "min_gpu_memory_bytes": 24 * 2**30,
    "secret_env": ["HF_TOKEN"],
    "has_registry_credentials": True,
    "image_digest": "sha256:" + "11" * 32,
    "readiness_timeout_s": 120,
    "shm_bytes": 2**30,
    "volumes": [{"name": "models", "path": "/models"}, {"name": "cache", "path": "/root/.cache"}],
    "egress": True,
    "replicas": 3,
    "area": "eu",
    "group": "pictures",
    "end_at": "2030-01-31T18:00:00Z",
}


def an_api(**changes: Any) -> dict[str, Any]:
    return {"apis": [{"name": "run", "path": "/run", "port": 8080, **changes}]}


def test_defaults_are_the_documented_ones() -> None:
    spec = WorkspaceSpec.model_validate(MINIMAL)
    assert (spec.revision, spec.concurrency, spec.request_timeout_s, spec.gpu_count) == (1, 4, 300.0, 0)
    assert (spec.readiness_path, spec.service, spec.apis, spec.env) == ("/", None, [], {})
    api = WorkspaceSpec.model_validate({**MINIMAL, **an_api()}).api("run")
    assert api is not None
    assert (api.method, api.mode) == ("POST", "sync")


def test_specification_survives_the_wire() -> None:
    spec = WorkspaceSpec.model_validate(FULL)
    assert WorkspaceSpec.from_wire(spec.to_wire()) == spec
    assert WorkspaceSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.api("startSync") == spec.apis[1]
    assert spec.api("stop") is None


@pytest.mark.parametrize(
    "text", ["2030-01-31T18:00:00Z", "2030-01-31T18:00:00", "2030-01-31T19:00:00+01:00", 1_896_112_800_000]
)
def test_end_is_a_date_time_or_milliseconds(text: object) -> None:
    assert WorkspaceSpec.model_validate({**MINIMAL, "end_at": text}).end_at == 1_896_112_800_000


def test_image_may_come_from_a_url() -> None:
    spec = WorkspaceSpec.model_validate({**MINIMAL, "image": None, "image_url": "https://example.com/a/i.tar?x=1"})
    assert spec.is_image
    assert WorkspaceSpec.model_validate({**spec.to_wire(), "image_sha256": "0a" * 32}).image_sha256 == "0a" * 32


def test_change_of_place_leaves_what_runs() -> None:
    spec = WorkspaceSpec.model_validate(FULL)
    moved = {"name": "other", "replicas": None, "area": "us", "group": "", "end_at": None, "image_digest": None}
    assert WorkspaceSpec.model_validate({**FULL, **moved}).runs_like(spec)
    for field, value in {"image": "other", "env": {}, "egress": False, "revision": 3, "concurrency": 1}.items():
        assert not WorkspaceSpec.model_validate({**FULL, field: value}).runs_like(spec), field
    assert not WorkspaceSpec.model_validate({**FULL, "image_digest": "sha256:" + "22" * 32}).runs_like(spec)


def test_earlier_versions_specification_is_taken() -> None:
    spec = WorkspaceSpec.from_wire(MINIMAL)
    assert (spec.replicas, spec.egress, spec.volumes, spec.has_secrets, spec.image_digest) == (
        None,
        False,
        [],
        False,
        None,
    )


def test_registered_service_takes_the_place_of_an_image() -> None:
    for service in ("acme/llama-3.1-8b", "acme/meta-org/Llama-9B", "a/b", "a/" + "b" * 128):
        document = {**MINIMAL, "image": None, "service": service}
        assert WorkspaceSpec.model_validate(document).service == service


@pytest.mark.parametrize("name", ["a", "createImage", "sadTalker", "A_1", "a" * 64, "loginX", "Login"])
def test_api_names_of_the_documented_shape_are_taken(name: str) -> None:
    assert WorkspaceSpec.model_validate({**MINIMAL, **an_api(name=name)}).api(name)


@pytest.mark.parametrize(
    "name", ["", "1a", "_a", "a-b", "a b", "a/b", "a" * 65, "run\n", "rün", *sorted(RESERVED_API_NAMES)]
)
def test_other_and_reserved_api_names_are_refused(name: str) -> None:
    with pytest.raises(ValidationError) as refused:
        WorkspaceSpec.model_validate({**MINIMAL, **an_api(name=name)})
    assert refused.value.errors()[0]["loc"] == ("apis", 0, "name")


def test_reserved_names_are_the_gateways_own_calls() -> None:
    documented = {"schedulingTask", "queryTask", "queryTaskList", "queryNodes", "getTasksFromNode", "getDetailed"}
    clients = {"getTask", "getTasks", "getNodes", "getNode", "getBalance", "newAccount", "nodeRegister", "login"}
    assert documented | clients == RESERVED_API_NAMES


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"id": "x1"}, "id"),
        ({"id": "0"}, "id"),
        ({"id": 1001}, "id"),
        ({"id": "1001\n"}, "id"),
        ({"id": "9" * 20}, "id"),
        ({"revision": 0}, "revision"),
        ({"revision": 2**32}, "revision"),
        ({"name": ""}, "name"),
        ({"name": "a\x1b[31m"}, "control characters"),
        ({"image": None}, "exactly one of image, image_url and service"),
        ({"service": "a/b"}, "exactly one of image, image_url and service"),
        ({"image": "a b"}, "image"),
        ({"image": ""}, "image"),
        ({"image": None, "service": "llama"}, "service"),
        ({"image": None, "service": "a/b/"}, "service"),
        ({"image": None, "service": "a//b"}, "service"),
        ({"image": None, "service": "a/b c"}, "service"),
        ({"image": None, "service": "a/" + "b" * 129}, "service"),
        ({"ports": []}, "ports"),
        ({"ports": [0]}, "ports.0"),
        ({"ports": [65536]}, "ports.0"),
        ({"ports": ["8080"]}, "ports.0"),
        ({"ports": [True]}, "ports.0"),
        ({"ports": [8080, 8080]}, "each port may appear once"),
        ({"ports": list(range(1, 66))}, "ports"),
        (an_api(port=8081), "run uses port 8081, which is not among ports"),
        (an_api(method="post"), "method"),
        (an_api(method="GET /x HTTP/1.1\r\n"), "method"),
        (an_api(mode="later"), "mode"),
        (an_api(retries=3), "retries"),
        ({"apis": [an_api()["apis"][0]] * 2}, "each name may appear once"),
        ({"env": {"A=B": "1"}}, "environment variable"),
        ({"env": {"1A": "1"}}, "environment variable"),
        ({"env": {"A": "\0"}}, "NUL"),
        ({"env": {"A": 1}}, "env.A"),
        ({"command": ["\0"]}, "NUL"),
        ({"command": "python -m x"}, "command"),
        ({"concurrency": 0}, "concurrency"),
        ({"request_timeout_s": 0}, "request_timeout_s"),
        ({"request_timeout_s": float("inf")}, "request_timeout_s"),
        ({"request_timeout_s": float("nan")}, "request_timeout_s"),
        ({"gpu_count": -1}, "gpu_count"),
        ({"memory_bytes": 1000}, "memory_bytes"),
        ({"cpus": 0}, "cpus"),
        ({"readiness_path": "health"}, "readiness_path"),
        ({"gpus": 1}, "gpus"),
        ({"image_url": "https://example.com/i.tar"}, "exactly one of image, image_url and service"),
        ({"image": None, "image_url": "ftp://example.com/i.tar"}, "http:// or https://"),
        ({"image": None, "image_url": "https://u:p@example.com/i.tar"}, "without user name, password"),
        ({"image": None, "image_url": "https://example.com/i.tar#x"}, "fragment"),
        ({"image_sha256": "11" * 32}, "image_sha256"),
        ({"image_sha256": "AA" * 32}, "image_sha256"),
        ({"image_digest": "11" * 32}, "image_digest"),
        ({"image": None, "service": "a/b", "has_registry_credentials": True}, "only an image from a registry"),
        ({"secret_env": ["A=B"]}, "environment variable"),
        ({"secret_env": ["A", "A"]}, "each name may appear once"),
        ({"secret_env": {"A": "value"}}, "secret_env"),
        ({"env": {"A": "1"}, "secret_env": ["A"]}, "A is in env too"),
        ({"min_gpu_memory_bytes": 1}, "without a gpu_count"),
        ({"shm_bytes": -1}, "shm_bytes"),
        ({"shm_bytes": 2**30, "memory_bytes": 2**29}, "part of memory_bytes"),
        ({"volumes": [{"name": "../up", "path": "/m"}]}, "volumes.0.name"),
        ({"volumes": [{"name": "m", "path": "models"}]}, "absolute path"),
        ({"volumes": [{"name": "m", "path": "/"}]}, "volumes.0.path"),
        ({"volumes": [{"name": "m", "path": "/a/../b"}]}, ".. segments"),
        ({"volumes": [{"name": "m", "path": "/proc/1"}]}, "/proc"),
        ({"volumes": [{"name": "m", "path": "/a:ro"}]}, "absolute path"),
        ({"volumes": [{"name": "m", "path": "/a"}, {"name": "m", "path": "/b"}]}, "each name may appear once"),
        ({"volumes": [{"name": "m", "path": "/a"}, {"name": "n", "path": "/a"}]}, "each path may appear once"),
        ({"replicas": 0}, "replicas"),
        ({"readiness_timeout_s": 0}, "readiness_timeout_s"),
        ({"egress": 1}, "egress"),
        ({"area": "e\n"}, "control characters"),
        ({"end_at": "tomorrow"}, "end_at: must be a date-time"),
        ({"end_at": 1.5}, "end_at"),
    ],
)
def test_wrong_field_is_refused_by_its_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        WorkspaceSpec.model_validate({**MINIMAL, **changes})
    assert says in describe_errors(refused.value)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "run",
        "//evil.example/x",
        "http://evil.example/",
        "/..",
        "/a/../b",
        "/a/./b",
        "/a/%2e%2E/b",
        "/a/.%2e",
        "/a%2f..%2fb",
        "/a%5C..%5Cb",
        "/a b",
        "/a#b",
        "/a\\b",
        "/a\r\nX: y",
        "/é",
        "/" + "a" * 2048,
    ],
)
def test_path_that_is_not_plainly_inside_the_workspace_is_refused(path: str) -> None:
    with pytest.raises(ValidationError):
        WorkspaceSpec.model_validate({**MINIMAL, **an_api(path=path)})
    with pytest.raises(ValidationError):
        WorkspaceSpec.model_validate({**MINIMAL, "readiness_path": path})


@pytest.mark.parametrize("path", ["/", "/a..b", "/...", "/.well-known/x", "/a?next=/../b", "/a%20b", "/~x/*;v=1"])
def test_path_with_harmless_dots_is_taken(path: str) -> None:
    WorkspaceSpec.model_validate({**MINIMAL, **an_api(path=path)})


def test_error_text_never_repeats_a_value() -> None:
    with pytest.raises(ValidationError) as refused:
        WorkspaceSpec.model_validate({**MINIMAL, "env": {"TOKEN": "s3cret\0"}, "cpus": "s3cret"})
    assert "s3cret" not in describe_errors(refused.value)
    assert "s3cret" not in repr(WorkspaceSpec.model_validate({**MINIMAL, "env": {"TOKEN": "s3cret"}}))


def test_error_text_stays_short() -> None:
    with pytest.raises(ValidationError) as refused:
        WorkspaceSpec.model_validate({**MINIMAL, "ports": [0] * 60})
    assert describe_errors(refused.value).endswith("and 55 more")


def test_unknown_key_is_a_mistake_at_the_api_and_a_later_version_on_the_wire() -> None:
    document = {**MINIMAL, "tpus": 1, "apis": [{**an_api()["apis"][0], "retries": 3}]}
    with pytest.raises(ValidationError):
        WorkspaceSpec.model_validate(document)
    assert WorkspaceSpec.from_wire(document) == WorkspaceSpec.model_validate({**MINIMAL, **an_api()})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(sorted(FULL)), inner),
        max_leaves=12,
    )
)
def test_any_other_document_on_the_wire_is_malformed(document: Any) -> None:
    with pytest.raises(MalformedError):
        WorkspaceSpec.from_wire(document)


@given(st.sampled_from(sorted(FULL)), st.none() | st.integers() | st.floats() | st.text() | st.binary() | st.just([]))
def test_any_value_in_any_field_is_taken_or_malformed(field: str, value: Any) -> None:
    try:
        spec = WorkspaceSpec.from_wire({**FULL, field: value})
    except MalformedError:
        return
    assert WorkspaceSpec.from_wire(spec.to_wire()) == spec


def _with_schema(schema: dict[str, Any]) -> WorkspaceSpec:
    api = {"name": "a", "path": "/a", "port": 80, "body_schema": schema}
    return WorkspaceSpec(id="1", name="w", image="x", ports=[80], apis=[Api.model_validate(api)])


def test_an_api_may_say_what_its_body_is() -> None:
    schema = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "maxLength": 5}}}
    spec = _with_schema(schema)
    assert WorkspaceSpec.from_wire(spec.to_wire()) == spec
    assert (
        "body_schema"
        not in WorkspaceSpec(
            id="1", name="w", image="x", ports=[80], apis=[Api(name="a", path="/a", port=80)]
        ).to_wire()["apis"][0]
    )


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "strin"}, "is no JSON schema"),
        ({"properties": {"a": {"pattern": "(a+)+$"}}}, "must not use 'pattern'"),
        ({"items": {"$ref": "https://example.org/x"}}, "must not use '\\$ref'"),
        ({"anyOf": [{}]}, "must not use 'anyOf'"),
        ({"properties": {"a": 5}}, "no schema"),
        ({"description": "x" * 40_000}, "at most"),
    ],
)
def test_what_would_be_slow_to_check_is_no_schema_here(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        _with_schema(schema)
