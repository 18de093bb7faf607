"""The documented form: `/user/...`, requests and answers wrapped as the NGPU gateway's documents have them.

Owns what each of these calls means. The shapes are `answers`, the wrapping of bodies is `bodies`. A synchronous answer
is released after its receipt was verified and its task committed; an asynchronous one is promised once it is
committed, and polled for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from ngpu_bootstrap.brc20.desk import Brc20Desk
from ngpu_bootstrap.config import LimitsSection
from ngpu_bootstrap.credentials import Token
from ngpu_bootstrap.dispatch.calls import Call, WholeBody
from ngpu_bootstrap.dispatch.collector import Collector
from ngpu_bootstrap.dispatch.detached import DetachedTasks
from ngpu_bootstrap.dispatch.dispatcher import Dispatcher
from ngpu_bootstrap.dispatch.watch import TaskWatch
from ngpu_bootstrap.errors import BadRequest, Forbidden, Refusal
from ngpu_bootstrap.front import answers
from ngpu_bootstrap.front.answers import Answer, WorkspaceAnswer
from ngpu_bootstrap.front.bodies import MAX_ADDRESS, Unwrapped, unwrap
from ngpu_bootstrap.front.callers import affinity_key, passed_on_wrapped
from ngpu_bootstrap.front.extension import Extension, ReadBody, UserCall
from ngpu_bootstrap.front.paths import Target, parameter_target, parse_parameters, workspace_target
from ngpu_bootstrap.front.promised import Promises, TaskEnded
from ngpu_bootstrap.front.queue_news import TellPlace
from ngpu_bootstrap.front.reads_api import ReadsApi, Wire, task_id_in
from ngpu_bootstrap.front.task_options import task_options
from ngpu_bootstrap.profiles.jobs import Job
from ngpu_bootstrap.profiles.schemas import check_body
from ngpu_bootstrap.profiles.strict_json import SHORT_BYTES
from ngpu_bootstrap.registry.deployments import DeploymentTable
from ngpu_bootstrap.registry.nodes import Nodes
from ngpu_bootstrap.registry.workspaces import Workspace, Workspaces
from ngpu_bootstrap.store import job_rows
from ngpu_bootstrap.store.job_rows import JobRow
from ngpu_bootstrap.store.records import TaskRecord, WorkspaceToken
from ngpu_bootstrap.store.store import Store
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.http1 import Headers, header
from ngpu_protocol.job_answers import parsed
from ngpu_protocol.job_terms import JobTerms
from ngpu_protocol.losses import SignedLoss
from ngpu_protocol.task_ids import is_task_id
from ngpu_protocol.workspaces import RESERVED_API_NAMES

_QUERY = "queryTask"
_SUBMIT = "schedulingTask"
_ADDRESS_HEADER = b"btcaddress"

Read = Callable[[str | None, Token | None], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class UserRequest:
    """A request under `/user/`, its credential taken out.

    Attributes:
        shown: from what a task's workspace answered to what whoever polls for it gets; None: that.
    """

    method: str
    path: str
    query: str | None
    headers: Headers = field(repr=False)
    token: Token | None
    idempotency_key: str | None
    user_ip: str
    place_teller: Callable[[str], TellPlace | None] = lambda task_id: None
    shown: Callable[[TaskRecord, WorkspaceAnswer], Awaitable[WorkspaceAnswer]] | None = None

    @property
    def url(self) -> str:
        return self.path if self.query is None else f"{self.path}?{self.query}"


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is to be run, by whichever call it was asked for."""

    api: str
    method: str
    where: Target
    detach: bool
    job: JobTerms | None = None
    body_schema: Mapping[str, Any] | None = None


