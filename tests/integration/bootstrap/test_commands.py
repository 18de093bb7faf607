"""The management commands on a data directory that no daemon uses (with one running: `whole_path`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ngpu_bootstrap.cli import app
from ngpu_bootstrap.cli_options import again, url_of
from ngpu_bootstrap.config import BootstrapSettings
from ngpu_daemon.datadir import DataDirectory


def command(data_dir: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments, "--data-dir", str(data_dir)])


def said(result: Any) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


ADD = ("workspace", "add", "--name", "demo", "--service", "demo/chat", "--port", "8080")


def test_a_workspace_is_added_listed_and_removed(tmp_path: Path) -> None:
    options = ("--api", "draw=sync:8080/draw?x=1", "--api", "train=async:8080/train", "--concurrency", "9", "--json")
    made = said(command(tmp_path, *ADD, *options))
    assert made["token"].startswith(made["id"] + "-")
    listed = said(command(tmp_path, "workspace", "list", "--json"))["workspaces"]
    assert [one["spec"]["id"] for one in listed] == [made["id"]]
    spec = listed[0]["spec"]
    assert (spec["concurrency"], [api["mode"] for api in spec["apis"]]) == (9, ["sync", "async"])
    assert made["token"] not in json.dumps(listed)
    shown = command(tmp_path, "workspace", "list")
    assert "demo/chat" in shown.stdout
    other = said(command(tmp_path, *ADD, "--json"))
    command(tmp_path, "workspace", "update", other["id"], "--set", "group=autumn")
    for group, ids in (("autumn", [other["id"]]), ("", [made["id"]]), ("winter", [])):
        listed = said(command(tmp_path, "workspace", "list", "--group", group, "--json"))["workspaces"]
        assert [one["spec"]["id"] for one in listed] == ids
    command(tmp_path, "workspace", "remove", other["id"])
    assert said(command(tmp_path, "workspace", "remove", made["id"], "--json")) == {"removed": made["id"]}
    assert said(command(tmp_path, "workspace", "list", "--json")) == {"workspaces": []}
    assert "no workspace yet" in command(tmp_path, "workspace", "list").stdout


def test_a_workspace_comes_from_a_file_and_options_win(tmp_path: Path) -> None:
    file = tmp_path / "workspace.toml"
    file.write_text('name = "from file"\nimage = "ngpu/x:1"\nports = [80]\nreplicas = 2\n')
    command(tmp_path, "workspace", "add", "--file", str(file), "--name", "from option")
    (listed,) = said(command(tmp_path, "workspace", "list", "--json"))["workspaces"]
    assert (listed["spec"]["name"], listed["spec"]["image"], listed["replicas"]) == ("from option", "ngpu/x:1", 2)


def test_people_are_shown_the_token_once_and_how_to_use_it(tmp_path: Path) -> None:
    shown = command(tmp_path, *ADD).stdout
    assert "shown this once" in shown
    assert "http://127.0.0.1:8080/proxy/8080/" in shown


def test_what_to_do_next_is_said_for_the_daemon_at_hand(tmp_path: Path) -> None:
    settings = BootstrapSettings(http_listen="127.0.0.1:18080")
    assert url_of(settings, tmp_path) == "http://127.0.0.1:18080"
    (tmp_path / "bootstrap.json").write_text('{"http": ["https://127.0.0.1:9"]}')
    assert url_of(settings, tmp_path) == "https://127.0.0.1:9"
    (tmp_path / "bootstrap.json").write_text('{"http": []}')
    assert url_of(settings, tmp_path) == "http://127.0.0.1:18080"
    assert again(Path("my own.toml"), None) == " --config 'my own.toml'"
    assert again(None, None) == ""
    file = tmp_path / "workspace.toml"
    file.write_text('name = "x"\nservice = "a/b"\nprots = [80]\n')
    refused = command(tmp_path, "workspace", "add", "--file", str(file))
    assert "prots: is not a known key; did you mean ports?" in refused.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("workspace", "add", "--name", "x", "--port", "1"), "exactly one of image, image_url and service"),
        ((*ADD, "--api", "nonsense"), "NAME=sync:PORT/PATH"),
        ((*ADD, "--env", "NOVALUE"), "NAME=VALUE"),
        ((*ADD, "--api", "queryTask=sync:8080/x"), "call of the gateway itself"),
        ((*ADD, "--file", "/nowhere/at.all"), "cannot read"),
        (("workspace", "remove", "123"), "no workspace 123"),
        (("workspace", "remove", "x"), "no workspace id"),
        (("key", "add", "a b"), "no name for a key"),
        (("key", "add", "ann", "--scope", "everything"), "there are all, read"),
        (("key", "add", "ann", "--expires", "soon"), "write 90s, 30m"),
        (("workspace", "token", "rotate", "123"), "no workspace 123"),
        (("workspace", "token", "rotate", "123", "--overlap", "1w"), "write 90s, 30m"),
        (("key", "remove", "nobody"), "no key called"),
        (("status",), "start it with"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_1(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    result = command(tmp_path, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_a_data_directory_in_use_is_left_alone(tmp_path: Path) -> None:
    with DataDirectory(tmp_path).lock():
        result = command(tmp_path, *ADD)
    assert result.exit_code == 1
    assert "in use by" in result.stderr


def test_operator_keys_come_and_go(tmp_path: Path) -> None:
    key = said(command(tmp_path, "key", "add", "alice", "--json"))["key"]
    assert key.startswith("op_alice-")
    assert command(tmp_path, "key", "list").stdout == "alice  all\n"
    assert "Bearer <key>" in command(tmp_path, "key", "add", "bob").stdout
    command(tmp_path, "key", "remove", "alice")
    command(tmp_path, "key", "add", "carl", "--scope", "read", "--scope", "nodes", "--expires", "90d")
    assert "carl  nodes,read  until 20" in command(tmp_path, "key", "list").stdout
    command(tmp_path, "key", "remove", "carl")
    assert [one["name"] for one in said(command(tmp_path, "key", "list", "--json"))["keys"]] == ["bob"]


def test_a_token_is_rotated_on_a_store_that_no_daemon_uses(tmp_path: Path) -> None:
    made = said(command(tmp_path, *ADD, "--json"))
    rotated = said(command(tmp_path, "workspace", "token", "rotate", made["id"], "--overlap", "30m", "--json"))
    assert rotated["token"].startswith(made["id"] + "-")
    assert rotated["token"] != made["token"]
    assert rotated["label"] == made["id"] + ".2"
    assert "It is shown this once" in command(tmp_path, "workspace", "token", "rotate", made["id"]).stdout


def test_an_unknown_key_in_the_configuration_names_the_nearest(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('http_listne = "127.0.0.1:1"\n')
    result = CliRunner().invoke(app, ["workspace", "list", "--config", str(config)])
    assert result.exit_code == 1
    assert 'did you mean "http_listen"' in result.stderr
