"""What other peers may ask of this node over HTTP, and the orders among it (design: One task, step 5).

Routes on `/http/1.1`, all for trusted bootstraps only, but for the first:

    GET          /.well-known/libp2p/protocols            what is mounted
    any          /ngpu/v1/workspaces/{id}/ports/{port}/…  run the order in the field Ngpu-Order
    GET, DELETE  /ngpu/v1/attempts/{task id}/{attempt}    the answer of a detached attempt; cancel an attempt
    GET          /ngpu/v1/workspaces/{id}/logs            what its container says (`container_logs`)
    GET, HEAD    /ngpu/v1/files/{base64url of a path}     a file its owner's model servers wrote (`output_files`)

An order is judged here, by `admission`; one that is admitted runs in `attached` or `detached`.
"""

from __future__ import annotations

import dataclasses
import re

import structlog
import trio

from ngpu_node.container_logs import ContainerLogs
from ngpu_node.execution.admission import Admitted, Asked, Refusal, judge, parse_target
from ngpu_node.execution.attached import run_attached
from ngpu_node.execution.attempt import Key
from ngpu_node.execution.attempts import Attempts
from ngpu_node.execution.detached import DetachedAttempts
from ngpu_node.execution.spool import Spool
from ngpu_node.metrics import NodeMetrics
from ngpu_node.output_files import FILES, OutputFiles
from ngpu_protocol.http1 import Exchange, header
from ngpu_protocol.identity import Address
from ngpu_protocol.job_answers import BESIDE_HEADER
from ngpu_protocol.orders import ORDER_HEADER
from ngpu_protocol.receipts import Outcome
from ngpu_protocol.wire_errors import REFUSED_HEADER, Reason, refusal_body

log = structlog.get_logger(__name__)

HTTP_PROTOCOL = "/http/1.1"
WELL_KNOWN = "/.well-known/libp2p/protocols"
MOUNTS = {"/ngpu/v1": {"path": "/ngpu/v1/"}}
ATTEMPTS = "/ngpu/v1/attempts/"

_LOGS = re.compile(r"/ngpu/v1/workspaces/([1-9][0-9]{0,18})/logs")
_ORDER = ORDER_HEADER.lower().encode()
_BESIDE = BESIDE_HEADER.lower().encode()
_REFUSED = REFUSED_HEADER.encode()
_JSON = (b"content-type", b"application/json")


