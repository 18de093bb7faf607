"""What the documents let a client read back: lists of its tasks, the nodes that have its workspace, one task in detail.

Lists show one workspace, that of the token, newest first; `limit` and `cursor` go beyond the documents. A task by its
id needs no token (the id is secret), and is refused to another workspace's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ngpu_bootstrap.credentials import Token
from ngpu_bootstrap.errors import BadRequest
from ngpu_bootstrap.front.answers import Answer, json_answer
from ngpu_bootstrap.front.details import task_info
from ngpu_bootstrap.front.paths import parse_parameters
from ngpu_bootstrap.front.wire_times import parse_range
from ngpu_bootstrap.registry.deployments import DeploymentTable
from ngpu_bootstrap.registry.workspaces import Workspaces
from ngpu_bootstrap.store import job_rows
from ngpu_bootstrap.store.errors import BodyMissing, RecordRefused
from ngpu_bootstrap.store.records import Part, StoredBody, TaskFilter, TaskRecord
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.errors import AddressError
from ngpu_protocol.identity import Address, parse_address

MAX_LISTED = 10_000
# The documents' own states of a distribution; every other state of ours is none of them yet, or no longer.
_NOT_SERVING = 0
_STATUS = {"ready": 1, "failed": -1}

_TASK_ID_SPELLINGS = ("taskID", "taskId", "task_id", "taskid")
_NODE_SPELLINGS = ("nodeAddr", "nodeaddr", "node_addr")
_RANGE = ("startTime", "endTime")
_PAGE = ("limit", "cursor")

FindTask = Callable[[str, Token | None], Awaitable[TaskRecord]]


@dataclass(frozen=True, slots=True)
class Wire:
    """What an operator chose of the documented form.

    Attributes:
        zone_minutes: the zone of times on the wire, east of UTC.
        submit_result_code: of an accepted submission.
        show_node_ip: whether clients see where a node's connection comes from.
    """

    zone_minutes: int = 480
    submit_result_code: int = 200
    show_node_ip: bool = True


class ReadsApi:
    """Answers the documented reads.

    Args:
        find_task: a task by its id, for whoever may see it.
    """

    def __init__(
        self,
        *,
        workspaces: Workspaces,
        deployments: DeploymentTable,
        store: Store,
        find_task: FindTask,
        wire: Wire,
    ) -> None:
        self._workspaces = workspaces
        self._deployments = deployments
        self._store = store
        self._find_task = find_task
        self._zone_minutes = wire.zone_minutes
        self._show_node_ip = wire.show_node_ip
        #: what this bootstrap thinks of a node, beside the documents' fields; set by whoever knows
        self.believed: Callable[[Address], Mapping[str, Any]] = lambda node: {}

    async def task_list(self, query: str | None, token: Token | None) -> Answer:
        """Answer `queryTaskList`: the ids of a workspace's tasks in a range of time."""
        workspace, _ = self._workspaces.authenticate(token)
        parameters = parse_parameters(query, (*_RANGE, *_PAGE))
        return await self._listed(self._filter(workspace.id, parameters))

    async def tasks_from_node(self, query: str | None, token: Token | None) -> Answer:
        """Answer `getTasksFromNode`: the same of one node."""
        workspace, _ = self._workspaces.authenticate(token)
        parameters = parse_parameters(query, (*_RANGE, *_PAGE, *_NODE_SPELLINGS))
        node = parse_node(one_of(parameters, _NODE_SPELLINGS))
        return await self._listed(self._filter(workspace.id, parameters, node=node))

    async def tasks_of_address(self, query: str | None, token: Token | None) -> Answer:
        """Answer `getTasks`: the ids of a workspace's tasks for one BTC address."""
        workspace, _ = self._workspaces.authenticate(token)
        spellings = ("btcaddress", "btcAddress", "btc_address")
        parameters = parse_parameters(query, (*_RANGE, *_PAGE, *spellings))
        address = one_of(parameters, spellings)
        if not address:
            raise BadRequest("btc_address_missing", "name the address: ?btcaddress=<address>")
        if not address.isprintable():  # PostgreSQL takes no NUL, in a question neither
            raise BadRequest("bad_btc_address", "btcaddress holds characters that no address has")
        return await self._listed(self._filter(workspace.id, parameters, btc_address=address[:128]))

    async def nodes(self, query: str | None, token: Token | None) -> Answer:
        """Answer `queryNodes`: where the workspace is distributed."""
        workspace, _ = self._workspaces.authenticate(token)
        parameters = parse_parameters(query, _RANGE)
        since_ms, before_ms = parse_range(parameters.get("startTime"), parameters.get("endTime"), self._zone_minutes)
        shown = [
            {
                "nodeAddr": one.node,
                "progress": 100 if one.state == "ready" else one.progress,
                "status": _STATUS.get(one.state, _NOT_SERVING),
                "state": one.state,
                **self.believed(one.node),
            }
            for one in await self._deployments.deployed(workspace)
            if since_ms <= one.since_ms < before_ms
        ]
        return json_answer(200, {"result_code": 200, "msg": "success", "result_size": len(shown), "nodes": shown})

    async def detailed(self, query: str | None, token: Token | None, *, under: str = "taskInfo") -> Answer:
        """Answer `getDetailed`: everything known of one task, under the key *under*."""
        task_id = task_id_in(query)
        await self._find_task(task_id, token)
        detail = await self._store.detail(task_id)
        job = await self._store.look_up(lambda connection: job_rows.of_task(connection, task_id))
        asked_by: list[str] = []
        if job is not None:
            asked_by = await self._store.look_up(lambda connection: job_rows.calls_of(connection, task_id))
        info = task_info(
            detail,
            await self._body(task_id, Part.REQUEST, detail.task.request),
            await self._body(task_id, Part.RESPONSE, detail.task.response),
            zone_minutes=self._zone_minutes,
            show_node_ip=self._show_node_ip,
            job=job,
            asked_by=asked_by,
        )
        return json_answer(200, {"result_code": 200, "msg": "success", under: info})

    async def _listed(self, wanted: TaskFilter) -> Answer:
        try:
            page = await self._store.task_ids(wanted)
        except RecordRefused:
            raise BadRequest("bad_cursor", "cursor is not one this list gave; leave it out to begin anew") from None
        document: dict[str, Any] = {
            "result_code": 200,
            "msg": "success",
            "result_size": len(page.task_ids),
            "taskIds": page.task_ids,
        }
        if page.cursor:
            document["cursor"] = page.cursor
        return json_answer(200, document)

    def _filter(
        self,
        workspace: str,
        parameters: dict[str, str],
        *,
        node: Address | None = None,
        btc_address: str | None = None,
    ) -> TaskFilter:
        since_ms, before_ms = parse_range(parameters.get("startTime"), parameters.get("endTime"), self._zone_minutes)
        return TaskFilter(
            workspace=workspace,
            node=node,
            btc_address=btc_address,
            since_ms=since_ms,
            before_ms=before_ms,
            limit=_limit(parameters.get("limit")),
            after=parameters.get("cursor", ""),
        )

    async def _body(self, task_id: str, part: Part, body: StoredBody | None) -> bytes | None:
        if body is None:
            return None
        try:
            return await self._store.read_body(task_id, part, body)
        except BodyMissing:
            return None


