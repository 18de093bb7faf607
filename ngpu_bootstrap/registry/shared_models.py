"""Models by name: which workspace answers for one, and the workspaces that are everybody's.

A model is served by a workspace that names it: one on a registered model server (`service`), or an image that lists
it (`models`). Who may use which is decided here, in this order: the caller's own workspace, the workspaces of the
same owner, and the shared ones.

A shared workspace is made for each `project/model` that an admitted node registered, the first time it is seen. It has
no token, so nobody but callers of models reaches it, and its id follows from its name: whichever bootstrap of a
database sees the model first makes it, and the others find it. What nodes say is bounded: at most `limit` shared
workspaces, of which those that no node has offered for `UNUSED_S` make room for new ones, and a node brings as many as
it leaves places (`fair_share`), so that none can fill the list, or the database, with names. One that was removed
gets the next of its ids, and when all are used the last one again, an hour after its removal: removed workspaces stay
on record.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import structlog
import trio

from ngpu_bootstrap.errors import BadRequest, Refusal
from ngpu_bootstrap.fair_share import may_take
from ngpu_bootstrap.registry.nodes import Nodes
from ngpu_bootstrap.registry.workspaces import NewWorkspace, Workspace, Workspaces
from ngpu_bootstrap.store.errors import StoreError
from ngpu_protocol.control import DeploymentPhase
from ngpu_protocol.workspaces import WorkspaceSpec

log = structlog.get_logger(__name__)

SETTLE_S = 0.05
UNUSED_S = 3600.0
LOOK_AGAIN_S = 60.0
#: A model that was removed as often as there are ids for it rests (`workspaces.REVIVE_AFTER_MS`); it is tried again.
TRY_AGAIN_S = 600.0
_ID_LOW, _ID_HIGH = 10**17, 10**18
_TRIES = 8


@functools.lru_cache(16_384)
def shared_id(service: str, generation: int = 0) -> str:
    """Return the id of the shared workspace of *service*; another *generation* where that was removed."""
    digest = hashlib.sha256(f"ngpu shared model\0{generation}\0{service}".encode()).digest()
    return str(_ID_LOW + int.from_bytes(digest[:16], "big") % (_ID_HIGH - _ID_LOW))


def is_shared(workspace: Workspace) -> bool:
    """Return whether any token may call *workspace* as a model."""
    service = workspace.spec.service
    return (
        service is not None
        and not workspace.tokens
        and any(workspace.id == shared_id(service, generation) for generation in range(_TRIES))
    )


@dataclass(frozen=True, slots=True)
class Model:
    """A model that some workspace answers for.

    Attributes:
        kind: of the registered server: `text-to-text`, `text-to-image`, `image-edit`; empty where nobody says.
        since_ms: when the workspace was made.
    """

    name: str
    project: str
    workspace: Workspace
    kind: str
    since_ms: int


class Models:
    """Finds models, and keeps the shared workspaces.

    Args:
        share: whether registered models are everybody's.
        projects: whose; empty for all.
        limit: shared workspaces at most.
        concurrency: tasks at once of one shared model on one node.
        timeout_s: of one call of a shared model.
    """

    def __init__(
        self,
        workspaces: Workspaces,
        nodes: Nodes,
        *,
        share: bool,
        projects: Collection[str],
        limit: int,
        concurrency: int,
        timeout_s: float,
    ) -> None:
        self._workspaces = workspaces
        self._nodes = nodes
        self._share = share
        self._projects = frozenset(projects)
        self._limit = limit
        self._concurrency = concurrency
        self._timeout_s = timeout_s
        self._index: dict[str, list[tuple[str, Workspace]]] = {}
        self._shared: frozenset[str] = frozenset()
        self._unfit: set[str] = set()  # of what is offered now: names that no workspace can have
        self._rests_until_s: dict[str, float] = {}  # of what is offered now: models that were removed too often
        self._offered_at_s: dict[str, float] = {}  # shared models, and when a node was last seen to offer them
        self._without_room = 0
        self._noticed = trio.Event()

    # -- finding

    def refresh(self) -> None:
        """Take over what workspaces there are."""
        index: dict[str, list[tuple[str, Workspace]]] = {}
        shared: set[str] = set()
        for workspace in self._workspaces:
            if is_shared(workspace):
                if not self._share or not self._allows(workspace.spec.service or ""):
                    continue
                shared.add(workspace.id)
            for project, name in models_of(workspace.spec):
                index.setdefault(name, []).append((project, workspace))
        self._index, self._shared = index, frozenset(shared)

    def find(self, caller: Workspace, model: str, project: str | None) -> Workspace:
        """Return the workspace that answers for *model* when *caller* asks.

        Raises:
            Refusal: 404 when there is none; 400 when the caller must say which project's.
        """
        found = self._usable(caller, model, project)
        if not found and project is None and "/" in model:  # `project/model`, as some clients list them
            project, _, name = model.partition("/")
            found = self._usable(caller, name, project)
        if not found:
            of = f" of project {project[:128]!r}" if project else ""
            raise Refusal(
                404,
                "model_unknown",
                f"no model {model[:128]!r}{of} is served here; GET /v1/models lists those that are",
            )
        for rank in range(3):
            best = [(of, workspace) for of, workspace in found if self._rank(caller, workspace) == rank]
            if not best:
                continue
            projects = sorted({of for of, _ in best})
            if len(projects) > 1:
                raise BadRequest(
                    "model_ambiguous",
                    f"several projects serve {model[:128]!r}; name one in `project`: {', '.join(projects[:10])}",
                )
            return min((workspace for _, workspace in best), key=lambda one: (not self._is_ready(one), one.id))
        raise AssertionError("a usable workspace has a rank")

    def listed(self, caller: Workspace, project: str | None = None) -> list[Model]:
        """Return the models that *caller* may call and some node serves now, by project and name."""
        ready, kinds = self._served()
        found: dict[tuple[str, str], Model] = {}
        for name, entries in self._index.items():
            for of, workspace in entries:
                if (project is not None and of != project) or self._rank(caller, workspace) is None:
                    continue
                if workspace.id not in ready:
                    continue
                model = Model(name, of, workspace, kinds.get((of, name), ""), workspace.created_at_ms)
                found.setdefault((of, name), model)
        return [found[key] for key in sorted(found)]

    def _usable(self, caller: Workspace, model: str, project: str | None) -> list[tuple[str, Workspace]]:
        return [
            (of, workspace)
            for of, workspace in self._index.get(model, ())
            if (project is None or of == project) and self._rank(caller, workspace) is not None
        ]

    def _rank(self, caller: Workspace, workspace: Workspace) -> int | None:
        if workspace.id == caller.id:
            return 0
        if caller.owner and workspace.owner == caller.owner and workspace.tokens:
            return 1
        return 2 if workspace.id in self._shared else None

    def _is_ready(self, workspace: Workspace) -> bool:
        return any(
            (state := session.deployments.get(workspace.id)) is not None
            and state.state == DeploymentPhase.READY
            and session.admitted
            for session in self._nodes
        )

    def _served(self) -> tuple[set[str], dict[tuple[str, str], str]]:
        """Return the workspaces that some node serves now, and what each model offered is for."""
        ready: set[str] = set()
        kinds: dict[tuple[str, str], str] = {}
        for session in self._nodes:
            if session.admitted:
                for workspace, state in session.deployments.items():
                    if state.state == DeploymentPhase.READY:
                        ready.add(workspace)
                for offer in session.services:
                    kinds.setdefault((offer.project, offer.model), offer.type)
        return ready, kinds

    # -- sharing

    async def run(self) -> None:
        """Make a shared workspace for what nodes newly offer; for ever."""
        while True:
            with trio.move_on_after(LOOK_AGAIN_S if self._without_room or self._rests_until_s else math.inf):
                await self._noticed.wait()
            self._noticed = trio.Event()
            if not self._share:
                continue
            await trio.sleep(SETTLE_S)  # a node registers several at once
            try:
                await self.look(trio.current_time())
            except StoreError as error:
                log.error("shared_models_not_stored", reason=str(error))
                await trio.sleep(1.0)
                self._noticed.set()

    def notice(self) -> None:
        """Have what nodes offer looked at again."""
        self._noticed.set()

    async def look(self, now_s: float) -> None:
        """Make what is offered and not shared yet, as far as there is room."""
        by_node = self._offered()
        offered = set().union(*by_node)
        shared = {one.spec.service or "": one for one in self._workspaces if is_shared(one)}
        self._unfit &= offered
        self._rests_until_s = {
            one: until_s for one, until_s in self._rests_until_s.items() if one in offered and until_s > now_s
        }
        self._offered_at_s = {
            service: now_s if service in offered else self._offered_at_s.get(service, now_s) for service in shared
        }
        without_room = 0
        for service in sorted(offered - shared.keys() - self._unfit - self._rests_until_s.keys()):
            own = min(len(names & shared.keys()) for names in by_node if service in names)
            while not (has_room := may_take(self._limit, len(shared), own)):
                if not await self._make_room(shared, now_s):
                    break
            if not has_room:
                without_room += 1
                continue
            made = await self._add(service, now_s)
            if made is not None:
                shared[service] = made
                self._offered_at_s[service] = now_s
        if without_room > self._without_room:
            log.warning("too_many_models", limit=self._limit, shared=len(shared), without_room=without_room)
        self._without_room = without_room

    def _offered(self) -> list[frozenset[str]]:
        """Return what each admitted node offers, of what may be shared."""
        return [
            frozenset(
                service
                for offer in session.services
                if offer.copies > 0 and self._allows(service := f"{offer.project}/{offer.model}")
            )
            for session in self._nodes
            if session.admitted
        ]

    def _allows(self, service: str) -> bool:
        return not self._projects or service.partition("/")[0] in self._projects

    async def _make_room(self, shared: dict[str, Workspace], now_s: float) -> bool:
        """Remove the model that nobody has offered for longest, if that is long; return whether there was one."""
        service = min(shared, key=lambda one: self._offered_at_s.get(one, now_s), default=None)
        if service is None or now_s - self._offered_at_s.get(service, now_s) < UNUSED_S:
            return False
        await self._workspaces.remove(shared.pop(service).id)
        log.info("model_not_shared_any_more", service=service)
        return True

    async def _add(self, service: str, now_s: float) -> Workspace | None:
        try:
            new = NewWorkspace(
                name=service[:128],
                service=service,
                ports=[80],
                concurrency=self._concurrency,
                request_timeout_s=self._timeout_s,
            )
        except ValueError:  # a name that no workspace can have: with spaces
            self._unfit.add(service)
            log.warning("model_cannot_be_shared", service=service[:256])
            return None
        workspace = await self._workspaces.add_shared(
            new, [shared_id(service, generation) for generation in range(_TRIES)]
        )
        if workspace is None:
            self._rests_until_s[service] = now_s + TRY_AGAIN_S
            log.warning("model_removed_too_often", service=service, try_again_s=TRY_AGAIN_S)
            return None
        log.info("model_shared", service=service, workspace=workspace.id)
        return workspace


def models_of(spec: WorkspaceSpec) -> Iterator[tuple[str, str]]:
    """Return project and name of each model that a workspace answers for."""
    if spec.service is not None:
        project, _, name = spec.service.partition("/")
        yield project, name
    for model in spec.models:
        yield model.project, model.name
