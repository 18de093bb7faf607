"""The declared form: calls of other systems' clients, carried as the profile that knows them says.

Owns the order of events of such a call, up to the dispatcher:

    matched -> credential of head and query judged -> body read, validated, its credential judged -> workspace found
    -> a place -> carried, transparent, wrapped or as a job -> answered in the caller's dialect

A credential in the head is judged before the body is asked for, so that nobody without one has a long body read where
the profile lets it stand there. A call takes one of its route's places once all of it is here and may be carried:
whoever sends slowly, or what is refused, holds none. The task is recorded with the workspace that runs it and with its
caller, whose limits count and whose it is from then on.

How bodies are read is `profiles.reading`'s, which workspace answers for a model `registry.shared_models`'.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import quote, unquote, unquote_to_bytes

import structlog
import trio

from ngpu_bootstrap.brc20.desk import Brc20Desk
from ngpu_bootstrap.config import LimitsSection, ModelsSection, ProfilesSection
from ngpu_bootstrap.credentials import Token
from ngpu_bootstrap.dispatch.attempt import Sink
from ngpu_bootstrap.dispatch.calls import Body, Call, ClientFault, StreamedBody, WholeBody
from ngpu_bootstrap.dispatch.collector import Collector
from ngpu_bootstrap.dispatch.dispatcher import Dispatcher, Result
from ngpu_bootstrap.errors import BadRequest, NodeFault, NotServed, Refusal
from ngpu_bootstrap.front.answers import Answer, WorkspaceAnswer, json_answer, refusal_for
from ngpu_bootstrap.front.callers import Network, affinity_key, client_address, is_within, passed_on
from ngpu_bootstrap.front.guards import AddressBuckets, TokenLimits, network_of
from ngpu_bootstrap.front.job_calls import JobCalls
from ngpu_bootstrap.front.keeping import KeepingSink
from ngpu_bootstrap.front.model_sinks import ModelSink, RewritingSink, rewritten
from ngpu_bootstrap.front.node_files import NodeFiles
from ngpu_bootstrap.front.paths import parse_parameters, workspace_target
from ngpu_bootstrap.front.places import Places
from ngpu_bootstrap.front.promised import Promises, TaskEnded, idempotency_key
from ngpu_bootstrap.front.queue_news import place_teller
from ngpu_bootstrap.front.spool import PARSED_BYTES, Pace, Room, Spool, SpooledBody
from ngpu_bootstrap.front.tasks_api import address_header
from ngpu_bootstrap.profiles.catalogue import Catalogue, Matched, WrongMethod
from ngpu_bootstrap.profiles.credentials import Emptied, missing, take_credentials, token_of
from ngpu_bootstrap.profiles.declaration import Dialect, Envelope, Links, Mode, Profile, Route
from ngpu_bootstrap.profiles.dialects import refusal_in, status_in
from ngpu_bootstrap.profiles.job_declaration import AskedJob, SubmittedJob
from ngpu_bootstrap.profiles.links import Link, link_url, read_link, with_file_urls, with_links
from ngpu_bootstrap.profiles.places import Place
from ngpu_bootstrap.profiles.reading import BodyFacts, BodyReader, Wanted, wanted_of
from ngpu_bootstrap.registry.nodes import Nodes
from ngpu_bootstrap.registry.shared_models import Model, Models
from ngpu_bootstrap.registry.sticky_keys import StickyKeys
from ngpu_bootstrap.registry.workspaces import Workspace, Workspaces
from ngpu_bootstrap.store import job_rows
from ngpu_bootstrap.store.errors import StoreError
from ngpu_bootstrap.store.records import TaskRecord
from ngpu_bootstrap.store.store import Store
from ngpu_bootstrap.tasks.states import TaskState
from ngpu_protocol.errors import AddressError
from ngpu_protocol.http1 import Exchange, Headers, RemoteError, Request, header
from ngpu_protocol.identity import Account, Address, address_of_peer_id, parse_address
from ngpu_protocol.job_answers import BESIDE_HEADER

log = structlog.get_logger(__name__)

NODE_HEADER = b"ngpu-node"
CLIENT_LEFT = 499
"""In a log: the client left before it was answered, as other servers write it."""
WHOLE_BODY_BYTES = 64 * 1024
MAX_SAID_BYTES = 500
"""Of what a workspace said when it refused a job, to be shown."""
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}(?::[0-9]{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](?::[0-9]{1,5})?")
_PARAMETER = re.compile(r"\{([a-z_][a-z0-9_]*)(?:\.\.\.)?\}")
_CALL_OF_KIND = {
    "text-to-text": "/v1/chat/completions",
    "text-to-image": "/v1/images/generations",
    "image-edit": "/v1/images/edits",
}


Shape = Callable[[Refusal], Answer]
"""How a refusal looks to the caller at hand."""


def shape_of(found: Matched | WrongMethod) -> Shape:
    """Return how refusals of a call look."""
    return _shape(found.profile, found.route if isinstance(found, Matched) else None)


def _shape(profile: Profile, route: Route | None) -> Callable[..., Answer]:
    return partial(refusal_in, profile.dialect_of(route), words=profile.error_words)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call: a workspace, by one of its tokens, or the public by the one the operator bound."""

    workspace: Workspace
    label: str
    address: str

    @property
    def line(self) -> str:
        """Whose calls take turns with others': a workspace's, by whichever token, or those of one address."""
        return self.workspace.id if self.label else network_of(self.address)


