"""The calls of `/api/v1`, and what monitors ask: `/health`, `/ready`, `/metrics`.

Owns who may call what. Workspaces are managed with an operator key; a task is shown to whoever knows its id, which is
secret, unless they show another workspace's token; nodes are public, as their records in the DHT are. On the
daemon's own Unix socket the caller is the operator, by the file's permissions.
"""

# Annotations are evaluated here: FastAPI reads them, and those of the calls name things local to build_app.
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import sqlalchemy as sa
import structlog
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from ngpu_bootstrap.api import models, page, placements
from ngpu_bootstrap.api.challenges import add_challenge_calls
from ngpu_bootstrap.api.documented_calls import ERROR_SHOWN, complete
from ngpu_bootstrap.api.live import EVENT_STREAM, LOG_LINES_MAX, Live
from ngpu_bootstrap.api.nodes import NodeParts, add_node_calls
from ngpu_bootstrap.api.profile_calls import ProfileCalls
from ngpu_bootstrap.api.rechecks import RechecksView, recheck_view
from ngpu_bootstrap.api.task_calls import TaskControl, add_task_calls
from ngpu_bootstrap.brc20.desk import Brc20Desk
from ngpu_bootstrap.brc20.policies import Brc20Policy
from ngpu_bootstrap.challenges.desk import ChallengeDesk
from ngpu_bootstrap.credentials import Token, reveal, take_credential
from ngpu_bootstrap.errors import Forbidden, NotServed, Refusal
from ngpu_bootstrap.metrics import Metrics
from ngpu_bootstrap.operator_keys import OperatorKeys, OperatorKeysError, Scope
from ngpu_bootstrap.registry.deployments import DeploymentTable
from ngpu_bootstrap.registry.nodes import Nodes
from ngpu_bootstrap.registry.placements import Placements
from ngpu_bootstrap.registry.standings import Standings
from ngpu_bootstrap.registry.workspaces import NewWorkspace, Workspace, Workspaces
from ngpu_bootstrap.stand_ins import StandIns
from ngpu_bootstrap.store import recheck_rows
from ngpu_bootstrap.store.errors import StoreError, UnknownTask
from ngpu_bootstrap.store.recheck_rows import RecheckRow
from ngpu_bootstrap.store.records import TaskRecord
from ngpu_bootstrap.store.store import Store
from ngpu_daemon.metrics import CONTENT_TYPE, exposition, software_version
from ngpu_protocol.bills import BILL_TYPE, Bill
from ngpu_protocol.errors import AddressError, MalformedError
from ngpu_protocol.identity import parse_address
from ngpu_protocol.statements import STATEMENT_TYPE, Statement

log = structlog.get_logger(__name__)

_DESCRIPTION = """\
A bootstrap peer of the NGPU network: clients call workspaces here, nodes with GPUs run them, and every call leaves a \
receipt that both sides signed.

Beside what is listed here, /proxy/<port>/<path> passes any request through to a workspace, with a workspace token in \
Authorization."""

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {**ERROR_SHOWN, "description": description}
    for status, description in {
        400: "the request is wrong",
        401: "no credential, or an unknown one",
        403: "a credential for something else",
        404: "no such thing",
    }.items()
}

RECHECKS_SHOWN = 100

FindTask = Callable[[str, Token | None], Awaitable[TaskRecord]]


@dataclass(frozen=True, slots=True)
class Parts:
    """What the calls work on.

    Attributes:
        status: what the daemon says of itself to its operator.
        find_task: a task by its id, for whoever may see it.
        waits_for: what a task waits for while no node serves its workspace yet, in words; else empty.
        sign_statement, sign_bill: this bootstrap's signature of a statement, or a bill, of its own.
        open_metrics: whether `/metrics` needs no operator key.
        answer_failed_try: what a client gets for a refusal, by the address and fields of its request.
        draining: whether the daemon is about to stop.
        task_control: cancels tasks and follows them.
        challenges: has nodes show what their GPUs are.
    """

    workspaces: Workspaces
    nodes: Nodes
    deployments: DeploymentTable
    standings: Standings
    placements: Placements
    store: Store
    brc20: Brc20Desk
    metrics: Metrics
    operator_keys: OperatorKeys
    find_task: FindTask
    waits_for: Callable[[TaskRecord], str]
    status: Callable[[], dict[str, Any]]
    stand_ins: StandIns
    sign_statement: Callable[[Statement], bytes]
    sign_bill: Callable[[Bill], bytes]
    open_metrics: bool
    now_ms: Callable[[], int]
    answer_failed_try: Callable[[str, Sequence[tuple[bytes, bytes]], Refusal], Refusal]
    draining: Callable[[], bool]
    task_control: TaskControl
    challenges: ChallengeDesk


