"""The commands about one workspace: its schema, `docker run` lines, changes, and watching it come up."""

from __future__ import annotations

import io
import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import trio
from rich.console import Console
from typer.testing import CliRunner

from ngpu_bootstrap.api.models import DeploymentsView, DeploymentView, RolloutView, ShortageView
from ngpu_bootstrap.cli import app
from ngpu_bootstrap.commands import checked
from ngpu_bootstrap.watching import failed, is_settled, show_bars, show_lines
from ngpu_protocol import control
from tests.integration.bootstrap.rig import running, settings_for
from tests.integration.bootstrap.scripted_node import ScriptedNode, connected, new_account, ready
from tests.integration.bootstrap.test_commands import command, said
from tests.integration.bootstrap.test_deployments import IMAGE

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = json.loads((ROOT / "docs" / "workspace.schema.json").read_text())
ADD = ("workspace", "add", "--name", "demo", "--image", "demo/chat:1", "--port", "8080", "--json")


def test_the_schema_in_the_docs_is_the_commands() -> None:
    assert json.loads(CliRunner().invoke(app, ["workspace", "schema"]).stdout) == SCHEMA
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "examples").glob("*/workspace.toml")), ids=lambda path: path.parent.name
)
def test_every_example_fits_the_schema_and_the_model(file: Path) -> None:
    document = tomllib.loads(file.read_text())
    jsonschema.validate(document, SCHEMA)
    checked(document)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ports": []},
        {"image": 5},
        {"gpus": 1},
        {"image_sha256": "x"},
        {"volumes": [{"name": "../x", "path": "/m"}]},
        {"apis": [{"name": "run", "port": 80}]},
    ],
)
def test_the_schema_refuses_what_the_model_refuses(wrong: dict[str, Any]) -> None:
    document = {"name": "x", "image": "i", "ports": [80], **wrong}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)
    with pytest.raises(Exception, match="not a workspace"):
        checked(document)


def test_a_docker_run_line_becomes_a_file_that_add_takes(tmp_path: Path) -> None:
    line = "docker run -d --gpus all -p 8080:80 -e 'A=\"b\" \\ é' -v models:/models acme/paint:2 serve --fast"
    printed = CliRunner().invoke(app, ["workspace", "from-docker-run", line]).stdout
    assert printed.startswith("# passed over: -d\n")
    document = tomllib.loads(printed)
    assert document["name"] == "paint"
    assert document["env"] == {"A": '"b" \\ é'}
    added = CliRunner().invoke(
        app, ["workspace", "add", "--file", "-", "--json", "--data-dir", str(tmp_path)], input=printed
    )
    assert added.exit_code == 0, added.output
    (listed,) = said(command(tmp_path, "workspace", "list", "--json"))["workspaces"]
    assert (listed["spec"]["image"], listed["spec"]["command"]) == ("acme/paint:2", ["serve", "--fast"])
    refused = CliRunner().invoke(app, ["workspace", "from-docker-run", "docker run --privileged i"])
    assert refused.exit_code == 1
    assert refused.stderr == (
        "error: --privileged is not taken here: workspaces run confined on other people's machines\n"
    )


