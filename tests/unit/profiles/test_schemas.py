"""Schemas of bodies: which may be declared, so that no caller can take what others need, and what is said of bodies."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import pytest
from trio.testing import trio_test

from ngpu_bootstrap.errors import BadRequest
from ngpu_bootstrap.front.tasks_api import read_wrapped
from ngpu_bootstrap.profiles.catalogue import ProfileError, parse_profile
from ngpu_bootstrap.profiles.reading import BodyReader, wanted_of
from ngpu_bootstrap.profiles.schemas import MAX_STEPS, check_declared, check_document, steps_of, validator_of
from ngpu_bootstrap.profiles.strict_json import MAX_VALUES, SHORT_BYTES, read_json

LONG = 1_000_000


@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        ("(a+)+$", 100),
        ("^(a|a)*$", 64),
        ("^(?:a{0,30}){0,30}b", 99),
        ("^" + "a?" * 30 + "a" * 30, 60),
        ("^(?=(a+)+$)", 64),
        ("^(?>(a+)+b)", 64),
        ("^(?:(a+)+b)++", 64),
        (".*.*.*x", 4000),
        ("[a-z]+x", 100_000),
        ("(?m)^a+b", 100_000),
    ],
)
def test_a_pattern_that_a_text_could_keep_busy_is_not_declared(pattern: str, length: int) -> None:
    assert steps_of(pattern, length) > MAX_STEPS
    with pytest.raises(ValueError, match=r"pattern at #/properties/a that a text of \d+ characters can keep busy"):
        check_declared({"properties": {"a": {"pattern": pattern, "maxLength": length}}}, LONG)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("^[a-z]+$", "a" * LONG + "!"),
        ("^[a-z]++(?:-[a-z]++)*+$", "a-" * (LONG // 2)),
        (r"^(\d{1,3}\.){3}\d{1,3}$", "1" * LONG),
        ("^[0-9a-f]{8}-[0-9a-f]{4}$", "f" * LONG),
        ("^(foo|bar)$", "foo" * (LONG // 3)),
        (r"\S", " " * LONG),
    ],
)
def test_a_pattern_that_may_be_declared_is_quick_on_the_longest_text(pattern: str, text: str) -> None:
    check_declared({"pattern": pattern}, LONG)
    began = time.process_time()
    re.search(pattern, text)
    assert time.process_time() - began < 5


def test_the_worst_that_is_allowed_is_bounded_by_its_length() -> None:
    schema = {"properties": {"a": {"type": "string", "pattern": ".*.*x", "maxLength": 250}}}
    check_declared(schema, LONG)
    began = time.process_time()
    with pytest.raises(BadRequest, match="a must match"):
        check_document(validator_of(schema), {"a": "y" * 250})
    # a text beyond the bound is not matched at all, only told that it is too long
    with pytest.raises(BadRequest) as caught:
        check_document(validator_of(schema), {"a": "y" * LONG})
    assert caught.value.message == "a must have at most 250 characters"
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"$ref": "https://example.org/schema.json"}, "only its own parts can be named"),
        ({"$ref": "other.json#/a"}, "only its own parts can be named"),
        ({"$ref": "#/$defs/gone"}, "schema has nothing at #/$defs/gone"),
        ({"$ref": "#"}, "refers to itself"),
        (
            {"$ref": "#/$defs/tree", "$defs": {"tree": {"properties": {"left": {"$ref": "#/$defs/tree"}}}}},
            "refers to itself at #/$ref/properties/left",
        ),
        ({"$id": "https://example.org/x"}, "must not use $id"),
        ({"uniqueItems": True}, "needs maxItems of at most 1000 beside uniqueItems"),
        ({"properties": {"a": {"pattern": "("}}}, "no JSON schema at /properties/a/pattern"),
        ({"patternProperties": {"(a+)+$": {}}}, "can keep busy"),
        ({"description": "x" * 40_000}, "at most 32768 characters"),
        ({"type": "objekt"}, "no JSON schema at /type"),
        (
            {
                "$defs": {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(30)}
                | {"d30": {"type": "string"}},
                "$ref": "#/$defs/d0",
            },
            "more than 10000 parts",
        ),
    ],
)
def test_a_schema_that_could_cost_anything_is_said_at_the_start(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        check_declared(schema, LONG)
    text = f"name = 'mine'\n[[routes]]\npath = '/mine'\nmax_body_bytes = {LONG}\nschema = {_toml(schema)}\n"
    with pytest.raises(ProfileError, match=r"mine\.toml: routes\[POST /mine\]: schema"):
        parse_profile(text, "mine.toml")


def test_a_schema_nested_beyond_all_measure_is_said_at_the_start() -> None:
    schema: dict[str, Any] = {}
    for _ in range(400):
        schema = {"not": schema}
    with pytest.raises(ValueError, match="nested too deeply"):
        check_declared(schema, LONG)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {_toml(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    return json.dumps(value)


def test_a_reference_to_a_part_of_its_own_is_followed() -> None:
    schema = {"properties": {"a": {"$ref": "#/$defs/n"}, "b": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"minimum": 1}}}
    check_declared(schema, LONG)
    with pytest.raises(BadRequest, match="b must be at least 1"):
        check_document(validator_of(schema), {"a": 1, "b": 0})


def test_only_the_first_problems_of_a_body_are_looked_for() -> None:
    began = time.process_time()
    with pytest.raises(BadRequest) as caught:
        check_document(validator_of({"items": {"type": "string"}}), [0] * 1_000_000)
    assert caught.value.message.endswith("; and more")
    assert caught.value.message.count("must be of type string") == 5
    assert time.process_time() - began < 1


def test_a_body_of_too_many_values_is_refused_before_it_is_parsed() -> None:
    profile = parse_profile("name = 'mine'\n[[routes]]\npath = '/mine'\nschema = {}\n", "x")
    reader = BodyReader(wanted_of(profile, profile.routes[0]), b"application/json")
    reader.feed(b'{"a":[' + b"0," * MAX_VALUES + b"0]}")
    assert reader.is_long
    with pytest.raises(BadRequest) as caught:
        reader.end()
    assert (caught.value.status, caught.value.reason) == (413, "too_many_values")


def test_a_name_given_twice_is_found_in_one_pass() -> None:
    names = [*(f'"{number}":0' for number in range(MAX_VALUES - 2)), '"z":0', '"z":1']
    body = ("{" + ",".join(names) + "}").encode()
    began = time.process_time()
    with pytest.raises(BadRequest, match="names 'z' more than once"):
        read_json(body)
    assert time.process_time() - began < 2, "comparing each with each takes half a minute"


@trio_test
async def test_a_long_body_of_a_named_api_is_judged_in_a_thread_and_bounded() -> None:
    threads: list[int] = []

    class Noted(dict[str, Any]):
        def get(self, *arguments: Any) -> Any:
            threads.append(threading.get_ident())
            return super().get(*arguments)

    schema = Noted(type="object")
    for body, here in ((b"{}", True), (b'{"a":"%b"}' % (b"x" * SHORT_BYTES), False)):
        threads.clear()
        assert (await read_wrapped(body, b"application/json", schema)).body == body
        assert threads
        assert {one == threading.get_ident() for one in threads} == {here}
    with pytest.raises(BadRequest) as caught:
        await read_wrapped(b"[" + b"0," * MAX_VALUES + b"0]", b"application/json", {})
    assert (caught.value.status, caught.value.reason) == (413, "too_many_values")


def test_a_body_nested_beyond_all_measure_is_refused() -> None:
    deep: Any = []
    for _ in range(20_000):
        deep = [deep]
    other: Any = []
    for _ in range(20_000):
        other = [other]
    with pytest.raises(BadRequest, match="nested too deeply"):
        check_document(validator_of({"const": deep}), other)
