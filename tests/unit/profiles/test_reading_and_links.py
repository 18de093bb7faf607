"""What is read of a body on its way, files behind signed links, and room for calls of one kind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from trio.testing import trio_test
from typer.testing import CliRunner

from ngpu_bootstrap.cli import app
from ngpu_bootstrap.credentials import make_token, reveal
from ngpu_bootstrap.errors import BadRequest, Forbidden, NotServed, Refusal
from ngpu_bootstrap.front.spool import PATIENCE_S, SLOWEST_BYTES_PER_S, Pace, Room, Spool, SpooledBody
from ngpu_bootstrap.profiles.catalogue import parse_profile
from ngpu_bootstrap.profiles.links import MAX_LINKS, Link, link_url, read_link, with_file_urls, with_links
from ngpu_bootstrap.profiles.reading import BodyReader, wanted_of
from ngpu_node.output_files import FileRefused, OutputFiles
from ngpu_protocol.identity import Account

TOKEN = reveal(make_token("367614711220405248", bytes(range(24))))
ACCOUNT = Account.from_key(bytes(range(1, 33)))
HEAD = 'name = "mine"\ncredentials = [{ in = "json", pointer = "/token" }, { in = "form", name = "token" }]\n'


def reader(route: str, content_type: bytes | None = b"application/json", head: str = HEAD) -> BodyReader:
    profile = parse_profile(f'{head}[[routes]]\npath = "/mine/x"\n{route}', "x")
    return BodyReader(wanted_of(profile, profile.routes[0]), content_type)


def run(one: BodyReader, body: bytes, step: int) -> bytes:
    pieces = [one.feed(body[at : at + step]) for at in range(0, len(body), step)]
    return b"".join(pieces) + one.end()


@pytest.mark.parametrize("step", [1, 2, 7, 64, 4096])
def test_a_credential_in_json_is_replaced_and_every_other_byte_stays(step: int) -> None:
    body = b'{ "a": [1, {"token":"deep"}], "token" :"%b" ,\n"b":"x"}' % TOKEN.encode()
    one = reader("")
    assert run(one, body, step) == body.replace(TOKEN.encode(), b"367614711220405248")
    assert list(one.facts.credentials.values()) == [TOKEN]


@pytest.mark.parametrize("value", [b'"hunter2"', b"17", b"null", b"true"])
def test_what_is_no_credential_does_not_pass_in_its_place(value: bytes) -> None:
    assert run(reader(""), b'{"token":%b}' % value, 3) == b'{"token":""}'


@pytest.mark.parametrize("value", [b'["%b"]' % TOKEN.encode(), b'"%b"' % (b"a" * 9000)])
def test_a_credential_that_cannot_be_taken_out_is_refused(value: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        run(reader(""), b'{"token":%b}' % value, 64)
    assert caught.value.reason == "credential_not_text"


def test_an_affinity_deep_in_a_body_is_read() -> None:
    one = reader('affinity = [{ in = "json", pointer = "/data/0/id" }]\n')
    body = b'{"data":[{"id":17}]}'
    assert run(one, body, 4) == body
    assert list(one.facts.values.values()) == ["17"]


SCHEMA = (
    'schema = { type = "object", required = ["prompt"], additionalProperties = false, properties = { '
    'prompt = { type = "string", minLength = 1 }, sampler = { enum = ["euler", "heun"] }, '
    "n = { type = 'integer', minimum = 1, maximum = 8 } } }\n"
)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "prompt is required"),
        ({"sampler": "x"}, "prompt is required; sampler must be one of"),
        ({"prompt": 1}, "prompt must be of type string"),
        ({"prompt": ""}, "prompt must have at least 1 character"),
        ({"prompt": "a", "sampler": "secret-value"}, "sampler must be one of: euler, heun"),
        ({"prompt": "a", "n": 9}, "n must be at most 8"),
        ({"prompt": "a", "x": 1}, "the body has x, and may have: prompt, sampler, n"),
    ],
)
def test_a_body_that_does_not_fit_its_schema_is_told_what_would(document: Any, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        run(reader(SCHEMA, head='name = "mine"\n'), json.dumps(document).encode(), 5)
    assert words in caught.value.message
    assert "secret-value" not in caught.value.message


def test_a_call_that_needs_a_body_says_so() -> None:
    with pytest.raises(BadRequest, match="needs a body"):
        reader(SCHEMA, head='name = "mine"\n').end()


# -- links


def signed(link: Link) -> str:
    return link_url("http://b", link, ACCOUNT.sign(link.digest("local")))


def read(url: str, *, now_s: float = 50.0, signers: frozenset[str] = frozenset({ACCOUNT.address})) -> Link:
    path, _, query = url.removeprefix("http://b").partition("?")
    origin_file = path.startswith("/v1/files/")
    return read_link(path, query, network="local", signers=signers, now_s=now_s, origin_file=origin_file)


@pytest.mark.parametrize(
    "link",
    [
        Link("", ACCOUNT.address, "/home/AI project/a%20b/\u00fc\udcff.png", 100),
        Link("12", ACCOUNT.address, "/api/v1b/files/1.png", 100),
    ],
)
def test_a_link_leads_back_to_what_it_was_made_of(link: Link) -> None:
    assert read(signed(link)) == link
    with pytest.raises(Refusal) as caught:
        read(signed(link), now_s=101.0)
    assert caught.value.reason == "link_expired"
    with pytest.raises(Forbidden):
        read(signed(link), signers=frozenset())
    with pytest.raises(Forbidden):
        read(signed(link).replace("Expires=100", "Expires=999"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"prompt":"a","prompt":"b"}', "member_twice"),
        (b'{"prompt":"a","x":{"y":1,"\\u0079":2}}', "member_twice"),
        (b'{"prompt":"a","n":NaN}', "malformed_json"),
        (b'{"prompt":"a","n":-Infinity}', "malformed_json"),
        (b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_many_values"),
        (b'{"prompt":' + b"[" * 20_000 + b"]" * 20_000 + b"}", "malformed_json"),
        (b'{"prompt":1' + b"0" * 5000 + b"}", "malformed_json"),
    ],
)
def test_a_body_that_is_validated_means_one_thing_to_whoever_reads_it(body: bytes, reason: str) -> None:
    with pytest.raises(BadRequest) as caught:
        run(reader('schema = { type = "object" }\n', head='name = "mine"\n'), body, 4096)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "kind", [None, b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=B"]
)
def test_a_call_that_takes_json_alone_reads_any_body_as_json(kind: bytes | None) -> None:
    route = 'json_only = true\nschema = { type = "object", required = ["a"] }\n'
    body = b'{"a":1}'
    assert run(reader(route, kind, head='name = "mine"\n'), body, 3) == body
    with pytest.raises(BadRequest) as caught:
        run(reader(route, kind, head='name = "mine"\n'), b"a=1&b=2", 3)
    assert caught.value.reason == "malformed_json"


def test_only_members_named_url_that_are_paths_are_replaced() -> None:
    body = (
        b'{"data":[{"url":"/home/a.png"},{"url" : "\\/home\\/b.png"},{"url":"https://x/c.png"},{"url":"//x"}],'
        b'"text":"\\"url\\":\\"/etc/passwd\\"","path":"/home/d.png"}'
    )
    changed = json.loads(with_file_urls(body, lambda path: f"U{path}"))
    assert [one["url"] for one in changed["data"]] == ["U/home/a.png", "U/home/b.png", "https://x/c.png", "//x"]
    assert changed["text"] == '"url":"/etc/passwd"'
    assert changed["path"] == "/home/d.png"


def test_texts_below_a_prefix_become_links() -> None:
    body = b'{"info":["/files/1.png","/other/2"],"t":"\\"/files/3\\""}'
    changed = json.loads(with_links(body, "/files/", lambda path: f"U{path}"))
    assert changed == {"info": ["U/files/1.png", "/other/2"], "t": '"/files/3"'}


def test_an_answer_that_names_files_without_end_gets_a_bounded_number_of_links() -> None:
    many = [b'{"url":"/a%d"}' % number for number in range(MAX_LINKS + 5)]
    for change in (with_file_urls(b",".join(many), "U{}".format), with_links(b",".join(many), "/a", "U{}".format)):
        assert change.count(b'"U/a') == MAX_LINKS
        assert change.endswith(many[-1])
    assert with_links(b",".join(many), "/a", "U{}".format, MAX_LINKS + 9).count(b'"U/a') == len(many)


# -- the node's side


def test_a_node_hands_out_regular_files_below_its_output_folders_alone(tmp_path: Path) -> None:
    folder, other = tmp_path / "out", tmp_path / "outside"
    folder.mkdir()
    other.mkdir()
    (folder / "a.png").write_bytes(b"picture")
    (other / "secret").write_bytes(b"secret")
    (folder / "link.png").symlink_to(other / "secret")
    (folder / "dir").symlink_to(other)
    os.mkfifo(folder / "pipe")
    (tmp_path / "out2").mkdir()
    (tmp_path / "out2" / "b").write_bytes(b"b")
    files = OutputFiles([folder])
    found = files.open(os.fsencode(folder / "a.png"))
    assert (os.pread(found.descriptor, 99, 0), found.size, found.content_type) == (b"picture", 7, "image/png")
    os.close(found.descriptor)
    before = len(os.listdir("/proc/self/fd"))
    for path in (
        other / "secret",
        folder / "link.png",
        folder / "dir" / "secret",
        folder / ".." / "outside" / "secret",
        folder / "pipe",
        folder,
        folder / "missing",
        tmp_path / "out2" / "b",
        Path("/etc/passwd"),
        Path("relative"),
    ):
        with pytest.raises(FileRefused) as caught:
            files.open(os.fsencode(path))
        assert caught.value.status == 404
    with pytest.raises(FileRefused):
        files.open(os.fsencode(folder / "a.png") + b"\0")
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FileRefused):
        OutputFiles([]).open(os.fsencode(folder / "a.png"))


@trio_test
async def test_a_long_body_is_kept_in_a_file_without_a_name_and_its_room_given_back(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", limit_bytes=1_000_000)
    data = bytes(range(256)) * 3000
    async with SpooledBody(spool) as kept:
        for at in range(0, len(data), 65_536):
            await kept.write(data[at : at + 65_536])
        body = await kept.body()
        for _ in range(2):  # it can be sent again
            pieces = await body.prepare()
            assert not isinstance(pieces, bytes)
            assert b"".join([piece async for piece in pieces]) == data
        assert body.sent()[1] == len(data)
        assert list((tmp_path / "spool").iterdir()) == []
        assert spool.held_bytes == len(data)
        async with SpooledBody(spool) as other:
            with pytest.raises(NotServed) as caught:
                await other.write(data)
            assert caught.value.reason == "spool_full"
    assert spool.held_bytes == 0


def test_a_body_that_trickles_in_is_not_waited_for_and_a_long_one_is() -> None:
    pace = Pace(100.0)
    pace.check(1, 100.0 + PATIENCE_S)
    pace.check(10_000_000, 100.0 + PATIENCE_S + 9000)
    for size, after_s in ((1, PATIENCE_S + 1), (10_000_000, 10_000)):
        with pytest.raises(Refusal) as caught:
            Pace(100.0).check(size, 100.0 + after_s)
        assert (caught.value.status, caught.value.reason) == (408, "request_timeout")


def test_a_burst_buys_no_time_for_a_trickle_after_it() -> None:
    pace = Pace(0.0)
    pace.check(16_000_000, 1.0)
    pace.check(16_000_001, PATIENCE_S + 1)
    steady = 16_000_001 + int(SLOWEST_BYTES_PER_S * (PATIENCE_S + 1))
    pace.check(steady, 2 * PATIENCE_S + 2)
    pace.check(steady + 1, 3 * PATIENCE_S)
    with pytest.raises(Refusal, match="too slowly: 2 bytes in 61 s"):
        pace.check(steady + 2, 3 * PATIENCE_S + 3)


def test_one_network_leaves_room_to_others() -> None:
    room = Room(400)
    room.reserve(60, "a")
    room.reserve(40, "a")
    with pytest.raises(NotServed, match="too many long requests"):
        room.reserve(1, "a")
    for other in "bcd":
        room.reserve(100, other)
    with pytest.raises(NotServed):
        room.reserve(1, "e")
    room.give_back(100, "a")
    room.reserve(100, "a")
    for one in "abcd":
        room.give_back(100, one)
    assert (room.held_bytes, room._of_callers) == (0, {})


def test_what_is_held_to_be_parsed_is_known_while_it_comes() -> None:
    one = reader('schema = { type = "object" }\n', head='name = "mine"\n')
    one.feed(b'{"a":"' + b"x" * 1000)
    assert one.held_bytes == 1006
    unparsed = reader("", head=HEAD)
    unparsed.feed(b'{"a":"' + b"x" * 1000)
    assert unparsed.held_bytes == 0
    room = Room(1500)
    room.reserve(one.held_bytes)
    with pytest.raises(NotServed, match="too many long requests"):
        room.reserve(one.held_bytes)
    room.give_back(one.held_bytes)
    room.reserve(one.held_bytes)


# -- the commands


@trio_test
async def test_a_body_that_no_file_can_be_made_for_is_refused_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("no folder")
    spool = Spool(tmp_path / "spool" / "bodies", limit_bytes=1 << 20)
    async with SpooledBody(spool) as kept:
        with pytest.raises(NotServed) as refused:
            await kept.write(bytes(300_000))
    assert (refused.value.status, refused.value.reason) == (503, "spool_full")
    assert spool.held_bytes == 0


def test_the_commands_say_what_a_path_means_and_what_is_wrong(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('network = "local"\n')
    arguments = ["--config", str(config)]
    listed = CliRunner().invoke(app, ["profile", "list", "--json", *arguments])
    names = [one["name"] for one in json.loads(listed.stdout)["profiles"]]
    assert names[:2] == ["openai", "aimodel"]
    shown = CliRunner().invoke(app, ["profile", "explain", "/v1/chat/completions", "--json", *arguments])
    assert json.loads(shown.stdout)["profile"] == "openai"
    assert CliRunner().invoke(app, ["profile", "list", *arguments]).exit_code == 0
    shown = CliRunner().invoke(app, ["profile", "explain", "/v1/models/a/b", "--json", *arguments])
    assert json.loads(shown.stdout) | {"method": "GET", "parameters": {"model": "a/b"}} == json.loads(shown.stdout)
    for path, words in (
        ("/v1/models", "/v1/models takes GET"),
        ("/v2", "no profile declares DELETE /v2"),
        ("/user/x", "/user/x is the bootstrap's own"),
        ("/health", "on its own listener"),
        ("v1", "begins with /"),
    ):
        wrong = CliRunner().invoke(app, ["profile", "explain", path, "--method", "delete", *arguments])
        assert (wrong.exit_code, words in wrong.stderr) == (1, True), wrong.stderr
    config.write_text(
        'network = "local"\n[profiles.bind]\nakashgen = "7"\n[profiles.listen]\nakashgen = "[::1]:6571"\n'
    )
    shown = CliRunner().invoke(app, ["profile", "explain", "/api/generate", *arguments])
    lines = dict(line.split(None, 1) for line in shown.stdout.splitlines())
    assert (lines["workspace"], lines["listener"], lines["public"]) == ("bound: 7", "[::1]:6571", "no")
    assert "receipted = from its submission to its end" in lines["job"]
    own = tmp_path / "own.toml"
    own.write_text(
        'name = "own"\n[[routes]]\npath = "/own"\nmode = "job"\n[routes.job]\nid = ["/id"]\npoll = {target = "/{id}"}\n'
        'state = ["/state"]\ndone = ["done"]\nhold = false\n'
    )
    config.write_text(f'network = "local"\n[profiles]\nenabled = ["own"]\nfiles = ["{own}"]\n')
    shown = CliRunner().invoke(app, ["profile", "explain", "/own", *arguments])
    assert "GPU time between questions is in no receipt" in shown.stdout
    config.write_text('network = "local"\n')
    broken = tmp_path / "mine.toml"
    broken.write_text('name = "mine"\n[[routes]]\npath = "/mine"\nmodee = "fixed"\n')
    checked = CliRunner().invoke(app, ["profile", "check", str(broken), *arguments])
    assert checked.exit_code == 1
    assert 'did you mean "mode"?' in checked.stdout
