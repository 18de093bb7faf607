"""What a request is, and what its client gets when it cannot be served.

Owns the first decision about every request of clients: the transparent form (`/proxy/`), the documented one
(`/user/`), the declared one (`profiled`), or the application for everything else; and the one place where refusals
become answers. The forms are
handled on the HTTP server itself, since a full web framework on the way would cost more than everything else together.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from ngpu_bootstrap.brc20.desk import Brc20Desk
from ngpu_bootstrap.config import LimitsSection
from ngpu_bootstrap.credentials import Token, take_credential
from ngpu_bootstrap.dispatch.calls import Body, Call, ClientFault, StreamedBody, WholeBody
from ngpu_bootstrap.dispatch.detached import DetachedTasks
from ngpu_bootstrap.dispatch.dispatcher import Dispatcher
from ngpu_bootstrap.dispatch.watch import TaskWatch
from ngpu_bootstrap.errors import Refusal, Unauthorized
from ngpu_bootstrap.front.answers import Answer, refusal_answer, refusal_for
from ngpu_bootstrap.front.brc20_api import Brc20Api
from ngpu_bootstrap.front.callers import Network, affinity_key, client_address, passed_on
from ngpu_bootstrap.front.extension import Extension
from ngpu_bootstrap.front.guards import FailedTries, TokenLimits
from ngpu_bootstrap.front.paths import proxied_target, split_target, unslipped
from ngpu_bootstrap.front.profiled import Profiled, Shape, shape_of
from ngpu_bootstrap.front.promised import idempotency_key
from ngpu_bootstrap.front.proxy import ProxySink
from ngpu_bootstrap.front.queue_news import place_teller
from ngpu_bootstrap.front.reads_api import Wire
from ngpu_bootstrap.front.tasks_api import TasksApi, UserRequest, address_header
from ngpu_bootstrap.metrics import Metrics
from ngpu_bootstrap.profiles.links import FILES_PREFIX
from ngpu_bootstrap.registry.deployments import DeploymentTable
from ngpu_bootstrap.registry.nodes import Nodes
from ngpu_bootstrap.registry.workspaces import Workspaces
from ngpu_bootstrap.store.errors import StoreError
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.http1 import Exchange, Handler, RemoteError, wants_upgrade
from ngpu_protocol.task_ids import RANDOM_LIMIT, format_task_id

log = structlog.get_logger(__name__)

# A body up to this is read before a node is chosen, so that the call can be tried again elsewhere; a longer one goes
# to the node piece by piece as it comes.
WHOLE_BODY_BYTES = 64 * 1024


class TaskIds:
    """Makes task ids, with the time in the zone that clients see.

    Randomness is the system's, fetched for many ids at once: one system call for each would be felt.
    """

    _BYTES = 9  # 72 bits, of which numbers at or above 47 * RANDOM_LIMIT are thrown away, so that all are alike
    _USABLE = (1 << 72) // RANDOM_LIMIT * RANDOM_LIMIT

    def __init__(self, now_ms: Callable[[], int], zone_offset_minutes: int) -> None:
        self.now_ms = now_ms
        self._zone_offset_minutes = zone_offset_minutes
        self._pool = b""

    def __call__(self) -> str:
        while True:
            if len(self._pool) < self._BYTES:
                self._pool = os.urandom(256 * self._BYTES)
            drawn, self._pool = self._pool[: self._BYTES], self._pool[self._BYTES :]
            number = int.from_bytes(drawn, "big")
            if number < self._USABLE:
                return format_task_id(self.now_ms(), self._zone_offset_minutes, number % RANDOM_LIMIT)


class Front:
    """The handler of the clients' listener.

    Attributes:
        application: serves what neither form is.
        tasks_api: the documented form.
        profiled: the declared form; None where no profile is in use.

    Args:
        trusted: proxies whose word on the client's address is believed.
        async_deadline_s: how long an asynchronous task may wait and run altogether.
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
        metrics: Metrics,
        limits: LimitsSection,
        async_deadline_s: float,
        new_task_id: TaskIds,
        wire: Wire,
        brc20: Brc20Desk,
        checks_per_minute: int,
        watch: TaskWatch,
        check_webhook: Callable[[str], str],
        check_operator: Callable[[Token], None],
        trusted: Sequence[Network] = (),
    ) -> None:
        self._workspaces = workspaces
        self._dispatcher = dispatcher
        self._metrics = metrics
        self.application: Handler = _nothing
        self.profiled: Profiled | None = None
        self._limits = limits
        self.new_task_id = new_task_id
        self._now_ms = new_task_id.now_ms
        self._trusted = trusted
        self._brc20_desk = brc20
        self._brc20_api = Brc20Api(brc20.checker, per_minute=checks_per_minute)
        self.failed_tries = FailedTries()
        # None where the operator sets no limit: then it costs a call nothing
        self.token_limits = (
            TokenLimits(per_s=limits.token_calls_per_s, burst=limits.token_burst, at_once=limits.token_calls_at_once)
            if limits.token_calls_per_s or limits.token_calls_at_once
            else None
        )
        self.tasks_api = TasksApi(
            workspaces=workspaces,
            deployments=deployments,
            dispatcher=dispatcher,
            detached=detached,
            nodes=nodes,
            store=store,
            limits=limits,
            wire=wire,
            brc20=brc20,
            async_deadline_s=async_deadline_s,
            new_task_id=new_task_id,
            now_ms=new_task_id.now_ms,
            watch=watch,
            check_webhook=check_webhook,
            check_operator=check_operator,
        )

    async def handle(self, exchange: Exchange) -> None:
        """Serve one request."""
        shape: Shape = _plain
        try:
            path, query = split_target(exchange.request.target)
            if path.startswith("/proxy/"):
                await self._proxy(exchange, path, query)
            elif path.startswith("/brc20/"):
                shape = _documented
                await self._brc20(exchange, path, query)
            elif self.extension is not None and path.startswith(self.extension.prefix):
                shape = _documented
                await self._extended(exchange, self.extension, path, query)
            elif path.startswith("/user/"):
                shape = _documented
                await self._user(exchange, path, query)
            elif self.profiled is None:
                await self._pass_to_application(exchange)
            elif (found := self.profiled.match(exchange.request.method, path)) is not None:
                shape = shape_of(found)
                await self.profiled.answer(exchange, found, path, query)
            elif path.startswith(FILES_PREFIX):
                await self.profiled.file(exchange, path, query)
            elif (near := self.profiled.shape_near(path)) is not None:
                shape = near
                raise Refusal(404, "not_found", "nothing is served at this path; /docs lists what is")
            else:
                await self._pass_to_application(exchange)
        except (Refusal, ClientFault, RemoteError, StoreError) as error:
            await self._answer_error(exchange, error, shape)

    async def handle_of(self, profile: str, exchange: Exchange) -> None:
        """Serve one request of a profile's own listener, which answers nothing else."""
        shape: Shape = _plain
        try:
            assert self.profiled is not None
            path, query = split_target(exchange.request.target)
            found = self.profiled.match(exchange.request.method, path, profile)
            if found is None:
                shape = self.profiled.shape_of_profile(profile)
                raise Refusal(404, "not_found", "nothing is served at this path")
            shape = shape_of(found)
            await self.profiled.answer(exchange, found, path, query)
        except (Refusal, ClientFault, RemoteError, StoreError) as error:
            await self._answer_error(exchange, error, shape)

    async def _answer_error(self, exchange: Exchange, error: Exception, shape: Shape) -> None:
        if isinstance(error, StoreError):
            log.error("store_failed", reason=str(error))
        await self._refuse(exchange, refusal_for(error), shape)

    async def _pass_to_application(self, exchange: Exchange) -> None:
        limit = self._limits.api_body_bytes
        exchange.max_body_bytes = limit
        if (exchange.request.content_length or 0) > limit:
            raise Refusal(413, "body_too_large", f"at most {limit} bytes are taken")
        await self.application(exchange)

    def answer_failed_try(self, peer: str, headers: Sequence[tuple[bytes, bytes]], refusal: Refusal) -> Refusal:
        """Return what a client gets for *refusal*: 429 once its address has shown too many unknown credentials."""
        if not isinstance(refusal, Unauthorized):
            return refusal
        address = client_address(peer, list(headers), self._trusted)
        return self.failed_tries.answer(address, refusal, time.monotonic())

    async def _refuse(self, exchange: Exchange, refusal: Refusal, shape: Shape) -> None:
        refusal = self.answer_failed_try(exchange.remote.host, exchange.request.headers, refusal)
        self._metrics.refused(refusal.reason)
        log.info(
            "call_refused",
            reason=refusal.reason,
            status=refusal.status,
            method=exchange.request.method,
            client=exchange.remote.host,
        )
        if exchange.head_sent:
            await exchange.abort()
            return
        await respond(exchange, shape(refusal))

    async def _proxy(self, exchange: Exchange, path: str, query: str | None) -> None:
        request = exchange.request
        presented = take_credential(request.headers, query)
        workspace, token = self._workspaces.authenticate(presented.token)
        if self._brc20_desk.asks(workspace.id):
            await self._brc20_desk.admit(workspace.id, address_header(request.headers))
        spec = workspace.spec
        where = proxied_target(path, presented.query, spec.ports)
        upgrade = wants_upgrade(request.headers)
        body = await self._body(exchange)
        now_ms = self._now_ms()
        task_id = self.new_task_id()
        call = Call(
            task_id=task_id,
            spec=spec,
            api="proxy",
            method=request.method,
            port=where.port,
            target=where.target,
            headers=passed_on(presented.headers, upgrade=upgrade),
            body=body,
            accepted_at_ms=now_ms,
            deadline_ms=now_ms + int((self._limits.queue_wait_s + spec.request_timeout_s) * 1000),
            idempotency_key=idempotency_key(request.headers),
            upgrade=upgrade,
            affinity=affinity_key(request.headers),
            tell_place=place_teller(exchange, task_id),
            user_ip=client_address(exchange.remote.host, request.headers, self._trusted),
            request_url=path if presented.query is None else f"{path}?{presented.query}",
            token_label=token.label,
        )
        limits = self.token_limits
        if limits is not None:
            limits.enter(token.label, time.monotonic())
        try:
            await self._carry(exchange, call)
        finally:
            if limits is not None:
                limits.leave(token.label)

    async def _carry(self, exchange: Exchange, call: Call) -> None:
        sink = ProxySink(exchange, call.task_id)
        result = await self._dispatcher.carry(call, sink)
        try:
            await sink.finish(result)
        except Refusal as refusal:
            await respond(exchange, refusal_answer(refusal, documented=False, task_id=call.task_id))

    async def _body(self, exchange: Exchange) -> Body:
        request, limit = exchange.request, self._limits.request_body_bytes
        exchange.max_body_bytes = limit
        length = request.content_length
        if length is None and not request.chunked:
            return WholeBody()
        if length is not None and length > limit:
            raise Refusal(413, "body_too_large", f"the body has {length} bytes, at most {limit} are taken")
        if length is not None and length <= WHOLE_BODY_BYTES:
            return WholeBody(await exchange.receive_all(WHOLE_BODY_BYTES))
        return StreamedBody(exchange)

    @property
    def extension(self) -> Extension | None:
        """What answers the calls of existing NGPU clients, where the operator asked for that."""
        return self.tasks_api.extension

    async def _extended(self, exchange: Exchange, extension: Extension, path: str, query: str | None) -> None:
        request = exchange.request
        client = client_address(exchange.remote.host, request.headers, self._trusted)
        exchange.max_body_bytes = self._limits.api_body_bytes
        answer = await extension.call(request.method, path, query, request.headers, client, exchange.receive_all)
        await respond(exchange, answer)

    async def _brc20(self, exchange: Exchange, path: str, query: str | None) -> None:
        path, query = unslipped(path, query)
        presented = take_credential(exchange.request.headers, query)
        client = client_address(exchange.remote.host, exchange.request.headers, self._trusted)
        await respond(exchange, await self._brc20_api.answer(exchange.request.method, path, presented.query, client))

    async def _user(self, exchange: Exchange, path: str, query: str | None) -> None:
        request = exchange.request
        path, query = unslipped(path, query)
        presented = take_credential(request.headers, query)
        asked = UserRequest(
            method=request.method,
            path=path,
            query=presented.query,
            headers=presented.headers,
            token=presented.token,
            idempotency_key=idempotency_key(request.headers),
            user_ip=client_address(exchange.remote.host, request.headers, self._trusted),
            place_teller=partial(place_teller, exchange),
            shown=None if self.profiled is None else partial(self.profiled.shown, exchange),
        )
        limits, label = self.token_limits, ""
        if limits is not None and presented.token is not None and not presented.token.is_operator_key:
            label = self._workspaces.authenticate(presented.token)[1].label
            limits.enter(label, time.monotonic())
        try:
            answer = await self.tasks_api.answer(asked, exchange.receive_all)
        finally:
            if limits is not None and label:
                limits.leave(label)
        await respond(exchange, answer)


def _plain(refusal: Refusal) -> Answer:
    return refusal_answer(refusal, documented=False)


def _documented(refusal: Refusal) -> Answer:
    return refusal_answer(refusal, documented=True)


async def _nothing(exchange: Exchange) -> None:
    raise Refusal(404, "not_found", "nothing is served at this path")


async def respond(exchange: Exchange, answer: Answer) -> None:
    """Send a whole answer of our own."""
    await exchange.respond(answer.status, answer.headers, answer.body)
