"""The form of a profile: what it may say, and what an operator who mistyped is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ngpu_bootstrap.config import ProfilesSection
from ngpu_bootstrap.profiles.catalogue import (
    Catalogue,
    Matched,
    ProfileError,
    WrongMethod,
    load_catalogue,
    parse_profile,
    read_shipped,
    shipped_names,
)

MINIMAL = """
name = "mine"
[[routes]]
path = "/mine/run"
"""


def declared(extra: str = "", text: str = MINIMAL) -> Any:
    return parse_profile(text + extra, "mine.toml")


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_profile_is_valid_and_named_like_its_file(name: str) -> None:
    assert read_shipped(name).name == name


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("pathh = 1", 'routes[POST /mine/run].pathh is not a known key; did you mean "path"?'),
        ('mode = "fixed"', 'mode = "fixed" and an answer go together'),
        ('mode = "job"', "a table [routes.job] go together"),
        ('mode = "transparant"', "routes[POST /mine/run].mode: must be one of transparent, wrapped, job"),
        ('mode = "transparant"', 'did you mean "transparent"?'),
        ('target = "run/{id}"', ".target: must begin with one /"),
        ('target = "//evil/x"', ".target: must begin with one /"),
        ('target = "/a/%2e%2e/b"', ".target: must not climb"),
        ('target = "/a b"', ".target: must hold only what a path and a query may"),
        ('method = "post"', "routes[post /mine/run].method: must be a method in capital letters"),
        ('method = "CONNECT"', "CONNECT is not declared"),
        ('queue = "5"', ".queue: must be a whole number"),
        ("queue_wait_s = -3", ".queue_wait_s: must be at least 0"),
        ('file_urls = "yes"', ".file_urls: must be true or false"),
        ('gpu_types = "A100"', ".gpu_types: must be a list"),
        ('mode = "fixed"\nanswer = { text = "x" }\ngpu_types = ["A100"]\nat_once = 1', "at_once, gpu_types would have"),
        ('mode = "models"\nmethod = "GET"\nschema = {}', "schema would have no effect"),
        ('mode = "job"\njob = { of = "x", key = { in = "path", name = "id" } }', "job.key names {id}, which is not"),
        ('target = "/run/{id}"', "target uses {id}, which is not in path"),
        ('schema = { type = "objekt" }', "schema is no JSON schema at /type"),
        ("max_body_bytes = 99_000_000\nschema = {}", "max_body_bytes is at most"),
        ('affinity = [{ in = "path", name = "id" }]', "affinity names {id}, which is not in path"),
        ('affinity = [{ in = "json", name = "id" }]', 'in = "json" needs a pointer'),
        ('affinity = [{ in = "json", pointer = "id" }]', "must be a JSON pointer"),
        ('affinity = [{ in = "cookie" }]', 'in = "cookie" needs a name'),
        ('envelope = { member = "data" }', 'an envelope needs mode = "wrapped"'),
        ('at_once = "$missing"', "$missing names no setting"),
        ('mode = "models"', 'mode = "models" takes method = "GET"'),
        ('mode = "models"\nmethod = "GET"', 'mode = "models" needs workspace = "model"'),
        ("[settings]\nlimit = 3", 'settings.limit: nothing uses it as "$limit"'),
        (
            'mode = "job"\njob = { ide = ["/x"] }',
            'routes[POST /mine/run].job.ide is not a known key; did you mean "id"?',
        ),
        ('mode = "job"\njob = { of = "x", kee = 1 }', '.job.kee is not a known key; did you mean "key"?'),
        ('links = { prefx = "/x" }', '.links.prefx is not a known key; did you mean "prefix"?'),
        ('affinity = [{ in = "query", nam = "x" }]', 'nam is not a known key; did you mean "name"?'),
    ],
)
def test_a_declaration_that_makes_no_sense_names_the_route_and_the_key(extra: str, words: str) -> None:
    with pytest.raises(ProfileError) as caught:
        declared(extra)
    assert words in str(caught.value)
    assert "mine.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ('listen = "banana"', "'banana' is not HOST:PORT"),
        ('name = "Mine!"', "name: must match"),
        ('credentials = [{ where = "header", name = "x" }]', "credentials[0].where is not a known key"),
        ('credentials = [{ in = "header", name = "Host" }]', "the header Host has another meaning"),
        ('credentials = [{ in = "header", name = "Ngpu-Node" }]', "the header Ngpu-Node has another meaning"),
    ],
)
def test_what_a_profile_cannot_be_is_said(head: str, words: str) -> None:
    with pytest.raises(ProfileError) as caught:
        parse_profile(
            MINIMAL.replace('name = "mine"', head if head.startswith("name") else f'name = "mine"\n{head}'), "x"
        )
    assert words in str(caught.value)


def test_every_problem_of_a_declaration_is_said_at_once() -> None:
    text = """