class TasksApi:
    """Answers the calls under `/user/`.

    Attributes:
        promises: tasks that are kept until they end.
        extension: answers the calls of existing NGPU clients, where the operator asked for that.
    """

    def __init__(
        self,
        *,
        workspaces: Workspaces,
        deployments: DeploymentTable,
        dispatcher: Dispatcher,
        detached: DetachedTasks,
        nodes: Nodes,
        store: Store,
        limits: LimitsSection,
        wire: Wire,
        brc20: Brc20Desk,
        async_deadline_s: float,
        new_task_id: Callable[[], str],
        now_ms: Callable[[], int],
        watch: TaskWatch,
        check_webhook: Callable[[str], str],
        check_operator: Callable[[Token], None],
    ) -> None:
        self._check_webhook = check_webhook
        self._check_operator = check_operator
        self._workspaces = workspaces
        self._deployments = deployments
        self._dispatcher = dispatcher
        self.promises = Promises(detached=detached, store=store, watch=watch, now_ms=now_ms)
        self._nodes = nodes
        self._store = store
        self._limits = limits
        self._async_deadline_s = async_deadline_s
        self._new_task_id = new_task_id
        self._now_ms = now_ms
        self._brc20 = brc20
        self.extension: Extension | None = None
        self._submit_code = wire.submit_result_code
        self.reads = ReadsApi(
            workspaces=workspaces, deployments=deployments, store=store, find_task=self.task, wire=wire
        )
        self._reads: dict[str, Read] = {
            "queryTaskList": self.reads.task_list,
            "queryNodes": self.reads.nodes,
            "getTasksFromNode": self.reads.tasks_from_node,
            "getDetailed": self.reads.detailed,
        }

    async def answer(self, request: UserRequest, read_body: ReadBody) -> Answer:
        """Return the answer to *request*, whose body *read_body* gives up to a number of bytes.

        Raises:
            Refusal: what is wrong with it, or why it cannot be served.
        """
        query = request.query
        name = request.path.removeprefix("/user/")
        reading = request.method in ("GET", "HEAD")
        if (read := self._reads.get(name)) is not None or name == _QUERY:
            if not reading:
                raise _method_not_allowed("GET")
            return await (read(query, request.token) if read is not None else self._poll(request, query))
        if name in RESERVED_API_NAMES and name != _SUBMIT:
            if self.extension is None:
                raise Refusal(404, "not_found", f"{name} is not offered here")
            call = UserCall(name, request.method, query, request.headers, request.token, request.user_ip)
            return await self.extension.user_call(call, read_body)
        if reading and name != _SUBMIT:
            answer = await self._poll(request, query)
            return answer if self.extension is None else self.extension.poll(name, answer)
        if request.method != "POST":
            raise _method_not_allowed("POST")
        workspace, token = self._workspaces.authenticate(request.token)
        asked = await self._submission(workspace, query) if name == _SUBMIT else _named(workspace, name, query)
        return await self._perform(request, workspace, token, asked, read_body)

    async def _submission(self, workspace: Workspace, query: str | None) -> _Asked:
        """Return what `POST /user/schedulingTask?paramUrl=&paramPort=` asks for."""
        parameters = parse_parameters(query, ("paramUrl", "paramPort"))
        if "paramUrl" not in parameters:
            raise BadRequest(
                "param_url_missing", "name the path to call in your workspace: ?paramUrl=<path>&paramPort=<port>"
            )
        port = parameters.get("paramPort", "")
        if port and self.extension is not None:
            port = await self.extension.port_of(workspace.id, port)
        where = parameter_target(parameters["paramUrl"], port, workspace.spec.ports)
        return _Asked(_SUBMIT, "POST", where, detach=True)

    async def _perform(
        self, request: UserRequest, workspace: Workspace, token: WorkspaceToken, asked: _Asked, read_body: ReadBody
    ) -> Answer:
        body = await read_body(self._limits.task_body_bytes)
        unwrapped = await read_wrapped(body, header(request.headers, b"content-type"), asked.body_schema)
        btc_address = unwrapped.btc_address or address_header(request.headers)
        refused: Refusal | None = None
        try:
            await self._brc20.admit(workspace.id, btc_address)
        except Refusal as refusal:
            if request.idempotency_key is None:
                raise
            refused = refusal
        spec = workspace.spec
        now_ms = self._now_ms()
        runs_s = spec.request_timeout_s if asked.job is None else asked.job.duration_s + asked.job.submit_timeout_s
        timeout_s = self._async_deadline_s if asked.detach else self._limits.queue_wait_s + runs_s
        options = task_options(request.headers, self._check_webhook)
        timeout_s = min(timeout_s, options.timeout_s or timeout_s)
        # What a client may come back for is promised: its answer is kept at the node until it is here, so that neither
        # a crash nor a client's second try has it run twice.
        promised = asked.detach or request.idempotency_key is not None or asked.job is not None
        task_id = self._new_task_id()
        job = None
        if asked.job is not None:
            name = f"{spec.id}/{asked.api}"
            terms = asked.job.for_request(parsed(unwrapped.body) if asked.job.repeats_request else None)
            job = JobRow(task_id, spec.id, spec.id, name, terms, Job(since_ms=now_ms))
        call = Call(
            task_id=task_id,
            spec=spec,
            api=asked.api,
            method=asked.method,
            port=asked.where.port,
            target=asked.where.target,
            headers=passed_on_wrapped(request.headers, unwrapped.content_type),
            body=WholeBody(unwrapped.body),
            accepted_at_ms=now_ms,
            deadline_ms=now_ms + int(timeout_s * 1000),
            detach=promised,
            wrapped=True,
            idempotency_key=request.idempotency_key,
            btc_address=btc_address,
            affinity=affinity_key(request.headers),
            tell_place=None if promised else request.place_teller(task_id),
            user_ip=request.user_ip,
            request_url=request.url,
            token_label=token.label,
            priority=options.priority,
            webhook=options.webhook if promised else "",
            job=job,
        )
        if not promised:
            answer = await self._wait(call)
            self._brc20.note(workspace.id, call.task_id, btc_address)
            return answer
        task_id = await self.promises.submit(call, refused)
        if task_id == call.task_id:
            self._brc20.note(workspace.id, task_id, btc_address)
        if asked.detach:
            return answers.submitted(task_id, self._submit_code)
        try:
            return answers.completed(task_id, await self.promises.answer(task_id, call.deadline_ms))
        except TaskEnded as ended:
            return answers.refusal_answer(ended.refusal, documented=True, task_id=task_id)

    async def _wait(self, call: Call) -> Answer:
        """Run a synchronous call and return its answer."""
        sink = Collector(self._limits.task_answer_bytes)
        result = await self._dispatcher.carry(call, sink)
        if result.ending.state is TaskState.FINISHED:
            return answers.completed(call.task_id, WorkspaceAnswer(sink.status, sink.body, sink.content_type))
        return answers.refusal_answer(result.ending.refusal(), documented=True, task_id=call.task_id)

    async def _poll(self, request: UserRequest, query: str | None) -> Answer:
        task_id = task_id_in(query)
        record = await self.task(task_id, request.token)
        if not record.state.is_final:
            position = self._nodes.place_of(record.workspace, task_id)
            return answers.pending(task_id, record.state, record.state.name.lower(), self.waits_for(record), position)
        if record.state is TaskState.FINISHED:
            kept = await self.promises.kept(record)
            return answers.polled(
                task_id, record.state, kept if request.shown is None else await request.shown(record, kept)
            )
        loss = None
        if record.state is TaskState.FAILED:
            row = await self._store.look_up(lambda connection: job_rows.of_task(connection, task_id))
            loss = SignedLoss.from_bytes(row.loss).to_json() if row is not None and row.loss else None
        return answers.polled_failure(task_id, record.state, record.result_code, record.reason, record.message, loss)

    async def task(self, task_id: str, token: Token | None) -> TaskRecord:
        """Return a task by its id, which is secret enough to need no credential; one that is given must be its own, or
        an operator's key that may read.

        Raises:
            Refusal: no such task, not the shape of an id, an unknown token, or another workspace's.
        """
        if not is_task_id(task_id):
            raise BadRequest(
                "bad_task_id", "a taskID is YYYYMMDD_HH_MM_SS_ and 20 digits, as the submission answered it"
            )
        workspace = None
        if token is not None and token.is_operator_key:
            self._check_operator(token)
        elif token is not None:
            workspace = self._workspaces.authenticate(token)[0]
        record = await self._store.task(task_id)
        if record is None:
            raise Refusal(404, "task_unknown", f"there is no task {task_id}")
        if workspace is not None and workspace.id != record.client:
            raise Forbidden("token_foreign", "this token is of another workspace than the task")
        return record

    def waits_for(self, record: TaskRecord) -> str:
        """Return, in words, what a task waits for while no node serves its workspace yet, else an empty text."""
        workspace = self._workspaces.get(record.workspace) if record.state is TaskState.ACCEPTED else None
        return self._deployments.on_the_way(workspace) if workspace is not None else ""