def test_a_workspace_is_changed_while_no_daemon_runs(tmp_path: Path) -> None:
    made = said(command(tmp_path, *ADD))
    changed = said(command(tmp_path, "workspace", "update", made["id"], "--set", "replicas=3", "--json"))
    assert (changed["spec"]["revision"], changed["spec"]["replicas"], changed["rollout"]) == (1, 3, None)
    changed = said(command(tmp_path, "workspace", "update", made["id"], "--set", "image=demo/chat:2", "--json"))
    assert (changed["target"]["revision"], changed["target"]["image"]) == (2, "demo/chat:2")
    assert (changed["spec"]["image"], changed["rollout"]["state"]) == ("demo/chat:1", "rolling")
    changed = said(command(tmp_path, "workspace", "update", made["id"], "--set", "replicas=", "--json"))
    assert changed["target"]["replicas"] is None
    file = tmp_path / "new.json"
    file.write_text(json.dumps({"name": "demo", "service": "acme/llama", "ports": [8080]}))
    changed = said(command(tmp_path, "workspace", "update", made["id"], "--file", str(file), "--json"))
    assert (changed["spec"]["service"], changed["spec"]["image"], changed["spec"]["revision"]) == (
        "acme/llama",
        None,
        3,
    )
    shown = command(tmp_path, "workspace", "update", made["id"], "--set", "name=other").stdout
    assert shown == f"workspace {made['id']} is at revision 3\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "say what changes"),
        (("--set", "replicas"), "write KEY=VALUE"),
        (("--set", "replicas=0"), "replicas"),
        (("--set", "tpus=1"), "tpus"),
        (("--set", "revision=7"), "revision is given by the bootstrap"),
        (("--file", "x.toml", "--set", "a=1"), "give one of them"),
    ],
)
def test_a_wrong_change_is_one_line_and_changes_nothing(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    made = said(command(tmp_path, *ADD))
    result = command(tmp_path, "workspace", "update", made["id"], *arguments)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    (listed,) = said(command(tmp_path, "workspace", "list", "--json"))["workspaces"]
    assert (listed["spec"]["revision"], listed["rollout"]) == (1, None)


def test_secrets_in_a_file_are_sealed_to_the_key_also_while_no_daemon_runs(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "bootstrap")
    file = tmp_path / "workspace.toml"
    file.write_text('name = "x"\nimage = "i"\nports = [80]\n[secrets.env]\nHF_TOKEN = "hf-s3cret"\n')
    options = ("--file", str(file), "--json")
    config = tmp_path / "config.toml"
    config.write_text(f'network = "local"\npassphrase_file = "{settings.passphrase_file}"\n')
    made = said(command(settings.data_dir, "workspace", "add", *options, "--config", str(config)))
    listed = command(settings.data_dir, "workspace", "list", "--json", "--config", str(config)).stdout
    (one,) = json.loads(listed)["workspaces"]
    assert (one["spec"]["id"], one["spec"]["secret_env"]) == (made["id"], ["HF_TOKEN"])
    assert "hf-s3cret" not in listed
    assert b"hf-s3cret" not in b"".join(path.read_bytes() for path in settings.data_dir.glob("bootstrap.db*"))


def test_watching_shows_each_change_and_ends_when_all_is_ready(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "bootstrap")
    scripted = ScriptedNode(
        new_account(),
        services=(),
        deploy=lambda spec: control.DeploymentState(spec.id, spec.revision, "pulling", progress=40),
    )

    async def watch(workspace_id: str, *options: str) -> Any:
        words = [sys.executable, "-m", "ngpu_bootstrap.cli", "workspace", "watch", workspace_id, "--until-ready"]
        return await trio.run_process(
            [*words, *options, "--data-dir", str(settings.data_dir)],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )

    async def main() -> None:
        async with (
            running(settings, workspace=IMAGE) as bootstrap,
            connected(scripted, bootstrap.multiaddr),
            trio.open_nursery() as nursery,
        ):
            results: list[Any] = []
            ended = trio.Event()

            async def watch_it_come_up() -> None:
                results.append(await watch(bootstrap.workspace, "--json"))
                ended.set()

            await scripted.until(lambda: bool(scripted.told))
            nursery.start_soon(watch_it_come_up)
            await trio.sleep(1.0)
            scripted.deploy = ready
            await scripted.redeploy()
            with trio.fail_after(60):
                await ended.wait()
            views = [json.loads(line) for line in results[0].stdout.splitlines()]
            assert results[0].returncode == 0
            assert views[-1]["ready"] == 1
            scripted.deploy = lambda spec: replace(ready(spec), state="failed", reason="exited", detail="status 3")
            await scripted.redeploy()
            lost = await watch(bootstrap.workspace)
            assert lost.returncode == 1
            assert b"exited, status 3" in lost.stderr

    trio.run(main)


def a_view(*deployments: DeploymentView, **changes: Any) -> DeploymentsView:
    known = sum(one.state == "ready" for one in deployments)
    return DeploymentsView(
        **{"workspace": "7", "revision": 1, "replicas": 2, "ready": known, "deployments": list(deployments), **changes}
    )


def a_deployment(node: str, state: str, **changes: Any) -> DeploymentView:
    return DeploymentView(
        **{
            "node": node,
            "workspace": "7",
            "revision": 1,
            "state": state,
            "detail": "",
            "slots_free": 0,
            "image_digest": "0x",
            **changes,
        }
    )


PULLING = a_deployment("0xa", "pulling", progress=40, bytes_done=4 << 20, bytes_total=10 << 20, seconds_left=6)
LOST = a_deployment("0xb", "failed", reason="exited", detail="status 3")
UP = a_deployment("0xa", "ready", progress=100)
SHORT = ShortageView(wanted=2, placed=1, reason="memory", detail="2 wanted, 1 placed", lacks={"memory": 1})


def test_each_node_has_a_bar_with_how_far_and_how_long() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=160)
    views = [a_view(PULLING, LOST, shortage=SHORT), a_view(UP)]
    assert list(show_bars(views, terminal)) == views
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    for words in ("0xa r1", "40 %", "4.0 of 10.0 MiB, 6 s left", "exited, status 3", "100 %", "2 wanted, 1 placed"):
        assert words in shown


def test_without_a_terminal_each_change_is_a_line() -> None:
    said_lines: list[str] = []
    list(show_lines([a_view(PULLING), a_view(PULLING), a_view(UP)], said_lines.append))
    assert said_lines == [
        "revision 1: ready on 0 of 2",
        "0xa r1 pulling 40 % 4.0 of 10.0 MiB, 6 s left",
        "revision 1: ready on 1 of 2",
        "0xa r1 ready 100 %",
    ]


def test_when_watching_may_end() -> None:
    rolling = RolloutView(state="rolling", base=1, target=2, began_at_ms=0)
    broken = RolloutView(state="failed", base=1, target=2, began_at_ms=0, node="0xb", reason="exited", detail="why")
    both = a_view(UP, a_deployment("0xb", "ready"))
    assert is_settled(both)
    assert not is_settled(both.model_copy(update={"rollout": rolling}))
    assert not is_settled(a_view(UP))
    assert not is_settled(a_view(replicas=None))
    assert failed(a_view(UP, LOST)) == "failed on 0xb: exited, status 3"
    assert "revision 2 failed on 0xb (exited: why)" in failed(both.model_copy(update={"rollout": broken}))
    assert failed(both) == ""