@dataclass(frozen=True, slots=True)
class Parts:
    """What calls are carried with."""

    workspaces: Workspaces
    models: Models
    nodes: Nodes
    dispatcher: Dispatcher
    jobs: JobCalls
    promises: Promises
    store: Store
    sticky: StickyKeys
    brc20: Brc20Desk
    account: Account
    network: str
    signers: Callable[[], Collection[str]]
    spool: Spool
    new_task_id: Callable[[], str]
    now_ms: Callable[[], int]


@dataclass(slots=True)
class _Asked:
    """One call on its way through here.

    Attributes:
        refused: why it may not be taken now, unless its client asked for it under its key before.
    """

    exchange: Exchange
    profile: Profile
    route: Route
    parameters: Mapping[str, str]
    path: str
    emptied: Emptied
    address: str
    began_s: float
    status: int = 0
    refused: Refusal | None = None
    caller: Caller | None = None
    facts: BodyFacts = field(default_factory=BodyFacts)


class Profiled:
    """Answers the calls that profiles declare, and the links to files.

    Args:
        scheme: of the bootstrap's own listener.
        token_limits: what one token may do; None sets no limit.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        parts: Parts,
        *,
        settings: ProfilesSection,
        models: ModelsSection,
        limits: LimitsSection,
        scheme: str,
        trusted: Sequence[Network],
        token_limits: TokenLimits | None,
    ) -> None:
        self.catalogue = catalogue
        self._parts = parts
        self._settings = settings
        self._models = models
        self._limits = limits
        self._scheme = scheme
        self._trusted = trusted
        self._token_limits = token_limits
        self._files = NodeFiles(parts.nodes, max_bytes=models.file_bytes)
        self._parsed = Room(PARSED_BYTES)
        self._wanted: dict[int, Wanted] = {}
        self._places: dict[int, Places] = {}
        self._public: dict[str, tuple[AddressBuckets, Places]] = {}
        for profile in catalogue.profiles:
            for route in profile.routes:
                self._wanted[id(route)] = wanted_of(profile, route)
                if route.at_once:
                    self._places[id(route)] = Places(route.at_once, route.queue, route.queue_wait_s)
        for name, public in settings.public.items():
            per_minute = public.calls_per_minute
            self._public[name] = (
                AddressBuckets(burst=per_minute, per_s=per_minute / 60),
                Places(public.at_once, public.queue, public.queue_wait_s),
            )

    # -- what a call means

    def match(self, method: str, path: str, only: str = "") -> Matched | WrongMethod | None:
        """Return what answers a call; None: no profile is concerned."""
        return self.catalogue.match(method, path, only=only)

    def shape_near(self, path: str) -> Shape | None:
        """Return how the refusal of a path that nothing answers looks, where a profile has such paths."""
        profile = self.catalogue.near(path)
        return None if profile is None else _shape(profile, None)

    def shape_of_profile(self, name: str) -> Shape:
        """Return how refusals of calls that are none of a profile's look on its own listener."""
        profile = self.catalogue.get(name)
        return partial(refusal_in, Dialect.NGPU) if profile is None else _shape(profile, None)

    async def answer(self, exchange: Exchange, found: Matched | WrongMethod, path: str, query: str | None) -> None:
        """Answer one call.

        Raises:
            Refusal, ClientFault, RemoteError, StoreError: it cannot be served, and nothing was answered yet.
        """
        began_s = time.monotonic()
        request = exchange.request
        address = client_address(exchange.remote.host, request.headers, self._trusted)
        if isinstance(found, WrongMethod):
            _log_request(found.profile, request, path, 405, began_s, address)
            allowed = ", ".join(sorted(set(found.allowed)))
            raise Refusal(405, "method_not_allowed", f"this path takes {allowed}", headers={"Allow": allowed})
        profile, route = found.profile, found.route
        emptied = take_credentials(profile.credentials, request.headers, query)
        asked = _Asked(exchange, profile, route, found.parameters, path, emptied, address, began_s)
        try:
            await self._answer(asked)
        except (Refusal, ClientFault, RemoteError, StoreError) as error:
            asked.status = status_in(profile.dialect_of(route), refusal_for(error).status)
            raise
        finally:
            _log_request(profile, request, path, asked.status or CLIENT_LEFT, began_s, address)

    async def _answer(self, asked: _Asked) -> None:
        route = asked.route
        if route.mode is Mode.FIXED:
            await self._fixed(asked)
            return
        if route.signed:
            await self._signed(asked)
            return
        wanted = self._wanted[id(route)]
        inside = bool(wanted.credentials) and route.mode is not Mode.MODELS  # which has no body
        token, _ = token_of(asked.profile.credentials, asked.emptied, {})
        if token is not None or not inside:
            asked.caller = self._caller(asked, token)
        async with AsyncExitStack() as stack:
            if route.mode is Mode.MODELS:
                await self._take_place(asked, stack)
                self._enter(asked, stack)
                await self._list(asked)
                return
            body = await self._read(asked, wanted, stack)
            if asked.caller is None:
                token, _ = token_of(asked.profile.credentials, asked.emptied, asked.facts.credentials)
                asked.caller = self._caller(asked, token)
            workspace = None if isinstance(route.job, AskedJob) else self._workspace(asked)
            await self._take_place(asked, stack)
            self._enter(asked, stack)
            await self._admit(asked)
            if isinstance(body, SpooledBody):  # whole in memory only while it has its place
                body = await body.body(whole=route.mode is not Mode.TRANSPARENT)
            if workspace is None:
                await self._ask_job(asked, body)
            else:
                await self._carry(asked, workspace, body)

    def _caller(self, asked: _Asked, token: Token | None) -> Caller:
        if token is not None:
            workspace, known = self._parts.workspaces.authenticate(token)
            return Caller(workspace, known.label, asked.address)
        public = self._settings.public.get(asked.profile.name)
        if public is None:
            raise missing(asked.profile.credentials)
        workspace_or_none = self._parts.workspaces.get(public.workspace)
        if workspace_or_none is None:
            raise _unbound(asked.profile.name)
        wait_s = self._public[asked.profile.name][0].take(asked.address, time.monotonic())
        if wait_s:
            raise NotServed(
                429,
                "too_many_calls",
                f"without a token at most {public.calls_per_minute} calls a minute are taken from one address",
                retry_after_s=math.ceil(wait_s),
            )
        return Caller(workspace_or_none, "", asked.address)

    async def _take_place(self, asked: _Asked, stack: AsyncExitStack) -> None:
        """Take a place of the public's and of the route's, where there are so many; the stack gives them back."""
        caller, places = asked.caller, self._places.get(id(asked.route))
        assert caller is not None
        if not caller.label:
            await stack.enter_async_context(self._public[asked.profile.name][1].one(caller.line))
        if places is not None:
            await stack.enter_async_context(places.one(caller.line))

    def _enter(self, asked: _Asked, stack: AsyncExitStack) -> None:
        """Begin a call within what its token may do; the stack ends it."""
        caller = asked.caller
        assert caller is not None
        if caller.label and self._token_limits is not None:
            self._token_limits.enter(caller.label, time.monotonic())
            stack.callback(self._token_limits.leave, caller.label)

    async def _admit(self, asked: _Asked) -> None:
        """Ask for the assets that a call of its caller's needs, where it needs some."""
        caller, desk = asked.caller, self._parts.brc20
        assert caller is not None
        if desk.asks(caller.workspace.id):
            try:
                await desk.admit(caller.workspace.id, address_header(asked.exchange.request.headers))
            except Refusal as refusal:
                if not _is_promised(asked):
                    raise
                asked.refused = refusal

    # -- the body

    async def _read(self, asked: _Asked, wanted: Wanted, stack: AsyncExitStack) -> Body:
        exchange, route = asked.exchange, asked.route
        limit = min(route.body_limit, self._limits.request_body_bytes)
        if route.mode in (Mode.WRAPPED, Mode.JOB):
            limit = min(limit, self._limits.task_body_bytes)
        request = exchange.request
        exchange.max_body_bytes = limit
        length = request.content_length
        if length is not None and length > limit:
            raise Refusal(413, "body_too_large", f"the body has {length} bytes, at most {limit} are taken")
        has_body = length is not None or request.chunked
        if not wanted.anything:
            if not has_body:
                return WholeBody()
            if route.mode is not Mode.TRANSPARENT or (length is not None and length <= WHOLE_BODY_BYTES):
                return WholeBody(await exchange.receive_all(limit))
            return StreamedBody(exchange)
        encoding = (header(request.headers, b"content-encoding") or b"identity").strip().lower()
        if has_body and encoding != b"identity":
            raise Refusal(415, "body_encoded", "this call's body is looked into, so it must not be compressed")
        reader = BodyReader(wanted, header(request.headers, b"content-type"))
        spooled = await stack.enter_async_context(SpooledBody(self._parts.spool))
        held, pace, network = 0, Pace(trio.current_time()), network_of(asked.address)
        try:
            while has_body and (data := await exchange.receive()):
                pace.check(exchange.received_bytes, trio.current_time())
                out = reader.feed(data)
                if reader.held_bytes - held >= WHOLE_BODY_BYTES:
                    self._parsed.reserve(reader.held_bytes - held, network)
                    held = reader.held_bytes
                await spooled.write(out)
            rest = await trio.to_thread.run_sync(reader.end) if reader.is_long else reader.end()
        finally:
            self._parsed.give_back(held, network)
        await spooled.write(rest)
        asked.facts = reader.facts
        return spooled

    # -- where it goes

    def _workspace(self, asked: _Asked) -> Workspace:
        caller = asked.caller
        assert caller is not None
        profile = asked.profile
        if profile.workspace == "token":
            return caller.workspace
        if profile.workspace == "bound":
            bound = self._settings.bind.get(profile.name, "")
            workspace = self._parts.workspaces.get(bound)
            if workspace is None:
                raise _unbound(profile.name)
            return workspace
        if asked.facts.model is None:
            raise BadRequest("model_missing", "the body names no model; send it as `model`")
        return self._parts.models.find(caller.workspace, asked.facts.model, asked.facts.project)

    def _call(self, asked: _Asked, workspace: Workspace, body: Body, *, only: Address | None = None) -> Call:
        parts, route, caller = self._parts, asked.route, asked.caller
        assert caller is not None
        request = asked.exchange.request
        spec = workspace.spec
        port = route.port if route.port is not None else spec.ports[0]
        if port not in spec.ports and spec.is_image:
            raise Refusal(404, "port_undeclared", f"the workspace does not declare port {port}, which this call needs")
        target = _filled(route.target_path, asked.parameters)
        path, separator, own = target.partition("?")
        query = "&".join(part for part in (own if separator else None, asked.emptied.query) if part) or None
        where = workspace_target(port, path, query)
        now_ms = parts.now_ms()
        task_id = parts.new_task_id()
        timeout_s = min(spec.request_timeout_s, route.timeout_s or spec.request_timeout_s)
        foreign = caller.workspace.id if caller.workspace.id != workspace.id else ""
        return Call(
            task_id=task_id,
            spec=spec,
            api=asked.profile.name,
            method=route.target_method or request.method,
            port=where.port,
            target=where.target,
            headers=self._headers(asked, body),
            body=body,
            accepted_at_ms=now_ms,
            deadline_ms=now_ms + int((self._limits.queue_wait_s + timeout_s) * 1000),
            idempotency_key=idempotency_key(request.headers, foreign),
            affinity=self._affinity(asked, workspace),
            tell_place=place_teller(asked.exchange, task_id),
            user_ip=caller.address,
            request_url=asked.path if asked.emptied.query is None else f"{asked.path}?{asked.emptied.query}",
            token_label=caller.label,
            caller=foreign,
            gpu_types=route.gpu_types,
            only=only if only is not None else self._named_node(asked, workspace),
        )

    def _headers(self, asked: _Asked, body: Body) -> Headers:
        headers = passed_on(asked.emptied.headers, upgrade=False)
        route = asked.route
        rewrites = route.file_urls or route.links is not None or route.mode is not Mode.TRANSPARENT
        if not isinstance(body, StreamedBody):
            size = len(body.content) if isinstance(body, WholeBody) else body.sent()[1]
            headers = [pair for pair in headers if pair[0] != b"content-length"]
            if size or asked.exchange.request.method in ("POST", "PUT", "PATCH"):
                headers.append((b"content-length", b"%d" % size))
        if rewrites:  # what is read here must be readable
            headers = [pair for pair in headers if pair[0] != b"accept-encoding"]
        return headers

    def _affinity(self, asked: _Asked, workspace: Workspace) -> bytes:
        """Return the key that holds calls together: the client's own header, else what the route declares."""
        own = affinity_key(asked.exchange.request.headers)
        if own or not asked.route.affinity:
            return own
        assert asked.caller is not None
        caller = asked.caller.workspace.id
        for place in asked.route.affinity:
            value = value_at(place, asked.facts, asked.parameters, asked.emptied)
            # where the credential may stand, the client itself is the key, wherever it put its credential
            if asked.caller.label and any(place.is_same_as(one) for one in asked.profile.credentials):
                value = caller
            if value:
                return StickyKeys.of(workspace.id, caller, f"{asked.profile.name} {place.field}", value)
        return b""

    def _named_node(self, asked: _Asked, workspace: Workspace) -> Address | None:
        value = header(asked.exchange.request.headers, NODE_HEADER)
        if value is None:
            return None
        text = value.decode("latin-1").strip()
        try:
            node = parse_address(text) if text.startswith("0x") or len(text) == 40 else address_of_peer_id(text)
        except AddressError:
            raise BadRequest("bad_node", "Ngpu-Node must be a nodeAddr or a PeerId") from None
        if not self._parts.nodes.serves(workspace.spec, node):
            raise Refusal(404, "node_lacks_model", f"the node {node} does not serve this model now")
        return node

    # -- carrying it

    async def _carry(self, asked: _Asked, workspace: Workspace, body: Body) -> None:
        route = asked.route
        call = self._call(asked, workspace, body)
        if self._is_kept(asked, call):
            try:
                await self._parts.sticky.find(call.spec, call.affinity, refuse_s=route.refuses_s)
            except NotServed as refusal:
                if not _is_promised(asked):
                    raise
                asked.refused = refusal
        if route.mode is Mode.TRANSPARENT:
            await self._pass_through(asked, call)
        elif route.mode is Mode.WRAPPED:
            await self._wrap(asked, call)
        else:
            await self._submit_job(asked, call)

    async def _pass_through(self, asked: _Asked, call: Call) -> None:
        exchange, route = asked.exchange, asked.route
        words = partial(_words_of, _shape(asked.profile, route), call.task_id)
        if route.file_urls or route.links is not None:
            sink: ModelSink = RewritingSink(exchange, call.task_id, words, partial(self._rewritten, asked, call))
        else:
            sink = ModelSink(exchange, call.task_id, words)
        passing: Sink = sink
        if self._is_kept(asked, call):
            passing = KeepingSink(sink, partial(self._keep, call))
        result = await self._parts.dispatcher.carry(call, passing)
        try:
            await sink.finish(result)
            asked.status = sink.status
        except Refusal as refusal:
            await self._refuse_task(asked, refusal, call.task_id)

    def _is_kept(self, asked: _Asked, call: Call) -> bool:
        """Whether a call is held on its node by what its route declares, and not by the client's own header."""
        return bool(call.affinity and asked.route.affinity) and not affinity_key(asked.exchange.request.headers)

    async def _keep(self, call: Call) -> None:
        """Keep where a declared key leads: the node that is answering under it."""
        attempt = self._parts.dispatcher.under_way.get(call.task_id)
        if attempt is not None:
            await self._parts.sticky.note(call.spec, call.affinity, attempt.signed.order.node)

    async def _wrap(self, asked: _Asked, call: Call) -> None:
        call = dataclasses.replace(call, wrapped=True)
        if _is_promised(asked):
            await self._wrap_promised(asked, call)
            return
        sink = Collector(self._limits.task_answer_bytes)
        result = await self._parts.dispatcher.carry(call, sink)
        if result.ending.state is not TaskState.FINISHED:
            await self._refuse_task(asked, result.ending.refusal(), call.task_id)
            return
        if self._is_kept(asked, call) and result.attempt is not None:
            await self._parts.sticky.note(call.spec, call.affinity, result.attempt.signed.order.node)
        await self._respond(asked, self._enveloped(asked, sink.status, sink.body, sink.content_type), call.task_id)

    async def _wrap_promised(self, asked: _Asked, call: Call) -> None:
        """Answer a call whose client may come again under its key: the task is kept, and runs on without its client."""
        promises = self._parts.promises
        call = dataclasses.replace(call, detach=True, tell_place=None)
        task_id = await promises.submit(call, asked.refused)
        try:
            record = await promises.ended(task_id, call.deadline_ms)
        except TaskEnded as ended:
            await self._refuse_task(asked, ended.refusal, task_id)
            return
        if task_id == call.task_id and record.node and self._is_kept(asked, call):
            await self._parts.sticky.note(call.spec, call.affinity, Address(record.node))
        answer = await promises.kept(record)
        await self._respond(asked, self._enveloped(asked, answer.status, answer.body, answer.content_type), task_id)

    def _enveloped(self, asked: _Asked, status: int, body: bytes, content_type: str) -> Answer:
        envelope = asked.route.envelope
        if envelope is not None and 200 <= status < 300 and (around := enveloped(envelope, body)) is not None:
            body, content_type = around, "application/json"
        fields = [(b"content-type", content_type.encode("latin-1"))] if content_type else []
        return Answer(status, [*fields, (b"content-length", b"%d" % len(body))], body)

    async def _submit_job(self, asked: _Asked, call: Call) -> None:
        declared, caller = asked.route.job, asked.caller
        assert isinstance(declared, SubmittedJob)
        assert caller is not None
        jobs = self._parts.jobs
        name, terms = f"{asked.profile.name}.{declared.name}", declared.for_request(asked.facts.document)
        try:
            task_id, answer = await jobs.submit(call, name, terms, caller.workspace.id, asked.refused)
        except TaskEnded as ended:
            await self._refuse_task(asked, ended.refusal, ended.task_id)
            return
        if declared.wait and not 200 <= answer.status < 300:
            # its client waits for a result, and knows errors in its own dialect alone
            await self._refuse_task(asked, _refused_job(answer), task_id)
            return
        node = await jobs.node_of(task_id)
        if task_id == call.task_id and self._is_kept(asked, call) and node is not None:
            await self._parts.sticky.note(call.spec, call.affinity, node)
        await self._respond_kept(asked, answer, call.spec.id, node, task_id)

    async def _ask_job(self, asked: _Asked, body: Body) -> None:
        declared, caller = asked.route.job, asked.caller
        assert isinstance(declared, AskedJob)
        assert caller is not None
        key = value_at(declared.key, asked.facts, asked.parameters, asked.emptied)
        if not key:
            raise BadRequest("job_missing", f"the call names no job: send its id as {declared.key}")
        jobs = self._parts.jobs
        row = await jobs.find(caller.workspace.id, f"{asked.profile.name}.{declared.of}", key)
        workspace = self._parts.workspaces.require(row.workspace)
        try:
            kept = await jobs.answer_kept(row, workspace.spec)
        except TaskEnded as ended:
            await self._refuse_task(asked, ended.refusal, ended.task_id)
            return
        if kept is not None:
            node = Address(row.job.node) if row.job.node else None
            await self._respond_kept(asked, kept, row.workspace, node, row.task_id)
            return
        call = self._call(asked, workspace, body, only=Address(row.job.node))
        if row.declared.hold:  # the job's own question may have the only slot there
            fields = [*call.headers, (BESIDE_HEADER.lower().encode(), row.task_id.encode())]
            call = dataclasses.replace(call, headers=fields, beside=row.task_id)
        await self._pass_through(asked, call)
        await jobs.note(row, call.task_id)
        if declared.ends and 200 <= asked.status < 300:
            await jobs.end(row)

    async def _respond_kept(
        self, asked: _Asked, answer: WorkspaceAnswer, workspace: str, node: Address | None, task_id: str
    ) -> None:
        """Answer with what a workspace on *node* answered about a job."""
        if asked.route.links is not None and node is not None:
            answer = await self._linked(asked.exchange, asked.route.links, workspace, node, answer)
        await self._respond(asked, self._enveloped(asked, answer.status, answer.body, answer.content_type), task_id)

    async def shown(self, exchange: Exchange, record: TaskRecord, answer: WorkspaceAnswer) -> WorkspaceAnswer:
        """Return the answer to a task as a poll by its id shows it: with links where its profile's own answers have
        them."""
        profile = self.catalogue.get(record.api)
        if profile is None or not profile.has_linked_jobs:
            return answer
        row = await self._parts.store.look_up(lambda connection: job_rows.of_task(connection, record.task_id))
        if row is None or not row.job.node:
            return answer
        of, _, name = row.name.partition(".")
        links = profile.links_of_job(name) if of == profile.name else None
        if links is None:
            return answer
        return await self._linked(exchange, links, row.workspace, Address(row.job.node), answer)

    # -- answered here

    async def _fixed(self, asked: _Asked) -> None:
        answer = asked.route.answer
        assert answer is not None
        if answer.text is not None:
            body = answer.text.encode()
            fields = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
            await self._respond(asked, Answer(answer.status, fields, body))
            return
        await self._respond(asked, json_answer(answer.status, answer.json_))

    async def _list(self, asked: _Asked) -> None:
        caller = asked.caller
        assert caller is not None
        models = self._parts.models
        origin = self._origin(asked.exchange)
        project = parse_parameters(asked.emptied.query, ("project",)).get("project") or None
        name = next(iter(asked.parameters.values()), None)
        if name is not None:
            name = unquote(name)
            listed = models.listed(caller.workspace, project)
            of, _, rest = name.partition("/")
            one = next((one for one in listed if one.name == name or (one.project == of and one.name == rest)), None)
            if one is None:
                raise Refusal(404, "model_unknown", f"no model {name[:128]!r} is served here now")
            await self._respond(asked, json_answer(200, _model(one, origin)))
            return
        listed = models.listed(caller.workspace, project)
        projects = sorted({one.project for one in listed})
        document = {
            "object": "list",
            "project": project or (projects[0] if len(projects) == 1 else ""),
            "data": [_model(one, origin) for one in listed],
        }
        await self._respond(asked, json_answer(200, document))

    # -- files

    async def file(self, exchange: Exchange, path: str, query: str | None) -> None:
        """Answer a link to a file below a node's output folders.

        Raises:
            Refusal: it is no link, has expired, or its node has no such file.
        """
        if exchange.request.method not in ("GET", "HEAD"):
            raise Refusal(405, "method_not_allowed", "this path takes GET", headers={"Allow": "GET, HEAD"})
        link = self._link(path, query, origin_file=True)
        await self._files.answer(exchange, link)

    async def _signed(self, asked: _Asked) -> None:
        """Answer a link to a workspace's own file: a call of its own workspace, on the node that has the file."""
        link = self._link(asked.path, asked.emptied.query, origin_file=False)
        workspace = self._parts.workspaces.get(link.workspace)
        if workspace is None:
            raise Refusal(404, "file_unknown", "the workspace of this file is gone")
        asked.caller = Caller(workspace, "", asked.address)
        asked.emptied.headers[:] = [pair for pair in asked.emptied.headers if pair[0] != NODE_HEADER]
        call = self._call(asked, workspace, WholeBody(), only=link.node)
        await self._pass_through(asked, call)

    def _link(self, path: str, query: str | None, *, origin_file: bool) -> Link:
        parts = self._parts
        return read_link(
            path,
            query,
            network=parts.network,
            signers=parts.signers(),
            now_s=parts.now_ms() / 1000,
            origin_file=origin_file,
        )

    def _rewritten(self, asked: _Asked, call: Call, body: bytes, result: Result) -> bytes:
        attempt = result.attempt
        if attempt is None:
            return body
        node, route = attempt.signed.order.node, asked.route
        origin = self._origin(asked.exchange)
        if route.file_urls:
            body = with_file_urls(body, partial(self._url, origin, "", node, self._models.file_urls_s))
        if route.links is not None:
            body = self._with_links(asked.exchange, route.links, call.spec.id, node, body)
        return body

    async def _linked(
        self, exchange: Exchange, links: Links, workspace: str, node: Address, answer: WorkspaceAnswer
    ) -> WorkspaceAnswer:
        if answer.content_type.partition(";")[0].strip().lower() != "application/json":
            return answer
        change = partial(self._with_links, exchange, links, workspace, node, answer.body)
        return dataclasses.replace(answer, body=await rewritten(answer.body, change))

    def _with_links(self, exchange: Exchange, links: Links, workspace: str, node: Address, body: bytes) -> bytes:
        origin = self._origin(exchange)
        return with_links(body, links.prefix, partial(self._url, origin, workspace, node, links.expires_s), links.most)

    def _url(self, origin: str, workspace: str, node: Address, lasts_s: float, path: str) -> str:
        parts = self._parts
        link = Link(workspace, node, path, math.ceil(parts.now_ms() / 1000 + lasts_s))
        return link_url(origin, link, parts.account.sign(link.digest(parts.network)))

    def _origin(self, exchange: Exchange) -> str:
        """Return this bootstrap's URL as the client wrote it, without a path."""
        if self._models.public_url:
            return self._models.public_url.rstrip("/")
        headers = exchange.request.headers
        host = (header(headers, b"host") or b"").decode("latin-1")
        if _HOST.fullmatch(host) is None:
            return ""
        scheme = self._scheme
        forwarded = (header(headers, b"x-forwarded-proto") or b"").decode("latin-1").strip().lower()
        if forwarded in ("http", "https") and is_within(exchange.remote.host.partition("%")[0], self._trusted):
            scheme = forwarded
        return f"{scheme}://{host}"

    # -- answering

    async def _respond(self, asked: _Asked, answer: Answer, task_id: str = "") -> None:
        asked.status = answer.status
        headers = [*answer.headers, (b"ngpu-task-id", task_id.encode())] if task_id else answer.headers
        await asked.exchange.respond(answer.status, headers, answer.body)

    async def _refuse_task(self, asked: _Asked, refusal: Refusal, task_id: str) -> None:
        """Answer for a task that was accepted and could not be served."""
        if asked.exchange.head_sent:
            await asked.exchange.abort()
            return
        await self._respond(asked, _shape(asked.profile, asked.route)(refusal, task_id=task_id))


