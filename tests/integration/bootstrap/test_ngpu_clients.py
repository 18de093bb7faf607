"""A client written for the NGPU cloud, call by call as it makes them: forms, headers and spellings of its own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import trio
from trio.testing import trio_test
from typer.testing import CliRunner

from ngpu_bootstrap.cli import app
from ngpu_bootstrap.compat import rows, user_calls
from ngpu_bootstrap.compat.cloud import Cloud
from ngpu_node.cli import app as node_app
from ngpu_protocol.identity import Account
from ngpu_protocol.networks import network_named
from ngpu_protocol.node_bindings import NodeBinding, sign_node_binding
from tests.integration.bootstrap.rig import Bootstrap, running, settings_for, task_when, wait_ready
from tests.integration.bootstrap.scripted_node import Asked, ScriptedNode, connected, new_account
from tests.unit.store.builders import a_store

PASSWORD = "correct horse"
SENT = hashlib.md5(PASSWORD.encode()).hexdigest()
START = "docker run -d --gpus all -p 8075:80 -e MODE=fast --shm-size 1g -v models:/models registry.example/draw:1 serve"
SAD_TALKER = {
    "name": "talker",
    "service": "demo/echo",
    "ports": [8080],
    "apis": [
        {"name": "sadTalker", "mode": "async", "port": 8080, "path": "/talk"},
        {"name": "createImage", "mode": "async", "port": 8080, "path": "/image"},
        {"name": "getImage", "mode": "async", "port": 8080, "path": "/image"},
    ],
}


def command(data_dir: Path, *arguments: str) -> Any:
    result = CliRunner().invoke(
        app, [*arguments, "--data-dir", str(data_dir), "--json"], env={"NGPU_BOOTSTRAP_NETWORK": "local"}
    )
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def run(tmp_path: Path, test: Any, *, script: Any = None, workspace: Any = None, **changes: Any) -> None:
    async def main() -> None:
        node = ScriptedNode(new_account())
        if script is not None:
            node.script = script
        settings = settings_for(tmp_path / "bootstrap", **({"compat": {"ngpu_cloud": True}} | changes))
        async with running(settings, workspace=workspace) as bootstrap, connected(node, bootstrap.multiaddr):
            await wait_ready(bootstrap)
            base = f"http://127.0.0.1:{bootstrap.port}"
            async with httpx.AsyncClient(base_url=base, timeout=30) as client:
                await test(bootstrap, node, client)

    trio.run(main)


def ok(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def test_an_account_makes_an_image_and_a_workspace_and_calls_it(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode, client: httpx.AsyncClient) -> None:
        secret = tmp_path / "password"
        secret.write_text(PASSWORD + "\n")
        data_dir = bootstrap.data_dir
        await trio.to_thread.run_sync(
            command, data_dir, "user", "add", "Ann@example.com", "--password-file", str(secret)
        )
        product = await trio.to_thread.run_sync(
            command, data_dir, "product", "add", "one 4090", "--gpu-model", "RTX4090", "--field", "hour_price=1.5"
        )
        base = "/ngpu/api/v1"
        login = await client.post(f"{base}/user/login", data={"email": "ann@example.com", "password": SENT})
        client.headers["Token"] = ok(login)["result"]["token"]
        (shown,) = ok(await client.get(f"{base}/cloud/product/list"))["result"]
        assert (shown["id"], shown["gpu_model"], shown["hour_price"]) == (product["id"], "RTX4090", "1.5")
        image = {"image_name": "draw", "type": "1", "start_cmd": START, "port_mapping": "8075:80", "note": "n"}
        image_id = ok(await client.post(f"{base}/cloud/image/create", json=image))["result"]["image_id"]
        (listed,) = ok(await client.get(f"{base}/cloud/image/list"))["result"]
        assert {"id", "image_name", "file_size", "created_at", "start_cmd", "stop_cmd", "is_system"} <= set(listed)
        assert (listed["id"], listed["start_cmd"]) == (image_id, START)
        group = ok(await client.post(f"{base}/cloud/workspace/group/create", data={"workspace_group_name": "g1"}))
        assert ok(await client.get(f"{base}/cloud/workspace/group/selector"))["result"] == [
            {"id": group["result"]["workspace_group_id"], "workspace_group_name": "g1"}
        ]
        wanted = {
            "workspace_name": "mine",
            "area": "",
            "duration": 2,
            "duration_unit": "week",
            "public_net": 0,
            "num": 1,
            "image_id": image_id,
            "product_id": product["id"],
            "is_group": 1,
            "workspace_group_id": group["result"]["workspace_group_id"],
        }
        made = ok(await client.post(f"{base}/cloud/workspace/create", json=wanted))["result"]["workspace_id"]
        # one client sends the id as a form in the body of a GET, the token or the public id
        public = made.partition("-")[0]
        for text in (made, public):
            asked = await client.request("GET", f"{base}/cloud/workspace/list", data={"id": text})
            (view,) = ok(asked)["result"]
            assert (view["id"], view["workspace_name"], view["docker_state"]) == (public, "mine", 1)
        assert ok(await client.get(f"{base}/cloud/workspace/list?id=5"))["result"] == []
        spec = (await bootstrap.admin("GET", f"/api/v1/workspaces/{public}"))["spec"]
        assert (spec["image"], spec["command"], spec["ports"]) == ("registry.example/draw:1", ["serve"], [80])
        assert (spec["env"], spec["shm_bytes"], spec["group"]) == ({"MODE": "fast"}, 2**30, "g1")
        assert (spec["volumes"], spec["replicas"]) == ([{"name": "models", "path": "/models"}], 1)
        assert spec["gpu_count"] >= 1
        assert spec["gpu_types"]
        assert spec["end_at"] > 0
        # the token calls it, at the port the docker run line published: no node has it yet, and that is what is said
        for authorization in (f"Bearer {made}", f"Bearer ngpu_{made}", f"ngpu_{made}", made):
            answer = await client.post(
                "/user/schedulingTask?paramUrl=startSync&paramPort=8075",
                headers={"Authorization": authorization},
                json={"data": "{}"},
            )
            assert answer.json()["reason"] == "no_node", answer.text
        wrong = await client.post(
            "/user/schedulingTask?paramUrl=x&paramPort=9999", headers={"Authorization": made}, json={"data": "{}"}
        )
        assert wrong.json()["reason"] == "port_undeclared"
        # another account sees none of it
        secret.write_text(PASSWORD)
        await trio.to_thread.run_sync(
            command, data_dir, "user", "add", "bob@example.com", "--password-file", str(secret)
        )
        theirs = ok(await client.post(f"{base}/user/login", json={"email": "bob@example.com", "password": SENT}))
        other = {"Token": theirs["result"]["token"]}
        for path in ("image/list", "workspace/list", "workspace/group/selector"):
            assert ok(await client.get(f"{base}/cloud/{path}", headers=other))["result"] == []
        assert (await client.get(f"{base}/cloud/workspace/delete/{public}", headers=other)).status_code == 404
        assert ok(await client.get(f"{base}/cloud/workspace/delete/{public}"))["result"]["id"] == public
        assert ok(await client.get(f"{base}/cloud/workspace/list"))["result"] == []
        # nothing of a password is in the database but argon2's text
        stored = b"".join(path.read_bytes() for path in data_dir.glob("bootstrap.db*"))
        assert b"$argon2id$" in stored
        assert SENT.encode() not in stored
        assert client.headers["Token"].encode() not in stored

    run(tmp_path, test)


def test_wrong_logins_and_wrong_images_say_what_is_wrong(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode, client: httpx.AsyncClient) -> None:
        base = "/ngpu/api/v1"
        secret = tmp_path / "password"
        secret.write_text(PASSWORD)
        await trio.to_thread.run_sync(
            command, bootstrap.data_dir, "user", "add", "a@b.c", "--password-file", str(secret)
        )
        for fields, status in (
            ({"email": "a@b.c", "password": "0" * 32}, 401),
            ({"email": "nobody@b.c", "password": SENT}, 401),
            ({"email": "a@b.c"}, 400),
            ({"email": ["a"], "password": "x"}, 400),
        ):
            answer = await client.post(f"{base}/user/login", json=fields)
            assert (answer.status_code, answer.json()["result_code"]) == (status, status)
        assert (await client.get(f"{base}/cloud/image/list")).status_code == 401
        assert (await client.get(f"{base}/cloud/image/list", headers={"Token": "x"})).status_code == 401
        token = ok(await client.post(f"{base}/user/login", json={"email": "a@b.c", "password": SENT}))
        client.headers["Token"] = token["result"]["token"]
        for image, words in (
            ({"start_cmd": "docker run --privileged -p 80:80 x"}, "--privileged"),
            ({"start_cmd": "docker run --network host -p 80:80 x"}, "--network"),
            ({"start_cmd": "docker run -v /etc:/etc -p 80:80 x"}, "-v"),
            ({"start_cmd": "docker run x"}, "ports"),
            ({"port_mapping": "80:80"}, "wget_url"),
            ({"start_cmd": "docker run x", "port_mapping": "80:99999"}, "port_mapping"),
            ({"start_cmd": "docker run x", "port_mapping": "80:000080" + "1" * 5000}, "port_mapping"),
            ({"wget_url": "file:///etc/passwd", "port_mapping": "80:80"}, "image_url"),
        ):
            answer = await client.post(f"{base}/cloud/image/create", json={"image_name": "x", **image})
            assert answer.status_code == 400, image
            assert words in answer.json()["msg"], answer.text
        saved = {"image_name": "x", "wget_url": "https://images.example/x.tar", "port_mapping": "8080:80"}
        ok(await client.post(f"{base}/cloud/image/create", data=saved))
        assert (await client.post(f"{base}/cloud/workspace/create", json={"image_id": 99})).status_code == 404
        assert (await client.post(f"{base}/cloud/nothing", json={})).status_code == 404
        assert (await client.get(f"{base}/cloud/image/create")).status_code == 405
        # guessing passwords is slowed before they are looked at, for the right one too
        for _ in range(100):  # more than the burst: on a busy machine a few come back meanwhile
            answer = await client.post(f"{base}/user/login", json={"email": "a@b.c", "password": "0" * 32})
            if answer.status_code == 429:
                break
        assert answer.status_code == 429
        assert (await client.post(f"{base}/user/login", json={"email": "a@b.c", "password": SENT})).status_code == 429

    run(tmp_path, test)


def test_tasks_are_submitted_and_polled_as_its_commands_do(tmp_path: Path) -> None:
    release = trio.Event()

    async def talk(asked: Asked) -> None:
        await asked.read()
        await release.wait()
        body = json.dumps({"result_code": 100, "result_url": "https://x/y.mp4"}).encode()
        await asked.answer(200, body, [(b"content-type", b"application/json")])

    async def test(bootstrap: Bootstrap, node: ScriptedNode, client: httpx.AsyncClient) -> None:
        headers = {"Authorization": f"Bearer ngpu_{bootstrap.token}", "BtcAddress": "bc1qheader"}
        made = ok(await client.post("/user/sadTalker", headers=headers, json={"text": "hello", "pronouncer": "fable"}))
        task_id = made["task_id"]
        assert made["result_code"] == 200
        talking = ok(await client.get(f"/user/sadTalker?taskID={task_id}"))
        assert talking["result_code"] == 101
        waiting = ok(await client.get(f"/user/queryTask?taskID={task_id}"))
        assert (waiting["result_code"], waiting["result_size"]) == (100, 0)
        assert ok(await client.get(f"/user/getImage?taskID={task_id}"))["result_code"] == 100
        release.set()
        await task_when(bootstrap, task_id, lambda view: view["state"] == 3)
        talked = ok(await client.get(f"/user/sadTalker?taskID={task_id}"))
        assert (talked["result_code"], talked["result_url"]) == (100, "https://x/y.mp4")
        done = ok(await client.get(f"/user/getImage?taskID={task_id}"))
        assert (done["result_code"], done["result_size"]) == (200, 1)
        assert json.loads(done["data"])["result_url"] == "https://x/y.mp4"
        assert node.orders[0].order.target == "/talk"
        record = ok(await client.get(f"/user/getTask?taskID={task_id}"))["task"]
        assert (record["taskid"], record["btcaddress"]) == (task_id, "bc1qheader")
        unauthorized = await client.get("/user/getTasks?btcaddress=bc1qheader")
        assert (unauthorized.status_code, unauthorized.json()["result_code"]) == (401, 401)
        listed = ok(await client.get("/user/getTasks?btcaddress=bc1qheader", headers=headers))
        assert listed["taskIds"] == [task_id]

    run(tmp_path, test, script=talk, workspace=SAD_TALKER)


def test_nodes_are_bound_to_wallets_by_their_own_signature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_calls, "SUMS_S", 0.1)

    async def test(bootstrap: Bootstrap, node: ScriptedNode, client: httpx.AsyncClient) -> None:
        gone = await client.get("/user/newAccount")
        assert gone.status_code == 410
        assert "ngpu-node init" in gone.json()["msg"]
        chain_id = network_named("local").chain_id
        wallet = new_account().address
        address = node.account.address

        def body(account: Account = node.account, sequence: int = 1, **changes: Any) -> dict[str, Any]:
            binding = NodeBinding(account.address, wallet, "acme", sequence)
            signature = "0x" + sign_node_binding(binding, account, chain_id).hex()
            fields = {"nodeAddr": address, "orgName": "acme", "walletAccount": wallet, "sequence": sequence}
            return {**fields, "signature": signature, **changes}

        for fields, status, words in (
            (body(signature=""), 401, "sign-binding"),
            (body(new_account()), 401, "not that of node"),
            (body(orgName="other"), 401, "not that of node"),
            (body(signature="0xzz"), 401, "not that of node"),
            (body(walletAccount="nobody"), 400, "walletAccount"),
            (body(sequence=5), 200, "success"),
            (body(sequence=5), 200, "success"),
            (body(sequence=4), 409, "later binding"),
            (body(sequence=2 * 10**12 * 10), 400, "clock"),
        ):
            answer = await client.post("/user/nodeRegister", json=fields)
            assert (answer.status_code, answer.json()["result_code"]) == (status, status), answer.text
            assert words in answer.json()["msg"]
        await bootstrap.call("POST", "/proxy/8080/", b"x")
        with trio.fail_after(60):
            while True:
                found = ok(await client.get(f"/user/getNode?nodeAddr={address[2:]}"))["node"]
                if found["taskCount"]:
                    break
                await trio.sleep(0.05)
        assert (found["walletAccount"], found["orgName"], found["online"]) == (wallet, "acme", True)
        assert (found["standing"], found["trusted"], found["lastChallenge"]) == (1.0, True, "")
        assert [one["nodeAddr"] for one in ok(await client.get("/user/getNodes"))["nodes"]] == [address]
        balance = ok(await client.post("/user/getBalance", json={"nodeAddrs": [address, "1" * 40]}))
        assert [one["taskCount"] for one in balance["balances"]] == [1, 0]
        assert (await client.post("/user/getBalance", json={"nodeAddrs": []})).status_code == 400
        assert (await client.get("/user/getNode?nodeAddr=" + "2" * 40)).status_code == 404

    run(tmp_path, test)


def test_bindings_of_nodes_that_never_came_are_few_slow_and_in_no_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody can make keys and sign with them."""
    monkeypatch.setattr(rows, "MAX_STRANGERS", 3)
    monkeypatch.setattr(user_calls, "REGISTRATIONS_BURST", 6)

    async def test(bootstrap: Bootstrap, node: ScriptedNode, client: httpx.AsyncClient) -> None:
        def body(account: Account) -> dict[str, Any]:
            binding = NodeBinding(account.address, account.address, "x", 1)
            signature = sign_node_binding(binding, account, network_named("local").chain_id).hex()
            fields = {"nodeAddr": account.address, "orgName": "x", "walletAccount": account.address, "sequence": 1}
            return {**fields, "signature": signature}

        async def knows(account: Account) -> bool:
            return (await client.get(f"/user/getNode?nodeAddr={account.address}")).status_code == 200

        strangers = [new_account() for _ in range(5)]
        for account in (node.account, *strangers):
            ok(await client.post("/user/nodeRegister", json=body(account)))
        # the one that is here stays, and so do the newest of the others; before it comes, a node can be asked for
        assert [await knows(one) for one in (node.account, *strangers)] == [True, False, False, True, True, True]
        assert [one["nodeAddr"] for one in ok(await client.get("/user/getNodes"))["nodes"]] == [node.account.address]
        answer = await client.post("/user/nodeRegister", json=body(new_account()))
        assert (answer.status_code, answer.json()["reason"]) == (429, "too_many_registrations")
        assert int(answer.headers["Retry-After"]) >= 1

    run(tmp_path, test)


