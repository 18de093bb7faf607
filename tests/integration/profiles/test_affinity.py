"""Keys that hold calls on one node, wherever a profile says they stand: through a whole bootstrap, and a restart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from ngpu_protocol.http1 import Headers
from tests.integration.bootstrap.rig import Bootstrap, running, settings_for, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, new_account

PROFILE = """
name = "sticky"
credentials = [{in = "header", name = "Authorization"}]

[[routes]]
path = "/sticky/header"
affinity = [{in = "header", name = "X-Session"}]

[[routes]]
path = "/sticky/cookie"
affinity = [{in = "cookie", name = "sid"}]

[[routes]]
path = "/sticky/query"
affinity = [{in = "query", name = "of"}]

[[routes]]
path = "/sticky/member"
affinity = [{in = "json", pointer = "/member"}]

[[routes]]
path = "/sticky/deep"
affinity = [{in = "json", pointer = "/a/0/session~1id"}]

[[routes]]
path = "/sticky/form"
affinity = [{in = "form", name = "field"}]

[[routes]]
path = "/sticky/rooms/{room}/say"
affinity = [{in = "path", name = "room"}]

[[routes]]
path = "/sticky/either"
affinity = [{in = "header", name = "X-First"}, {in = "query", name = "second"}]
"""
SPEC = {"name": "w", "service": "demo/echo", "ports": [8080], "concurrency": 32, "request_timeout_s": 20}
JSON: Headers = [(b"content-type", b"application/json")]
URLENCODED: Headers = [(b"content-type", b"application/x-www-form-urlencoded")]
MULTIPART: Headers = [(b"content-type", b"multipart/form-data; boundary=x")]


@dataclass(frozen=True)
class Request:
    path: str
    headers: Headers
    body: bytes = b""


def part(value: str) -> bytes:
    return b'--x\r\ncontent-disposition: form-data; name="field"\r\n\r\n%b\r\n--x--\r\n' % value.encode()


PLACES: dict[str, Callable[[str], Request]] = {
    "header": lambda key: Request("/sticky/header", [(b"x-session", key.encode())]),
    "cookie": lambda key: Request("/sticky/cookie", [(b"cookie", b"other=1; sid=%b; more=2" % key.encode())]),
    "query": lambda key: Request(f"/sticky/query?x=1&of={key}", []),
    "member of JSON": lambda key: Request("/sticky/member", JSON, json.dumps({"member": key}).encode()),
    "deep in JSON": lambda key: Request("/sticky/deep", JSON, json.dumps({"a": [{"session/id": key}]}).encode()),
    "form, urlencoded": lambda key: Request("/sticky/form", URLENCODED, f"x=1&field={key}".encode()),
    "form, multipart": lambda key: Request("/sticky/form", MULTIPART, part(f"m-{key}")),
    "path": lambda key: Request(f"/sticky/rooms/{key}/say", []),
    "the first place that has one": lambda key: Request("/sticky/either?second=none", [(b"x-first", key.encode())]),
    "the second where the first has none": lambda key: Request(f"/sticky/either?second={key}", []),
}
KEYS = [f"k{number}" for number in range(8)]


def node(name: str) -> ScriptedNode:
    async def script(asked: Asked) -> None:
        await asked.read()
        await asked.answer(200, name.encode())

    return ScriptedNode(new_account(), script=script)


async def homes(bootstrap: Bootstrap) -> dict[tuple[str, str], bytes]:
    """Ask under every key at every place, all at once so that they are spread; return which node answered each."""
    found: dict[tuple[str, str], bytes] = {}

    async def ask(place: str, key: str) -> None:
        asked = PLACES[place](key)
        answer = await bootstrap.call("POST", asked.path, asked.body, list(asked.headers))
        assert answer.status == 200, (place, answer.body)
        found[place, key] = answer.body

    async with trio.open_nursery() as nursery:
        for place in PLACES:
            for key in KEYS:
                nursery.start_soon(ask, place, key)
    return found


def test_calls_with_one_value_go_to_one_node_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "sticky.toml").write_text(PROFILE)
    profiles: dict[str, Any] = {"enabled": ["sticky"], "files": [tmp_path / "sticky.toml"]}
    settings = settings_for(tmp_path / "bootstrap", profiles=profiles)
    nodes = [node("one"), node("two")]

    async def main() -> None:
        async with running(settings, workspace=SPEC) as bootstrap:
            known = (bootstrap.workspace, bootstrap.token)
            async with connected(nodes[0], bootstrap.multiaddr), connected(nodes[1], bootstrap.multiaddr):
                await wait_ready(bootstrap, 2)
                first = await homes(bootstrap)
                for place in PLACES:
                    used = Counter(home for (of, _), home in first.items() if of == place)
                    assert len(used) == 2, f"keys by {place} all went to one node: {used}"
                assert await homes(bootstrap) == first
                # without a value nothing is held: the least busy one gets it
                plain = [(await bootstrap.call("POST", "/sticky/header")).status for _ in range(4)]
                assert plain == [200] * 4
        async with (
            running(settings, known=known) as bootstrap,
            connected(nodes[1], bootstrap.multiaddr),
            connected(nodes[0], bootstrap.multiaddr),
        ):
            await wait_ready(bootstrap, 2)
            assert await homes(bootstrap) == first, "after a restart too"

    trio.run(main)