def enveloped(envelope: Envelope, body: bytes) -> bytes | None:
    """Return *body* as a member of an object, byte for byte; None where it is no JSON and goes as it is."""
    try:
        text = body.decode().removeprefix("\ufeff")
        json.loads(text)
    except (ValueError, RecursionError):
        return None
    beside = "".join(f"{json.dumps(name)}:{json.dumps(value)}," for name, value in envelope.beside.items())
    return f"{{{beside}{json.dumps(envelope.member)}:{text}}}".encode()


def value_at(place: Place, facts: BodyFacts, parameters: Mapping[str, str], emptied: Emptied) -> str:
    """Return the text at a place of a request, empty where nothing stands there."""
    name = place.name or ""
    if place.where == "path":
        return unquote(parameters.get(name, ""))
    if place.where == "query":
        return parse_parameters(emptied.query, (name,)).get(name, "")
    if place.where == "header":
        return (header(emptied.headers, name.lower().encode("ascii")) or b"").decode("latin-1").strip()
    if place.where == "cookie":
        for key, value in emptied.headers:
            if key != b"cookie":
                continue
            for part in value.decode("latin-1").split(";"):
                cookie, _, text = part.strip().partition("=")
                if cookie == name:
                    return text
        return ""
    return facts.values.get(place, "")