name = "mine"
settings = { places = 4 }
[[routes]]
path = "/mine/1"
at_once = "$place"
[[routes]]
path = "/mine/2"
queue = "$missing"
port = 70_000
"""
    with pytest.raises(ProfileError) as caught:
        parse_profile(text, "mine.toml")
    assert caught.value.problems == (
        "mine.toml: $missing names no setting; [settings] has places",
        "mine.toml: $place names no setting; [settings] has places",
        'mine.toml: settings.places: nothing uses it as "$places"',
        "mine.toml: routes[POST /mine/2].port: must be at most 65535",
    )
    text = """
name = "mine"
[[routes]]
path = "/mine/1"
[[routes]]
path = "/mine/1"
[[routes]]
path = "/proxy/1"
"""
    with pytest.raises(ProfileError) as caught:
        parse_profile(text, "mine.toml")
    assert [line.partition(": ")[2] for line in caught.value.problems] == [
        "routes: POST /mine/1 is declared twice",
        "routes: /proxy/1: this path is the bootstrap's own; choose another",
    ]


def test_a_route_that_takes_all_of_a_folder_leaves_the_bootstraps_own_calls_alone() -> None:
    text = 'name = "mine"\n[[routes]]\npath = "/api/{rest...}"\n[[routes]]\npath = "/v1/{rest...}"\nmethod = "GET"\n'
    catalogue = Catalogue([parse_profile(text, "x")])
    assert catalogue.match("POST", "/api/v1/tasks") is None
    assert catalogue.match("GET", "/v1/files/0x1/a.png") is None
    assert isinstance(catalogue.match("POST", "/api/v1b/task"), Matched)
    assert isinstance(catalogue.match("POST", "/api/v1/tasks", only="mine"), Matched), "on a listener of its own"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("mine", "must begin with /"),
        ("/mine//x", "no empty segment"),
        ("/mine/{rest...}/x", "can only be the last segment"),
        ("/mine/{Id}", "neither a literal segment"),
        ("/mine/{a}/{a}", "each {name} may appear once"),
        ("/mine/../x", "must not contain . or .. segments"),
        ("/mine/a b", "neither a literal segment"),
        ("/{anything}", "the first segment must be literal"),
        ("/proxy/1", "the bootstrap's own"),
        ("/user/x", "the bootstrap's own"),
        ("/api/v1/tasks", "the bootstrap's own"),
        ("/v1/files/x", "the bootstrap's own"),
        ("/metrics", "the bootstrap's own"),
        ("/", "the bootstrap's own"),
    ],
)
def test_a_path_that_cannot_be_matched_or_is_our_own_is_refused(path: str, words: str) -> None:
    with pytest.raises(ProfileError) as caught:
        declared(text=MINIMAL.replace("/mine/run", path))
    assert words in str(caught.value)


@pytest.mark.parametrize("where", ["cookie", "path"])
def test_a_credential_may_not_stand_where_others_log_or_send_it(where: str) -> None:
    with pytest.raises(ProfileError, match="use another place"):
        parse_profile(f'credentials = [{{ in = "{where}", name = "token" }}]\n{MINIMAL}', "mine.toml")


def test_what_is_not_toml_or_not_there_is_said_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"x\.toml: not valid TOML"):
        parse_profile("a = ", "x.toml")
    with pytest.raises(ProfileError, match=r"cannot read the profile .*gone\.toml"):
        load_catalogue(ProfilesSection(files=(tmp_path / "gone.toml",)))


def test_one_start_tells_every_problem(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text('name = "broken"\n[[routes]]\npath = "x"\n')
    with pytest.raises(ProfileError) as caught:
        load_catalogue(ProfilesSection(enabled=("opnai",), files=(broken,), bind={"nobody": "1"}))
    assert len(caught.value.problems) == 3
    assert 'there is no profile "opnai"; did you mean "openai"?' in str(caught.value)
    assert "profiles.bind.nobody: no profile of this name is enabled" in str(caught.value)


def test_a_file_with_problems_is_not_called_unknown_beside_them(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text('name = "broken"\n[[routes]]\npath = "x"\n')
    with pytest.raises(ProfileError) as caught:
        load_catalogue(ProfilesSection(enabled=("broken",), files=(broken,), bind={"broken": "1"}))
    assert [line.partition(": ")[2][:6] for line in caught.value.problems] == ["routes"]


def test_a_file_whose_profile_is_not_enabled_is_not_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(MINIMAL)
    with pytest.raises(ProfileError, match=r'profiles\.enabled does not name "mine", which .*mine\.toml declares'):
        load_catalogue(ProfilesSection(files=(file,)))


def test_what_needs_no_bound_workspace_is_not_bound() -> None:
    with pytest.raises(ProfileError, match=r'profiles\.bind\.openai: a profile with workspace = "model"'):
        load_catalogue(ProfilesSection(bind={"openai": "1"}))


def test_settings_fill_in_what_a_declaration_leaves_open() -> None:
    text = 'name = "mine"\nsettings = { places = 10 }\n[[routes]]\npath = "/mine/run"\nat_once = "$places"\n'
    assert parse_profile(text, "x").routes[0].at_once == 10
    assert parse_profile(text, "x", {"mine": {"places": 3}}).routes[0].at_once == 3
    with pytest.raises(ProfileError, match=r"profiles\.settings\.mine\.place: x has no such setting: places"):
        parse_profile(text, "x", {"mine": {"place": 3}})
    with pytest.raises(ProfileError, match="must be like 10"):
        parse_profile(text, "x", {"mine": {"places": "three"}})


def test_a_schema_keeps_its_dollar_signs() -> None:
    text = MINIMAL + 'max_body_bytes = 10\nschema = { "$ref" = "#/$defs/a", "$defs" = { a = { pattern = "$" } } }\n'
    schema = parse_profile(text, "x").routes[0].body_schema
    assert schema == {"$ref": "#/$defs/a", "$defs": {"a": {"pattern": "$"}}}


# -- which profile a call means


def catalogue(*texts: str) -> Catalogue:
    return Catalogue([parse_profile(text, "x") for text in texts])


ROUTES = """
name = "one"
[[routes]]
path = "/a/{id}"
[[routes]]
path = "/a/fixed"
[[routes]]
method = "GET"
path = "/a/{id}"
[[routes]]
method = "GET"
path = "/a/files/{rest...}"
"""


@pytest.mark.parametrize(
    ("method", "path", "route", "parameters"),
    [
        ("POST", "/a/fixed", "/a/fixed", {}),
        ("POST", "/a/7", "/a/{id}", {"id": "7"}),
        ("GET", "/a/7", "/a/{id}", {"id": "7"}),
        ("HEAD", "/a/7", "/a/{id}", {"id": "7"}),
        ("GET", "/a/files/x/y%2Fz", "/a/files/{rest...}", {"rest": "x/y%2Fz"}),
        ("GET", "/a/files", "/a/{id}", {"id": "files"}),
    ],
)
def test_the_most_literal_route_answers(method: str, path: str, route: str, parameters: dict[str, str]) -> None:
    found = catalogue(ROUTES).match(method, path)
    assert isinstance(found, Matched)
    assert (found.route.path, found.parameters) == (route, parameters)


@pytest.mark.parametrize("path", ["/", "/b", "/a/", "/a/x/y", "/a/files/", "", "a/fixed", "/A/fixed"])
def test_other_paths_concern_no_profile(path: str) -> None:
    assert catalogue(ROUTES).match("POST", path) is None


def test_a_known_path_with_another_method_says_which_it_takes() -> None:
    found = catalogue(ROUTES).match("DELETE", "/a/fixed")
    assert isinstance(found, WrongMethod)
    assert set(found.allowed) == {"POST", "GET"}


def test_of_two_profiles_the_one_named_first_answers_and_what_the_other_lacks_is_listed() -> None:
    assert load_catalogue(ProfilesSection(enabled=("openai", "aimodel"))).covered[0].by == "openai"
    reverse = load_catalogue(ProfilesSection(enabled=("aimodel", "openai")))
    found = reverse.match("POST", "/v1/chat/completions")
    assert isinstance(found, Matched)
    assert found.profile.name == "aimodel"
    found = reverse.match("POST", "/v1/embeddings")
    assert isinstance(found, Matched)
    assert found.profile.name == "openai"


def test_parameters_of_another_name_are_the_same_call() -> None:
    both = catalogue(ROUTES, 'name = "two"\n[[routes]]\npath = "/a/{name}"\n')
    assert [(one.profile, one.by) for one in both.covered] == [("two", "one")]


def test_a_route_that_takes_all_calls_of_a_later_profile_is_listed_too() -> None:
    first = 'name = "first"\n[[routes]]\npath = "/a/{all...}"\n'
    later = "".join(f'[[routes]]\npath = "{path}"\n' for path in ("/a/b", "/a/{x}", "/a/b/{y...}", "/a", "/b/c"))
    both = catalogue(first, f'name = "two"\n{later}')
    assert [one.path for one in both.covered] == ["/a/b", "/a/b/{y...}", "/a/{x}"]
    found = both.match("POST", "/a/b")
    assert isinstance(found, Matched)
    assert found.profile.name == "first"
    one_segment = catalogue('name = "first"\n[[routes]]\npath = "/a/{x}"\n', 'name = "two"\n' + later)
    assert [one.path for one in one_segment.covered] == ["/a/b", "/a/{x}"]


def test_health_is_a_profiles_on_its_own_listener_only() -> None:
    own = catalogue('name = "two"\n[[routes]]\nmethod = "GET"\npath = "/health"\n')
    assert own.match("GET", "/health") is None
    assert isinstance(own.match("GET", "/health", only="two"), Matched)
    assert own.match("POST", "/a/fixed", only="two") is None


def test_an_operators_file_takes_the_place_of_a_shipped_profile(tmp_path: Path) -> None:
    file = tmp_path / "openai.toml"
    file.write_text('name = "openai"\n[[routes]]\npath = "/v1/chat/completions"\n')
    profiles = load_catalogue(ProfilesSection(enabled=("openai",), files=(file,))).profiles
    assert [len(profile.routes) for profile in profiles] == [1]