def task_id_in(query: str | None) -> str:
    """Return the task id a query names, in whichever spelling clients use.

    Raises:
        BadRequest: none, or more than one.
    """
    task_id = one_of(parse_parameters(query, _TASK_ID_SPELLINGS), _TASK_ID_SPELLINGS)
    if task_id is None:
        raise BadRequest("task_id_missing", "name the task: ?taskID=<the taskID of the answer to your submission>")
    return task_id


def one_of(parameters: dict[str, str], spellings: tuple[str, ...]) -> str | None:
    """Return the value of a parameter that has several spellings, None when none is given.

    Raises:
        BadRequest: it is given in two of them.
    """
    given = [name for name in spellings if name in parameters]
    if len(given) > 1:
        raise BadRequest("duplicate_parameter", f"{' and '.join(given)} mean the same parameter; send one of them")
    return parameters[given[0]] if given else None


def parse_node(text: str | None) -> Address:
    """Return the address of a node as clients write it, with or without `0x`.

    Raises:
        BadRequest: missing, or no address.
    """
    if not text:
        raise BadRequest("node_missing", "name the node: ?nodeAddr=0x... as queryNodes shows it")
    try:
        return parse_address(text if text[:2].lower() == "0x" else "0x" + text)
    except AddressError:
        raise BadRequest("bad_node", "nodeAddr is no address: 0x and 40 hexadecimal digits") from None


def _limit(text: str | None) -> int:
    if not text:
        return MAX_LISTED
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) >= 1):
        raise BadRequest("bad_limit", f"limit must be a number from 1 to {MAX_LISTED}")
    return min(int(text), MAX_LISTED)