def _named(workspace: Workspace, name: str, query: str | None) -> _Asked:
    """Return what `POST /user/<name>` asks for; the client's own query goes along."""
    api = workspace.spec.api(name)
    if api is None:
        declared = ", ".join(api.name for api in workspace.spec.apis) or "none"
        raise Refusal(404, "api_unknown", f"the workspace declares no API {name[:64]!r}; it declares: {declared}")
    path, separator, own_query = api.path.partition("?")
    parts = [part for part in ((own_query if separator else None), query) if part]
    where = workspace_target(api.port, path, "&".join(parts) if parts else None)
    return _Asked(name, api.method, where, detach=api.mode == "async", job=api.job, body_schema=api.body_schema)


async def read_wrapped(body: bytes, content_type: bytes | None, schema: Mapping[str, Any] | None) -> Unwrapped:
    """Return what *body* carries for the workspace, once it fits *schema*; a long one keeps nobody else waiting.

    Raises:
        BadRequest: what would be right.
    """

    def read() -> Unwrapped:
        unwrapped = unwrap(body, content_type)
        if schema is not None:
            check_body(schema, unwrapped.body)
        return unwrapped

    return read() if len(body) <= SHORT_BYTES else await trio.to_thread.run_sync(read)


def address_header(headers: Headers) -> str:
    """Return the BTC address that some clients send as a header, empty without one."""
    value = header(headers, _ADDRESS_HEADER) or b""
    if len(value) > MAX_ADDRESS:
        raise BadRequest("bad_btc_address", f"BtcAddress must have at most {MAX_ADDRESS} characters")
    return value.decode("latin-1").strip()


def _method_not_allowed(allowed: str) -> Refusal:
    return Refusal(405, "method_not_allowed", f"this path takes {allowed}", headers={"Allow": allowed})