def build_app(parts: Parts, *, profiles: ProfileCalls | None = None, is_operators_own: bool = False) -> FastAPI:
    """Return the application.

    Args:
        profiles: the declared calls that are served beside the application, for its document.
        is_operators_own: every caller is the operator (the daemon's Unix socket).
    """
    app = FastAPI(
        title="NGPU bootstrap",
        version=software_version(),
        description=_DESCRIPTION,
        openapi_url="/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    _answer_errors(app, parts)

    def presented(request: Request) -> Token | None:
        return take_credential(request.headers.raw, request.url.query or None).token

    def check_operator(token: Token | None, scope: Scope) -> None:
        """Return if the caller is an operator who may do *scope*."""
        if is_operators_own:
            return
        parts.operator_keys.require(token, scope, parts.now_ms())

    def may(scope: Scope) -> Any:
        """Return the dependency of a call that only an operator with *scope* may make."""

        def check(token: Annotated[Token | None, Depends(presented)]) -> None:
            check_operator(token, scope)

        return Depends(check)

    def owner(token: Token | None, workspace_id: str, scope: Scope) -> None:
        """Return if the caller holds the workspace's own token, or is an operator with *scope*."""
        if token is None or token.is_operator_key or is_operators_own:
            check_operator(token, scope)
        elif parts.workspaces.authenticate(token)[0].id != workspace_id:
            raise Forbidden("token_foreign", "this token is of another workspace")

    is_operator = [may(Scope.WORKSPACES)]
    may_read = [may(Scope.READ)]
    live = Live(parts.draining)

    def owned(workspace_id: str, token: Annotated[Token | None, Depends(presented)]) -> Workspace:
        """Return the workspace, for its own token or an operator key."""
        owner(token, workspace_id, Scope.READ)
        return parts.workspaces.require(workspace_id)

    def shown(workspace: Workspace) -> models.WorkspaceView:
        return models.workspace_view(workspace, models.deployments_of(workspace, parts.nodes, parts.deployments))

    def deployments_now(workspace_id: str) -> models.DeploymentsView | None:
        workspace = parts.workspaces.get(workspace_id)
        return None if workspace is None else models.deployments_view(workspace, parts.nodes, parts.deployments)

    @app.get("/health", tags=["operation"])
    async def health() -> models.HealthView:
        """The process lives and answers."""
        return models.HealthView()

    @app.get("/ready", tags=["operation"], responses={503: {"model": models.ReadyView}})
    async def ready(response: Response) -> models.ReadyView:
        """The store can be used and at least one admitted node is connected."""
        peers = sum(session.admitted for session in parts.nodes)
        reason = ""
        try:
            await parts.store.check()
        except StoreError as error:
            reason = f"store_unavailable: {error}"
        if not reason and not peers:
            reason = "no_peer: no admitted node is connected"
        if reason:
            response.status_code = 503
        return models.ReadyView(ready=not reason, reason=reason, peers=peers)

    @app.get("/metrics", tags=["operation"], response_class=Response)
    async def metrics(token: Annotated[Token | None, Depends(presented)]) -> Response:
        """Prometheus metrics; from outside this machine with an operator key."""
        if not parts.open_metrics:
            check_operator(token, Scope.READ)
        return Response(exposition(parts.metrics.registry), media_type=CONTENT_TYPE)

    @app.post("/api/v1/workspaces", status_code=201, tags=["workspaces"], dependencies=is_operator, responses=_ERRORS)
    async def add_workspace(new: NewWorkspace) -> models.CreatedWorkspaceView:
        """Make a workspace. The answer holds its token, which is shown this once."""
        workspace, token = await parts.workspaces.add(new)
        return models.CreatedWorkspaceView(workspace=shown(workspace), token=reveal(token))

    @app.get("/api/v1/workspaces", tags=["workspaces"], dependencies=may_read, responses=_ERRORS)
    async def list_workspaces(
        group: Annotated[str | None, Query(max_length=64, description="only those of this group")] = None,
    ) -> models.WorkspaceListView:
        """Every workspace, or those of one group, with where each is deployed."""
        found = [one for one in parts.workspaces if group is None or one.wanted.group == group]
        return models.WorkspaceListView(workspaces=[shown(workspace) for workspace in found])

    @app.get("/api/v1/workspaces/{workspace_id}", tags=["workspaces"], responses=_ERRORS)
    async def get_workspace(workspace: Annotated[Workspace, Depends(owned)]) -> models.WorkspaceView:
        """One workspace, for its own token or an operator key."""
        return shown(workspace)

    @app.put("/api/v1/workspaces/{workspace_id}", tags=["workspaces"], dependencies=is_operator, responses=_ERRORS)
    async def update_workspace(workspace_id: str, new: NewWorkspace, repin: bool = False) -> models.WorkspaceView:
        """Change a workspace to what the body says. Where what runs changes, that is a new revision, rolled out one
        node at a time. Secrets that are named and not given again stay. `repin`: a new revision in any case."""
        return shown(await parts.workspaces.update(workspace_id, new, repin=repin))

    @app.patch("/api/v1/workspaces/{workspace_id}", tags=["workspaces"], dependencies=is_operator, responses=_ERRORS)
    async def change_workspace(workspace_id: str, changes: dict[str, Any], repin: bool = False) -> models.WorkspaceView:
        """Change the keys of the body and no others; null brings one back to its default. Else as PUT."""
        return shown(await parts.workspaces.patch(workspace_id, changes, repin=repin))

    @app.get(
        "/api/v1/workspaces/{workspace_id}/deployments",
        tags=["workspaces"],
        responses={**_ERRORS, 200: {"content": {EVENT_STREAM: {}}}},
        response_model=models.DeploymentsView,
    )
    async def get_deployments(workspace: Annotated[Workspace, Depends(owned)], request: Request) -> Any:
        """How the workspace stands on each node, for its own token or an operator key. With `Accept:
        text/event-stream` an event now and at each change."""
        if EVENT_STREAM in request.headers.get("accept", ""):
            return live.events(workspace.id, lambda: deployments_now(workspace.id))
        return models.deployments_view(workspace, parts.nodes, parts.deployments)

    @app.get(
        "/api/v1/workspaces/{workspace_id}/deployments/{node_addr}/logs",
        tags=["workspaces"],
        responses=_ERRORS,
        response_class=PlainTextResponse,
    )
    async def get_logs(
        workspace: Annotated[Workspace, Depends(owned)],
        node_addr: str,
        tail: Annotated[int, Query(ge=1, le=LOG_LINES_MAX)] = 200,
        follow: bool = False,
    ) -> Any:
        """What the workspace's container wrote on a node: the last lines, and with `follow` those to come."""
        try:
            session = parts.nodes.get(parse_address(node_addr))
        except AddressError as error:
            raise Refusal(400, "bad_node", str(error)) from None
        known = session is not None and any(state.workspace == workspace.id for state in session.reports)
        if session is None or not known:
            raise Refusal(404, "not_deployed", f"the workspace is not on a connected node {node_addr[:64]}")
        return await live.logs(workspace.id, session, tail=tail, follow=follow)

    @app.delete("/api/v1/workspaces/{workspace_id}", tags=["workspaces"], dependencies=is_operator, responses=_ERRORS)
    async def remove_workspace(workspace_id: str) -> models.WorkspaceView:
        """Remove a workspace: its tokens open nothing any more, its deployments stop. Tasks and receipts stay."""
        return shown(await parts.workspaces.remove(workspace_id))

    @app.post("/api/v1/workspaces/{workspace_id}/tokens", status_code=201, tags=["workspaces"], responses=_ERRORS)
    async def rotate_token(
        workspace_id: str, rotation: models.Rotation, token: Annotated[Token | None, Depends(presented)]
    ) -> models.NewTokenView:
        """Give a workspace a new token, shown this once; those before go on for `overlap_s` seconds and then end.

        For the workspace's own token or an operator key."""
        owner(token, workspace_id, Scope.WORKSPACES)
        made, record, ends_at_ms = await parts.workspaces.rotate_token(workspace_id, rotation.overlap_s)
        return models.NewTokenView(token=reveal(made), label=record.label, others_end_at_ms=ends_at_ms)

    @app.get("/api/v1/workspaces/{workspace_id}/brc20", tags=["workspaces"], responses=_ERRORS)
    async def get_brc20_policy(workspace_id: str, token: Annotated[Token | None, Depends(presented)]) -> Brc20Policy:
        """What a workspace asks of its callers' BTC addresses. For its own token or an operator key."""
        owner(token, workspace_id, Scope.READ)
        return parts.brc20.policy(parts.workspaces.require(workspace_id).id)

    @app.put("/api/v1/workspaces/{workspace_id}/brc20", tags=["workspaces"], responses=_ERRORS)
    async def set_brc20_policy(
        workspace_id: str, policy: Brc20Policy, token: Annotated[Token | None, Depends(presented)]
    ) -> Brc20Policy:
        """Say what a workspace asks of its callers' BTC addresses. For its own token or an operator key."""
        owner(token, workspace_id, Scope.WORKSPACES)
        await parts.brc20.set_policy(parts.workspaces.require(workspace_id).id, policy)
        return policy

    @app.get("/api/v1/workspaces/{workspace_id}/rechecks", tags=["workspaces"], responses=_ERRORS)
    async def get_rechecks(workspace_id: str, token: Annotated[Token | None, Depends(presented)]) -> RechecksView:
        """Which of its tasks were run again on other nodes, and what came of it. Its own token or an operator key."""
        owner(token, workspace_id, Scope.READ)
        workspace = parts.workspaces.require(workspace_id)

        def read(connection: sa.Connection) -> tuple[dict[str, int], list[RecheckRow]]:
            counts = recheck_rows.counts(connection, workspace_id)
            return counts, recheck_rows.of_workspace(connection, workspace_id, RECHECKS_SHOWN)

        counts, rows = await parts.store.look_over(read)
        return RechecksView(
            deterministic=workspace.spec.deterministic, counts=counts, rechecks=[recheck_view(row) for row in rows]
        )

    @app.get("/api/v1/tasks/{task_id}", tags=["tasks"], responses=_ERRORS)
    async def get_task(task_id: str, token: Annotated[Token | None, Depends(presented)]) -> models.TaskView:
        """A task with its attempts, receipts and verdicts."""
        await parts.find_task(task_id, None if is_operators_own else token)
        detail = await parts.store.detail(task_id)
        position = None if detail.task.state.is_final else parts.nodes.place_of(detail.task.workspace, task_id)
        return models.task_view(detail, parts.waits_for(detail.task), position)

    add_task_calls(
        app,
        control=parts.task_control,
        store=parts.store,
        workspaces=parts.workspaces,
        find_task=parts.find_task,
        presented=presented,
        owner=owner,
        live=live,
        stand_ins=parts.stand_ins,
        is_operators_own=is_operators_own,
        errors=_ERRORS,
    )

    @app.get("/api/v1/tasks/{task_id}/placement", tags=["tasks"], responses=_ERRORS)
    async def get_placement(
        task_id: str, token: Annotated[Token | None, Depends(presented)]
    ) -> placements.PlacementsView:
        """Why each attempt of a task went where it did: every candidate, why not, and what it was thought to take.

        Candidates that were not compared are shown as of about a second around the choice. The last 4,096 attempts of
        this run of the bootstrap are kept whole; those of asynchronous tasks, those after a first one, and a sample of
        the rest (about 30 a second) are in the database too, 100,000 in all.
        """
        record = await parts.find_task(task_id, None if is_operators_own else token)
        kept = await parts.placements.of(task_id, record.attempts)
        if not kept and record.attempts:
            raise Refusal(404, "placement_gone", f"how task {task_id} was placed is no longer known: ask sooner")
        return placements.placements_view(task_id, parts.nodes.place_of(record.workspace, task_id), kept)

    node_parts = NodeParts(parts.nodes, parts.workspaces, parts.standings, parts.store, parts.challenges, parts.now_ms)
    add_node_calls(app, node_parts)
    add_challenge_calls(app, parts.challenges, may_start=[may(Scope.NODES)], may_read=[may(Scope.READ)], errors=_ERRORS)

    if is_operators_own:

        @app.get("/status", tags=["operation"])
        async def status() -> dict[str, Any]:
            """Where this bootstrap listens and what it is at."""
            return parts.status()

        @app.post("/statements/signature", tags=["operation"], responses=_ERRORS)
        async def sign_statement(document: dict[str, Any]) -> dict[str, str]:
            """Sign a statement that the operator's own command drew up from this bootstrap's store."""
            try:
                statement, _ = STATEMENT_TYPE.from_json(document)
                return {"signature": "0x" + parts.sign_statement(statement).hex()}
            except (MalformedError, ValueError) as error:
                raise Refusal(400, "bad_statement", str(error)) from None

        @app.post("/bills/signature", tags=["operation"], responses=_ERRORS)
        async def sign_bill(document: dict[str, Any]) -> dict[str, str]:
            """Sign the bill of a statement that the operator's own command drew up from this bootstrap's store."""
            try:
                bill, _ = BILL_TYPE.from_json(document)
                return {"signature": "0x" + parts.sign_bill(bill).hex()}
            except (MalformedError, ValueError) as error:
                raise Refusal(400, "bad_bill", str(error)) from None

    own_document = app.openapi

    def whole_document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = complete(own_document(), models.ErrorView.model_json_schema(), profiles)
        return app.openapi_schema

    app.openapi = whole_document  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def documentation() -> HTMLResponse:
        return HTMLResponse(page.render(app.openapi()))

    @app.get("/", include_in_schema=False)
    async def root() -> HTMLResponse:
        return HTMLResponse(page.render(app.openapi()))

    return app


def _answer_errors(app: FastAPI, parts: Parts) -> None:
    """Give every error the shape of this API."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        host = request.client.host if request.client is not None else ""
        refusal = parts.answer_failed_try(host, request.headers.raw, refusal)
        return _error(refusal.status, refusal.reason, refusal.message, refusal.headers)

    @app.exception_handler(UnknownTask)
    async def unknown_task(request: Request, error: UnknownTask) -> JSONResponse:
        return _error(404, "task_unknown", f"there is no task {error.task_id}")

    @app.exception_handler(StoreError)
    async def store_failed(request: Request, error: StoreError) -> JSONResponse:
        refusal = NotServed(503, "store_unavailable", "the store cannot be used now; come again", retry_after_s=5)
        return _error(refusal.status, refusal.reason, refusal.message, refusal.headers)

    @app.exception_handler(OperatorKeysError)
    async def keys_damaged(request: Request, error: OperatorKeysError) -> JSONResponse:
        log.error("operator_keys_unusable", reason=str(error))
        return _error(503, "keys_unavailable", "operator keys cannot be checked now; the operator's log says why")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = error.errors()
        if any(problem["type"] == "json_invalid" for problem in problems):
            return _error(400, "malformed_json", "the body is not valid JSON; send a JSON object")
        # Where and what, never the value: it may be a secret.
        texts = [
            f"{'.'.join(str(part)[:64] for part in problem['loc'] if part != 'body') or 'body'}: "
            f"{problem['msg'].removeprefix('Value error, ')}"
            for problem in problems[:5]
        ]
        return _error(422, "invalid", "; ".join(texts))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        if error.status_code == 404:
            return _error(404, "not_found", "nothing is served at this path; /docs lists what is", headers)
        if error.status_code == 405:
            return _error(
                405, "method_not_allowed", f"this path takes {headers.get('Allow', 'other methods')}", headers
            )
        return _error(error.status_code, "refused", str(error.detail), headers)


def _error(status: int, reason: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"reason": reason, "message": message}, status, headers)
