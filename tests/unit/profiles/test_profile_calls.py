"""Declared calls in the OpenAPI document: every one that is answered, in the words of its declaration."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from ngpu_bootstrap.api.profile_calls import ProfileCalls
from ngpu_bootstrap.config import ProfilesSection
from ngpu_bootstrap.errors import Refusal
from ngpu_bootstrap.profiles.catalogue import Catalogue, Matched, load_catalogue, parse_profile, shipped_names
from ngpu_bootstrap.profiles.declaration import Dialect
from ngpu_bootstrap.profiles.dialects import refusal_in

OWN = """
name = "mine"
dialect = "ngpu"
credentials = [
  { in = "query", name = "key" }, { in = "header", name = "X-Key" }, { in = "json", pointer = "/token" },
  { in = "form", name = "token" },
]
[[routes]]
path = "/mine/draw/{style}"
affinity = [{ in = "cookie", name = "sid" }]
schema = { type = "object", required = ["size"], properties = { size = { "$ref" = "#/$defs/size" } }, "$defs" = { size = { enum = [1, 2] } } }
[[routes]]
path = "/mine/upload/{rest...}"
form = { required = ["file"], allowed = ["file", "note"], once = ["note"] }
[[routes]]
method = "GET"
path = "/mine/draw/{id}"
"""  # noqa: E501


def document(catalogue: Catalogue, public: tuple[str, ...] = ()) -> dict[str, Any]:
    made: dict[str, Any] = {"paths": {}}
    ProfileCalls(catalogue, public, 1 << 28).add_to(made)
    return made


def own(**more: Any) -> dict[str, Any]:
    return document(Catalogue([parse_profile(OWN, "mine.toml")]), **more)


def test_every_call_of_an_enabled_profile_is_there_once_and_no_other() -> None:
    catalogue = load_catalogue(ProfilesSection(enabled=shipped_names()))
    paths = document(catalogue)["paths"]
    listed = {(method.upper(), path) for path, operations in paths.items() for method in operations}
    declared = {
        (route.method, route.path.replace("...}", "}"))
        for profile in catalogue.profiles
        for route in profile.routes
        if (profile.name, route.path) != ("akashgen", "/health")  # on its own listener
    }
    assert listed == declared
    for method, path in listed:
        found = catalogue.match(method, path.replace("{", "").replace("}", ""))
        assert isinstance(found, Matched)
        assert paths[path][method.lower()]["tags"] == [f"profile {found.profile.name}"]


@pytest.mark.parametrize("dialect", list(Dialect))
@pytest.mark.parametrize("status", [400, 401, 404, 413, 429, 502, 503, 504])
def test_the_shape_of_errors_is_that_of_the_dialect(dialect: Dialect, status: int) -> None:
    made = document(Catalogue([parse_profile(f'name="a"\ndialect="{dialect}"\n[[routes]]\npath="/a/b"\n', "x")]))
    answer = refusal_in(dialect, Refusal(status, "no_free_slot", "none was free"), task_id="T")
    described = made["paths"]["/a/b"]["post"]["responses"][str(answer.status)]["content"]["application/json"]
    schema = made["components"]["schemas"][described["schema"]["$ref"].rpartition("/")[2]]
    for shown in (json.loads(answer.body), described["example"]):
        jsonschema.validate(shown, {**schema, "additionalProperties": False})


def test_a_bodys_schema_stands_there_whole_with_the_place_of_the_credential() -> None:
    body = own()["paths"]["/mine/draw/{style}"]["post"]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    assert schema["required"] == ["size"]
    assert schema["properties"]["size"] == {"enum": [1, 2]}
    assert "workspace token" in schema["properties"]["token"]["description"]
    jsonschema.Draft202012Validator.check_schema(schema)


def test_paths_that_match_alike_are_one_with_the_names_of_the_first() -> None:
    paths = own()["paths"]
    assert set(paths["/mine/draw/{style}"]) == {"post", "get"}
    (parameter,) = paths["/mine/draw/{style}"]["get"]["parameters"]
    assert (parameter["name"], parameter["in"], parameter["required"]) == ("style", "path", True)
    named = {(one["name"], one["in"]) for one in paths["/mine/draw/{style}"]["post"]["parameters"]}
    assert named == {("style", "path"), ("sid", "cookie")}


def test_a_form_has_its_fields_and_their_bounds() -> None:
    content = own()["paths"]["/mine/upload/{rest}"]["post"]["requestBody"]["content"]
    assert set(content) == {"multipart/form-data"}
    form = content["multipart/form-data"]["schema"]
    assert form["required"] == ["file"]
    assert set(form["properties"]) == {"file", "note", "token"}
    assert form["properties"]["file"]["type"] == "array"
    assert form["additionalProperties"] is False


def test_who_may_call_is_said_with_every_place_of_a_credential() -> None:
    made = own()
    security = made["paths"]["/mine/draw/{style}"]["post"]["security"]
    assert security == [{}, {"query-key": []}, {"header-x-key": []}, {"ngpuToken": []}]
    schemes = made["components"]["securitySchemes"]
    assert (schemes["query-key"]["in"], schemes["query-key"]["name"]) == ("query", "key")
    assert schemes["ngpuToken"]["name"] == "Ngpu-Token"
    akashgen = load_catalogue(ProfilesSection(enabled=("akashgen",)))
    closed, opened = (
        document(akashgen, public)["paths"]["/api/generate"]["post"]["security"] for public in ((), ("akashgen",))
    )
    assert ({} in closed, {} in opened) == (False, True)