class Executor:
    """Answers the requests of other peers."""

    def __init__(
        self,
        attempts: Attempts,
        spool: Spool,
        metrics: NodeMetrics,
        logs: ContainerLogs | None = None,
        files: OutputFiles | None = None,
    ) -> None:
        self._attempts = attempts
        self._state = attempts.state
        self._metrics = metrics
        self._detached = DetachedAttempts(attempts, spool)
        self._logs = logs
        self._files = files

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the detached attempts, and forget orders whose time is over, until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._detached.run)
            task_status.started()
            while True:
                await trio.sleep(1.0)
                self._state.seen.forget(self._attempts.clocks.wall_ms())
                self._attempts.give_up_settling()

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request (an `http1` handler); `exchange.remote.peer` is the authenticated peer."""
        request = exchange.request
        parts = parse_target(request.target)
        if parts is not None:
            await self._order(exchange, *parts)
        elif request.target.startswith(ATTEMPTS):
            await self._ask(exchange)
        elif (
            request.method == "GET" and self._logs is not None and (match := _LOGS.fullmatch(request.path)) is not None
        ):
            await self._log(exchange, match[1], self._logs)
        elif request.path.startswith(FILES) and self._files is not None:
            await self._file(exchange, self._files)
        elif request.path == WELL_KNOWN and request.method in ("GET", "HEAD"):
            await exchange.respond_json(200, MOUNTS)
        else:
            await exchange.respond_json(404, {"reason": "not_found", "message": "nothing is mounted at this path"})

    async def _order(self, exchange: Exchange, workspace: str, port: int, target: str) -> None:
        request = exchange.request
        orders = [value for name, value in request.headers if name == _ORDER]
        length = request.content_length if request.content_length is not None or request.chunked else 0
        asked = Asked(request.method, workspace, port, target, length, Address(exchange.remote.peer))
        text = orders[0].decode("latin-1") if len(orders) == 1 else None
        verdict = judge(text, asked, self._state, self._attempts.clocks.wall_ms())
        if isinstance(verdict, Refusal) and verdict.reason is Reason.NO_FREE_SLOT:
            beside = header(request.headers, _BESIDE)
            if beside:
                asked = dataclasses.replace(asked, beside=beside.decode("latin-1"))
                verdict = judge(text, asked, self._state, self._attempts.clocks.wall_ms())
        if not isinstance(verdict, Admitted):
            await self._refuse(exchange, verdict)
            return
        deployment = verdict.deployment
        upstream = deployment.upstream(port)
        if upstream is not None and deployment.route is not None:
            route = deployment.route(request.method, target)
            if route is None:
                message = "the model server was not registered for this call: its registration may declare more `paths`"
                await self._refuse(exchange, Refusal(Reason.PATH_NOT_SERVED, message))
                return
            upstream, target = route
        if upstream is None:
            message = f"nothing serves port {port} of workspace {workspace}, or not this call"
            await self._refuse(exchange, Refusal(Reason.WORKSPACE_NOT_READY, message))
            return
        attempt = self._attempts.begin(verdict, upstream, target)
        exchange.max_body_bytes = self._state.max_body_bytes
        if verdict.signed.order.detach:
            await self._detached.order(attempt, exchange)
        else:
            await run_attached(self._attempts, attempt, exchange)

    async def _refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        self._metrics.refused(refusal.reason)
        log.info("order_refused", reason=refusal.reason, message=refusal.message, peer=exchange.remote.peer)
        fields = [_JSON, (_REFUSED, refusal.reason.encode())]
        await exchange.respond(refusal.reason.status, fields, refusal_body(refusal.reason, refusal.message))

    async def _log(self, exchange: Exchange, workspace: str, logs: ContainerLogs) -> None:
        """Answer a bootstrap that wants to know what one of its service's workspaces says."""
        service = self._state.trust.service_of(Address(exchange.remote.peer))
        if service is None:
            message = "only bootstraps this node's owner trusts may read logs, and only of their own workspaces"
            await self._refuse(exchange, Refusal(Reason.UNKNOWN_BOOTSTRAP, message))
            return
        await logs.answer(exchange, self._state.deployments.revisions(service, workspace).values(), workspace)

    async def _file(self, exchange: Exchange, files: OutputFiles) -> None:
        """Answer a bootstrap that fetches a file which a model's answer named."""
        if self._state.trust.service_of(Address(exchange.remote.peer)) is None:
            message = "only bootstraps this node's owner trusts may fetch files"
            await self._refuse(exchange, Refusal(Reason.UNKNOWN_BOOTSTRAP, message))
            return
        await files.answer(exchange)

    async def _ask(self, exchange: Exchange) -> None:
        """Answer what a bootstrap asks about an attempt of its service."""
        request = exchange.request
        service = self._state.trust.service_of(Address(exchange.remote.peer))
        if service is None:
            message = "only bootstraps this node's owner trusts may ask for attempts"
            await self._refuse(exchange, Refusal(Reason.UNKNOWN_BOOTSTRAP, message))
            return
        task_id, _, number = request.path[len(ATTEMPTS) :].partition("/")
        if request.method not in ("GET", "DELETE") or not number.isascii() or not number.isdigit() or len(number) > 10:
            message = "ask GET or DELETE /ngpu/v1/attempts/{task id}/{attempt}"
            await exchange.respond_json(400, {"reason": "malformed_request", "message": message})
            return
        key: Key = (service, task_id, int(number))
        session = self._state.session.hex()
        running = self._attempts.running.get(key)
        if running is not None and request.method == "DELETE":
            running.stop(Outcome.CANCELLED, "the bootstrap cancelled it")
            await exchange.respond_json(202, {"state": "cancelling", "session": session})
            return
        if running is not None:
            await exchange.respond_json(202, {"state": "running", "session": session})
            return
        answer = await self._detached.find(key)
        if answer is None:
            message = "no attempt of that number runs here, and no answer of it is kept"
            await exchange.respond_json(404, {"reason": "unknown_attempt", "message": message, "session": session})
            return
        await self._detached.follow(exchange, answer)