def _log_request(profile: Profile, request: Request, path: str, status: int, began_s: float, address: str) -> None:
    """Log a request with the fields that the profile's document has, where it has any."""
    if profile.log:
        log.info(
            "HTTP Request",
            ts=time.time(),
            msg="HTTP Request",
            method=request.method,
            path=path,
            status=status,
            duration=f"{time.monotonic() - began_s:.3f}s",
            client_ip=address,
        )


def _filled(pattern: str, parameters: Mapping[str, str]) -> str:
    """Return a route's target. What stands in a path goes into a path as it came; into a query, as one value there."""
    path, separator, query = pattern.partition("?")
    path = _PARAMETER.sub(lambda found: parameters[found[1]], path)
    query = _PARAMETER.sub(lambda found: quote(unquote_to_bytes(parameters[found[1]]), safe=""), query)
    return path + separator + query


def _refused_job(answer: WorkspaceAnswer) -> NodeFault:
    said = answer.body[:MAX_SAID_BYTES].decode("utf-8", "replace")
    shown = "".join(one if one.isprintable() else " " for one in said).strip()
    words = f"the workspace refused the job with status {answer.status}"
    return NodeFault(502, "job_refused", f"{words}: {shown}" if shown else words)


def _unbound(profile: str) -> NotServed:
    return NotServed(503, "profile_unbound", f"no workspace serves the calls of the profile {profile} here now")


def _is_promised(asked: _Asked) -> bool:
    """Whether a call is kept until it ends, so that its client may come again under its key."""
    route = asked.route
    kept = route.mode is Mode.WRAPPED or isinstance(route.job, SubmittedJob)
    return kept and header(asked.exchange.request.headers, b"idempotency-key") is not None


def _model(one: Model, origin: str) -> dict[str, object]:
    call = _CALL_OF_KIND.get(one.kind, "/v1/chat/completions")
    return {
        "id": one.name,
        "object": "model",
        "created": one.since_ms // 1000,
        "owned_by": one.project,
        "project": one.project,
        "model": one.name,
        "type": one.kind,
        "url": f"{origin}{call}",
    }


def _words_of(shape: Callable[..., Answer], task_id: str, refusal: Refusal) -> bytes:
    return shape(refusal, task_id=task_id).body