@trio_test
async def test_a_port_published_at_one_bootstrap_is_known_at_another(tmp_path: Path) -> None:
    async with a_store(tmp_path) as store:
        cloud = Cloud(
            store=store,
            workspaces=cast(Any, None),
            deployments=cast(Any, None),
            confided=cast(Any, None),
            failed_tries=cast(Any, None),
            session_s=1,
            now_ms=lambda: 0,
        )

        def made(connection: Any) -> None:
            rows.add_user(connection, "a@b.example", "x", 1)
            rows.add_workspace(connection, 1, "7", {"published": {"8075": 80}}, 1)

        await store.chore(made)
        assert [await cloud.port_of(*one) for one in (("7", "8075"), ("7", "80"), ("8", "8075"))] == [
            "80",
            "80",
            "8075",
        ]


def test_the_query_of_an_images_url_is_at_rest_in_no_clear_text_and_reaches_the_workspace(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode, client: httpx.AsyncClient) -> None:
        secret = tmp_path / "password"
        secret.write_text(PASSWORD + "\n")
        data_dir = bootstrap.data_dir
        await trio.to_thread.run_sync(command, data_dir, "user", "add", "a@b.example", "--password-file", str(secret))
        product = await trio.to_thread.run_sync(command, data_dir, "product", "add", "p", "--gpu-model", "RTX4090")
        login = await client.post("/ngpu/api/v1/user/login", data={"email": "a@b.example", "password": SENT})
        client.headers["Token"] = ok(login)["result"]["token"]
        url = "http://127.0.0.1:9/image.tar?signature=only-for-you"
        image = {"image_name": "draw", "type": "1", "wget_url": url, "port_mapping": "8075:80"}
        made = ok(await client.post("/ngpu/api/v1/cloud/image/create", json=image))["result"]
        wanted = {"workspace_name": "w", "num": 1, "image_id": made["image_id"], "product_id": product["id"]}
        token = ok(await client.post("/ngpu/api/v1/cloud/workspace/create", json=wanted))["result"]["workspace_id"]
        view = await bootstrap.admin("GET", f"/api/v1/workspaces/{token.partition('-')[0]}")
        assert view["spec"]["image_url"] == "http://127.0.0.1:9/image.tar"
        assert view["spec"]["has_image_query"]
        for file in data_dir.iterdir():
            if file.is_file():
                assert b"only-for-you" not in file.read_bytes(), file

    run(tmp_path, test)


