"""What existing NGPU clients call under `/user/` beyond the documents: a task's record, nodes, what their work is.

Owns the shapes of these calls alone; tasks are read by `front.reads_api`, and what a poll of `/user/sadTalker` is, by
turning the usual one into the shape its clients read.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio

from ngpu_bootstrap.compat import rows
from ngpu_bootstrap.compat.forms import fields_of, number_field, text_field
from ngpu_bootstrap.errors import BadRequest, NotServed, Refusal, Unauthorized
from ngpu_bootstrap.front.answers import SUCCESS, Answer, json_answer
from ngpu_bootstrap.front.extension import ReadBody, UserCall
from ngpu_bootstrap.front.guards import AddressBuckets
from ngpu_bootstrap.front.paths import parse_parameters
from ngpu_bootstrap.front.reads_api import ReadsApi, one_of, parse_node
from ngpu_bootstrap.registry.nodes import Nodes
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.errors import AddressError, SignatureError
from ngpu_protocol.http1 import Headers, header
from ngpu_protocol.identity import Address, parse_address
from ngpu_protocol.node_bindings import MAX_ORG_NAME_CHARS, NodeBinding

SAD_TALKER = "sadTalker"
VIDEO_RE_TALKER = "videoReTalker"
STILL_RUNNING, FAILED = 101, 104
MAX_ASKED = 1000
# What every node's work comes to is summed over every receipt: not again for each who asks.
SUMS_S = 10.0
# Nodes that one address may register: a fleet at once, and a few a minute after that.
REGISTRATIONS_BURST, REGISTRATIONS_PER_S = 64, 0.1
# A binding signed with a clock further ahead could not be replaced until then.
AHEAD_MS = 24 * 3600 * 1000
_SPELLINGS = ("nodeAddr", "nodeaddr", "node_addr")
_HOW = (
    "send `signature`: the node's own over who is paid; `ngpu-node sign-binding --wallet 0x... --org NAME` makes the "
    "whole body"
)


class UserCalls:
    """Answers these calls."""

    def __init__(
        self, *, reads: ReadsApi, nodes: Nodes, store: Store, chain_id: int, now_ms: Callable[[], int]
    ) -> None:
        self._reads = reads
        self._nodes = nodes
        self._store = store
        self._chain_id = chain_id
        self._now_ms = now_ms
        self._registrations = AddressBuckets(burst=REGISTRATIONS_BURST, per_s=REGISTRATIONS_PER_S)
        self._sums: tuple[float, dict[str, rows.Work]] | None = None
        self._summing = trio.Lock()

    async def answer(self, call: UserCall, read_body: ReadBody) -> Answer:
        """Return the answer to *call*.

        Raises:
            Refusal: what is wrong with it.
        """
        name, method, query, headers, token = call.name, call.method, call.query, call.headers, call.token
        if name in ("getTask", "getTasks", "getNodes", "getNode", "newAccount"):
            _require(method, "GET")
        elif name in ("nodeRegister", "getBalance"):
            _require(method, "POST")
        match name:
            case "getTask":
                return await self._reads.detailed(query, token, under="task")
            case "getTasks":
                return await self._reads.tasks_of_address(query, token)
            case "newAccount":
                raise Refusal(
                    410,
                    "made_by_its_owner",
                    "a server must not hold an owner's key: make the account on the node with `ngpu-node init`",
                )
            case "getNodes":
                return await self._all_nodes()
            case "getNode":
                node = parse_node(one_of(parse_parameters(query, _SPELLINGS), _SPELLINGS))
                return await self._one_node(node)
            case "getBalance":
                return await self._balance(await self._fields(query, headers, read_body))
            case "nodeRegister":
                return await self._register(await self._fields(query, headers, read_body), call.client)
        raise Refusal(404, "not_found", f"{name} is not offered here")

    async def _fields(self, query: str | None, headers: Headers, read_body: ReadBody) -> dict[str, Any]:
        return fields_of(query, header(headers, b"content-type"), await read_body(1024 * 1024))

    async def _all_nodes(self) -> Answer:
        work, bindings = await self._work(), await self._store.look_up(rows.bindings)
        names = sorted({*work, *bindings, *(session.node for session in self._nodes)})
        nodes = [self._view(name, work, bindings) for name in names]
        return json_answer(200, {"result_code": 200, "msg": "success", "result_size": len(nodes), "nodes": nodes})

    async def _one_node(self, node: str) -> Answer:
        work, bindings = await self._work(), await self._bindings([node])
        if node not in work and node not in bindings and node not in {session.node for session in self._nodes}:
            raise Refusal(404, "node_unknown", f"this gateway knows no node {node}")
        return json_answer(200, {"result_code": 200, "msg": "success", "node": self._view(node, work, bindings)})

    async def _balance(self, fields: Mapping[str, Any]) -> Answer:
        asked = fields.get("nodeAddrs")
        if not isinstance(asked, list) or not asked or len(asked) > MAX_ASKED:
            raise BadRequest("nodes_missing", f"nodeAddrs must be a list of 1 to {MAX_ASKED} node addresses")
        names = list(dict.fromkeys(parse_node(one if isinstance(one, str) else "") for one in asked))
        work, bindings = await self._work(), await self._bindings(names)
        balances = [self._view(name, work, bindings) for name in names]
        return json_answer(
            200, {"result_code": 200, "msg": "success", "result_size": len(balances), "balances": balances}
        )

    async def _bindings(self, nodes: Sequence[str]) -> dict[str, rows.Binding]:
        return await self._store.look_up(lambda connection: rows.bindings(connection, nodes))

    async def _register(self, fields: Mapping[str, Any], client: str) -> Answer:
        node = parse_node(text_field(fields, "nodeAddr", most=64, required=True))
        try:
            wallet = parse_address(text_field(fields, "walletAccount", most=64, required=True))
        except AddressError:
            raise BadRequest("bad_wallet", "walletAccount is no address: 0x and 40 hexadecimal digits") from None
        organisation = text_field(fields, "orgName", most=MAX_ORG_NAME_CHARS)
        sequence = number_field(fields, "sequence", least=0, most=2**63 - 1, default=0)
        text = text_field(fields, "signature", most=200)
        if not text:
            raise Unauthorized("signature_missing", _HOW)
        binding = NodeBinding(node, wallet, organisation, sequence)
        try:
            signature = bytes.fromhex(text.removeprefix("0x"))
            signed = binding.is_signed_by_node(signature, self._chain_id)
        except (ValueError, SignatureError):
            signed = False
        if not signed:
            raise Unauthorized("signature_wrong", f"the signature is not that of node {node} over these fields; {_HOW}")
        if sequence > self._now_ms() + AHEAD_MS:
            raise BadRequest(
                "bad_sequence", "sequence is UTC milliseconds of the signing, and lies in the future; set the clock"
            )
        wait_s = self._registrations.take(client, time.monotonic())
        if wait_s:
            raise NotServed(
                429,
                "too_many_registrations",
                "too many nodes were registered from this address; come again later",
                retry_after_s=math.ceil(wait_s),
            )
        row = rows.Binding(node, wallet, organisation, sequence, signature, self._now_ms())
        if not await self._store.chore(lambda connection: rows.bind(connection, row)):
            raise Refusal(409, "binding_outdated", "a later binding of this node is known; sign another")
        return json_answer(200, {"result_code": 200, "msg": "success", "nodeAddr": node, "walletAccount": wallet})

    def _view(self, node: str, work: Mapping[str, rows.Work], bindings: Mapping[str, rows.Binding]) -> dict[str, Any]:
        done, bound = work.get(node), bindings.get(node)
        return {
            "nodeAddr": node,
            "orgName": bound.org_name if bound else "",
            "walletAccount": bound.wallet if bound else "",
            "taskCount": done.tasks if done else 0,
            "gpudursion": -(-done.gpu_ms // 1000) if done else 0,
            "gpu_ms": done.gpu_ms if done else 0,
            "online": any(session.node == node for session in self._nodes),
            **self._reads.believed(Address(node)),
        }

    async def _work(self) -> dict[str, rows.Work]:
        async with self._summing:  # once for all who ask at one moment: these calls need no token
            if self._sums is None or time.monotonic() - self._sums[0] >= SUMS_S:
                sums = {one.node: one for one in await self._store.look_over(rows.work_done)}
                self._sums = (time.monotonic(), sums)
            return self._sums[1]


def sad_talker(answer: Answer) -> Answer:
    """Return the answer to a poll of `/user/sadTalker`: 101 while the task is pending, the workspace's own words after.

    Its clients read `result_code` (100, 104 and 200 end their loop) and `result_url`, which the workspace's JSON has. A
    task that failed is 104, since any other code of ours would have them ask for ever; `msg` and `reason` say why.
    """
    document = json.loads(answer.body)
    if not document["result_size"]:
        document["result_code"] = STILL_RUNNING
        return json_answer(answer.status, document)
    try:
        own = json.loads(document["data"])
    except (ValueError, RecursionError):
        own = None
    own = own if isinstance(own, dict) else {}
    if type(own.get("result_code")) is int:
        document["result_code"] = own["result_code"]
    elif document["result_code"] != SUCCESS:
        document["result_code"] = FAILED
    if isinstance(own.get("result_url"), str):
        document["result_url"] = own["result_url"]
    return json_answer(answer.status, document)


def _require(method: str, allowed: str) -> None:
    if method != allowed and not (allowed == "GET" and method == "HEAD"):
        raise Refusal(405, "method_not_allowed", f"this path takes {allowed}", headers={"Allow": allowed})