def test_without_the_setting_nothing_of_it_is_there(tmp_path: Path) -> None:
    async def test(bootstrap: Bootstrap, node: ScriptedNode, client: httpx.AsyncClient) -> None:
        assert (await client.get("/user/getNodes")).status_code == 404
        assert (await client.post("/ngpu/api/v1/user/login", json={})).status_code == 404

    run(tmp_path, test, compat={})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("user", "add", "nobody"), "password-file"),
        (("user", "remove", "a@b.c"), "no account"),
        (("product", "add", "x", "--field", "colour=red"), "no field colour"),
        (("product", "remove", "7"), "no product 7"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    tmp_path.chmod(0o700)
    result = CliRunner().invoke(app, [*arguments, "--data-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert words in result.stderr


def test_a_node_signs_its_binding_on_the_command_line(tmp_path: Path) -> None:
    settings_for(tmp_path / "node")  # a keystore
    arguments = ["sign-binding", "--wallet", "0x" + "1" * 40, "--org", "acme", "--data-dir", str(tmp_path / "node")]
    env = {"NGPU_NODE_PASSPHRASE_FILE": str(tmp_path / "passphrase"), "NGPU_NODE_NETWORK": "local"}
    result = CliRunner().invoke(node_app, arguments, env=env)
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    binding = NodeBinding(body["nodeAddr"], body["walletAccount"], body["orgName"], body["sequence"])
    assert binding.is_signed_by_node(bytes.fromhex(body["signature"][2:]), network_named("local").chain_id)
