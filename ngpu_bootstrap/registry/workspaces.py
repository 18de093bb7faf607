"""The workspaces of clients: kept in the store, held in memory whole, looked up on every call.

Owns making, finding, changing and removing workspaces and the check of a token against them. What a specification may
say is `ngpu_protocol.workspaces`; where a workspace runs is `deployments`. The store is written first and the memory
after it, so that what a caller was told survives a crash.

A change of what runs is a new revision. Until it is everywhere (`rollout`), clients are served by the one before,
`Workspace.spec`; the new one is `Workspace.target`. One that failed stays on record as the target until the next.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import structlog
import trio
from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.json_schema import SkipJsonSchema

from ngpu_bootstrap.credentials import SECRET_BYTES, Token, make_token, opens, stored_hash
from ngpu_bootstrap.errors import Forbidden, Refusal, Unauthorized
from ngpu_bootstrap.registry.confided import Confided, complete
from ngpu_bootstrap.registry.rollout import Failure
from ngpu_bootstrap.store.errors import UnknownWorkspace, WorkspaceConflict
from ngpu_bootstrap.store.records import RolloutRow, WorkspaceRow, WorkspaceToken
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.image_references import parse_image_reference
from ngpu_protocol.workspace_secrets import NO_SECRETS, WorkspaceSecrets, with_query
from ngpu_protocol.workspaces import WorkspaceSpec, describe_errors

log = structlog.get_logger(__name__)

# Ids have 18 digits, as the documents' have: enough that two bootstraps do not meet, and exact in 64 bits.
_ID_LOW, _ID_HIGH = 10**17, 10**18
#: How long a shared workspace whose ids were all used stays removed at least.
REVIVE_AFTER_MS = 3600 * 1000

_NOBODY = bytes(32)
_GIVEN = ("id", "revision", "image_digest")


class NewWorkspace(WorkspaceSpec):
    """A workspace to be made or changed: a specification without what the bootstrap gives it, and its secrets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: SkipJsonSchema[str] = "1"
    revision: SkipJsonSchema[int] = 1
    image_digest: SkipJsonSchema[str | None] = None
    owner: Annotated[str, Field(max_length=128)] = Field(default="", description="who it belongs to, for the operator")
    secrets: WorkspaceSecrets = Field(
        default=NO_SECRETS,
        repr=False,
        description="registry credentials and secret environment variables; never shown again",
    )

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, document: Any) -> Any:
        """Refuse what the bootstrap gives, and name in the specification the secrets that come with it."""
        if not isinstance(document, dict):
            return document
        for key in _GIVEN:
            if key in document:
                raise ValueError(f"{key} is given by the bootstrap; leave it out")
        confided = document.get("secrets")
        if isinstance(confided, WorkspaceSecrets):
            confided = confided.model_dump()
        url = document.get("image_url")
        if isinstance(url, str) and "?" in url:
            # the query often is a signature that opens the file: a secret like a password
            address, _, query = url.partition("?")
            confided = {**(confided if isinstance(confided, dict) else {}), "image_query": query}
            document = {**document, "image_url": address, "secrets": confided}
        if not isinstance(confided, dict):
            return document
        document = dict(document)
        env, named = confided.get("env"), document.get("secret_env", [])
        if isinstance(env, dict) and isinstance(named, list):
            document["secret_env"] = [*named, *(name for name in env if name not in named)]
        if confided.get("registry") is not None:
            document["has_registry_credentials"] = True
        if confided.get("image_query"):
            document["has_image_query"] = True
        return document

    def fields(self) -> dict[str, Any]:
        """Return the fields of the specification that it makes."""
        return self.model_dump(exclude={*_GIVEN, "owner", "secrets"})

    def document(self) -> dict[str, Any]:
        """Return the JSON object that it was read from, secrets included."""
        return self.model_dump(mode="json", exclude=set(_GIVEN))


def workspace_schema() -> dict[str, Any]:
    """Return the JSON schema of a workspace as files, commands and the API take it."""
    schema = NewWorkspace.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "NGPU workspace"}


@dataclass(frozen=True, slots=True)
class Workspace:
    """A workspace as this bootstrap knows it. Its tokens are known by their hashes alone.

    Attributes:
        spec: the revision that clients are served by.
        target: the revision on its way to the nodes, or the last one that failed; None when there is neither.
        rollout: how that stands.
    """

    spec: WorkspaceSpec
    owner: str
    tokens: tuple[WorkspaceToken, ...]
    created_at_ms: int
    target: WorkspaceSpec | None = None
    rollout: RolloutRow | None = None

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def is_rolling(self) -> bool:
        return self.rollout is not None and self.rollout.failed_at_ms is None

    @property
    def wanted(self) -> WorkspaceSpec:
        """The specification nodes are to end up with."""
        return self.target if self.target is not None and self.is_rolling else self.spec

    @property
    def newest(self) -> int:
        """The highest revision there has been."""
        return max(self.spec.revision, self.target.revision if self.target is not None else 0)

    def of_revision(self, revision: int) -> WorkspaceSpec:
        """Return the specification of a revision a node was told; the serving one's where that is none of ours."""
        return self.target if self.target is not None and self.target.revision == revision else self.spec

    def has_ended(self, now_ms: int) -> bool:
        return self.spec.end_at is not None and now_ms >= self.spec.end_at


class Workspaces:
    """Every workspace that is not removed.

    Args:
        confided: keeps their secrets.
        on_change: called after each change, for whoever distributes workspaces.
    """

    def __init__(
        self, store: Store, *, confided: Confided, now_ms: Callable[[], int], on_change: Callable[[], None]
    ) -> None:
        self._store = store
        self._confided = confided
        self._now_ms = now_ms
        self._on_change = on_change
        self._by_id: dict[str, Workspace] = {}
        # in the store, and not to be understood by this version: nothing is decided about them here
        self.strange: frozenset[str] = frozenset()
        # one change at a time: each reads the memory, writes the store, and then the memory
        self._changing = trio.Lock()

    def __iter__(self) -> Iterator[Workspace]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    async def load(self) -> None:
        """Read every workspace from the store."""
        async with self._changing:
            await self._load()

    async def _load(self) -> None:
        rollouts = {row.workspace: row for row in await self._store.rollouts()}
        by_id: dict[str, Workspace] = {}
        strange: set[str] = set()
        for row in await self._store.list_workspaces():
            try:
                by_id[row.id] = await self._read(row, rollouts.get(row.id))
            except MalformedError as error:  # as a sibling of a later version wrote it
                log.error("workspace_not_understood", workspace=row.id, reason=str(error))
                strange.add(row.id)
                if row.id in self._by_id:
                    by_id[row.id] = self._by_id[row.id]
        self._by_id, self.strange = by_id, frozenset(strange)
        self._on_change()

    async def _read(self, row: WorkspaceRow, rollout: RolloutRow | None) -> Workspace:
        workspace = Workspace(_spec(row.id, row.revision, row.spec), row.owner, row.tokens, row.created_at_ms)
        if rollout is None or rollout.target != row.revision:
            return workspace
        base = await self._store.workspace_spec(row.id, rollout.base)
        if base is None:
            return workspace
        return replace(workspace, spec=_spec(row.id, rollout.base, base), target=workspace.spec, rollout=rollout)

    def get(self, workspace_id: str) -> Workspace | None:
        """Return the workspace, or None when there is none of this id."""
        return self._by_id.get(workspace_id)

    def require(self, workspace_id: str) -> Workspace:
        """Return the workspace.

        Raises:
            Refusal: 404.
        """
        workspace = self._by_id.get(workspace_id)
        if workspace is None:
            raise Refusal(404, "workspace_unknown", f"there is no workspace {workspace_id}")
        return workspace

    def authenticate(self, token: Token | None) -> tuple[Workspace, WorkspaceToken]:
        """Return the workspace that *token* opens, and which of its tokens it is.

        Raises:
            Unauthorized: no token, or one that opens nothing.
            Forbidden: an operator key, which manages workspaces and calls none.
        """
        if token is None:
            raise Unauthorized(
                "token_missing", "this call needs a workspace token: send `Authorization: Bearer <token>`"
            )
        if token.is_operator_key:
            raise Forbidden("operator_key", "an operator key manages workspaces; calls need a workspace token")
        workspace = self._by_id.get(token.subject)
        if workspace is None:
            opens(token, _NOBODY)  # takes as long as a wrong secret
        else:
            for known in workspace.tokens:
                if opens(token, known.hash) and (known.expires_at_ms is None or self._now_ms() < known.expires_at_ms):
                    if workspace.has_ended(self._now_ms()):
                        raise Refusal(410, "workspace_ended", f"workspace {workspace.id} has reached its end_at")
                    return workspace, known
        raise Unauthorized("token_unknown", "this workspace token is not known here; it may have been removed")

    async def add(self, new: NewWorkspace) -> tuple[Workspace, Token]:
        """Make a workspace and return it with its token, which is shown this once.

        Raises:
            Refusal: its secrets are incomplete, or cannot be kept.
        """
        async with self._changing:
            return await self._add(new)

    async def _add(self, new: NewWorkspace) -> tuple[Workspace, Token]:
        while True:
            workspace_id = str(_ID_LOW + secrets.randbelow(_ID_HIGH - _ID_LOW))
            spec = _named_pin(WorkspaceSpec(id=workspace_id, **new.fields()))
            sealed = await self._confided.at_rest(complete(new.secrets, NO_SECRETS, spec), workspace_id, spec.revision)
            token = make_token(workspace_id, secrets.token_bytes(SECRET_BYTES))
            now_ms = self._now_ms()
            row = WorkspaceRow(
                id=workspace_id,
                name=spec.name,
                revision=spec.revision,
                spec=spec.to_wire(),
                tokens=(WorkspaceToken(f"{workspace_id}.1", stored_hash(token), now_ms),),
                created_at_ms=now_ms,
                owner=new.owner,
                updated_at_ms=now_ms,
            )
            try:
                await self._store.add_workspace(row, sealed=sealed)
            except WorkspaceConflict:  # the id is taken: one in 10**18 for each workspace there is
                continue
            workspace = Workspace(spec, row.owner, row.tokens, row.created_at_ms)
            self._keep(workspace)
            return workspace, token

    async def add_shared(self, new: NewWorkspace, ids: Sequence[str]) -> Workspace | None:
        """Make a workspace without a token under the first of *ids* that never was one; return it.

        Where all of them were, the last one comes back, `REVIVE_AFTER_MS` after its removal; None before that.
        Another bootstrap of this database may make the same at the same time: then it is theirs that is returned.
        """
        async with self._changing:
            for workspace_id in ids:
                if (known := self._by_id.get(workspace_id)) is not None:
                    return known
                spec = WorkspaceSpec(id=workspace_id, **new.fields())
                now_ms = self._now_ms()
                row = WorkspaceRow(workspace_id, spec.name, spec.revision, spec.to_wire(), (), now_ms, "", now_ms)
                with contextlib.suppress(WorkspaceConflict):
                    await self._store.add_workspace(row)
                    workspace = Workspace(spec, "", (), now_ms)
                    self._keep(workspace)
                    return workspace
                # it was made before: by a sibling, and lives, or it was removed
                await self._load()
                if (known := self._by_id.get(workspace_id)) is not None:
                    return known
                if workspace_id in self.strange:
                    return None
            now_ms = self._now_ms()
            # unknown: it rests; conflict: a sibling was faster
            with contextlib.suppress(UnknownWorkspace, WorkspaceConflict):
                await self._store.revive_workspace(ids[-1], before_ms=now_ms - REVIVE_AFTER_MS, at_ms=now_ms)
            await self._load()
            return self._by_id.get(ids[-1])

    async def rotate_token(self, workspace_id: str, overlap_s: float) -> tuple[Token, WorkspaceToken, int]:
        """Give the workspace a new token; return it, its record, and when the tokens before end (UTC milliseconds).

        Those that end sooner anyway stay as they are.

        Raises:
            Refusal: 404; 409 when another rotation was faster.
        """
        async with self._changing:
            workspace = self.require(workspace_id)
            now_ms = self._now_ms()
            ends_at_ms = now_ms + int(overlap_s * 1000)
            token = make_token(workspace_id, secrets.token_bytes(SECRET_BYTES))
            number = 1 + max((_label_number(known.label) for known in workspace.tokens), default=0)
            record = WorkspaceToken(f"{workspace_id}.{number}", stored_hash(token), now_ms)
            shortened = [
                known.label
                for known in workspace.tokens
                if known.expires_at_ms is None or known.expires_at_ms > ends_at_ms
            ]
            try:
                await self._store.replace_token(workspace_id, record, expire=shortened, at_ms=ends_at_ms)
            except WorkspaceConflict:
                raise Refusal(
                    409, "token_conflict", "the token was rotated by somebody else at this moment; look, and try again"
                ) from None
            except UnknownWorkspace:
                raise Refusal(404, "workspace_unknown", f"there is no workspace {workspace_id}") from None
            tokens = tuple(
                replace(known, expires_at_ms=ends_at_ms) if known.label in shortened else known
                for known in workspace.tokens
            )
            # the newest first: it is looked at first
            self._by_id[workspace_id] = replace(self._by_id.get(workspace_id, workspace), tokens=(record, *tokens))
            return token, record, ends_at_ms

    async def update(self, workspace_id: str, new: NewWorkspace, *, repin: bool = False) -> Workspace:
        """Change a workspace: within its revision where what runs stays as it is, else by a new one.

        Args:
            repin: make a new revision in any case, so that its image is resolved anew.

        Raises:
            Refusal: 404; 409 when it was changed by another at the same time; 422 when a secret is missing.
        """
        async with self._changing:
            return await self._update(workspace_id, new, repin=repin)

    async def _update(self, workspace_id: str, new: NewWorkspace, *, repin: bool) -> Workspace:
        workspace = self.require(workspace_id)
        before = workspace.wanted
        spec = WorkspaceSpec(
            **new.fields(), id=workspace_id, revision=before.revision, image_digest=before.image_digest
        )
        try:
            kept = await self._confided.read(workspace_id, before.revision) if before.has_secrets else NO_SECRETS
        except MalformedError as error:
            if not new.secrets.is_empty or not spec.has_secrets:
                kept = NO_SECRETS  # what cannot be read is replaced
            else:
                raise Refusal(409, "secrets_unreadable", f"{error}; give the secrets again") from None
        confided = complete(new.secrets, kept, spec)
        if spec.runs_like(before) and confided == kept and not repin:
            return await self._amend(workspace, spec)
        revision = workspace.newest + 1
        spec = _named_pin(WorkspaceSpec(**new.fields(), id=workspace_id, revision=revision))
        sealed = await self._confided.at_rest(confided, workspace_id, revision)
        rollout = None
        if spec.is_image:
            rollout = RolloutRow(workspace_id, workspace.spec.revision, revision, self._now_ms())
        try:
            await self._store.revise_workspace(
                workspace_id,
                revision,
                name=spec.name,
                spec=spec.to_wire(),
                at_ms=self._now_ms(),
                sealed=sealed,
                rollout=rollout,
            )
        except UnknownWorkspace:
            raise Refusal(404, "workspace_unknown", f"there is no workspace {workspace_id}") from None
        except WorkspaceConflict:
            raise Refusal(409, "changed_meanwhile", "the workspace was changed meanwhile; read it again") from None
        if rollout is None:
            changed = replace(workspace, spec=spec, target=None, rollout=None)
        else:
            changed = replace(workspace, target=spec, rollout=rollout)
        self._keep(changed)
        return changed

    async def patch(self, workspace_id: str, changes: dict[str, Any], *, repin: bool = False) -> Workspace:
        """As `update`, with only the keys that change; null brings a key back to its default.

        Raises:
            Refusal: as `update`, and 422 naming each key that is wrong.
        """
        async with self._changing:
            wanted = self.require(workspace_id).wanted
            document = wanted.model_dump(mode="json", exclude=set(_GIVEN), exclude_defaults=True) | changes
            # the one that was given takes the place of the one before
            sources = {"image", "image_url", "service"}
            if given := {key for key in sources & changes.keys() if changes[key] is not None}:
                document = {key: value for key, value in document.items() if key not in sources - given}
                # a login may be the next image's too; the sum and the query of a file are that file's alone
                gone = {"image_sha256", "has_image_query", "has_registry_credentials"} - changes.keys()
                for key in gone if "image" not in given else gone - {"has_registry_credentials"}:
                    document.pop(key, None)
            try:
                new = NewWorkspace.model_validate({key: value for key, value in document.items() if value is not None})
            except ValidationError as error:
                raise Refusal(422, "invalid", describe_errors(error)) from None
            return await self._update(workspace_id, new, repin=repin)

    async def url_of(self, spec: WorkspaceSpec) -> str:
        """Return the URL of *spec*'s image with its query, which must not be shown.

        Raises:
            Refusal: 409, the query was sealed to a key that was replaced.
        """
        url = spec.image_url or ""
        if not spec.has_image_query:
            return url
        try:
            confided = await self._confided.read(spec.id, spec.revision)
        except MalformedError as error:
            raise Refusal(409, "secrets_unreadable", f"{error}; give image_url again") from None
        return with_query(url, confided)

    async def pin(self, workspace_id: str, revision: int, *, digest: str | None = None, sha256: str = "") -> None:
        """Fill in what a revision's image turned out to be: its digest, or the SHA-256 of its file."""
        async with self._changing:
            workspace = self._by_id.get(workspace_id)
            if workspace is None or workspace.of_revision(revision).revision != revision:
                return
            changes = ({"image_digest": digest} if digest else {}) | ({"image_sha256": sha256} if sha256 else {})
            await self._amend(workspace, workspace.of_revision(revision).model_copy(update=changes))

    async def rolled_out(self, workspace: Workspace) -> None:
        """Have clients served by the new revision from now on: it is everywhere."""
        async with self._changing:
            if workspace.rollout is None or workspace.target is None or self.get(workspace.id) != workspace:
                return
            await self._store.end_rollout(workspace.rollout)
            self._keep(replace(workspace, spec=workspace.target, target=None, rollout=None))

    async def roll_failed(self, workspace: Workspace, failure: Failure) -> None:
        """Keep clients served by the revision before: the new one failed on a node."""
        async with self._changing:
            if workspace.rollout is None or self.get(workspace.id) != workspace:
                return
            rollout = replace(
                workspace.rollout,
                failed_at_ms=self._now_ms(),
                node=failure.node,
                reason=failure.reason,
                detail=failure.detail,
            )
            await self._store.end_rollout(rollout)
            self._keep(replace(workspace, rollout=rollout))

    async def remove(self, workspace_id: str) -> Workspace:
        """Remove the workspace: its token opens nothing any more and its deployments stop. Its tasks stay on record.

        Raises:
            Refusal: 404.
        """
        async with self._changing:
            workspace = self.require(workspace_id)
            with contextlib.suppress(UnknownWorkspace):  # removed by another process on the same database
                await self._store.remove_workspace(workspace_id, self._now_ms())
            self._by_id.pop(workspace_id, None)
            self._on_change()
            return workspace

    async def _amend(self, workspace: Workspace, spec: WorkspaceSpec) -> Workspace:
        try:
            await self._store.amend_workspace(
                workspace.id, spec.revision, name=spec.name, spec=spec.to_wire(), at_ms=self._now_ms()
            )
        except UnknownWorkspace:
            raise Refusal(404, "workspace_unknown", f"there is no workspace {workspace.id}") from None
        is_target = workspace.target is not None and workspace.target.revision == spec.revision
        changed = replace(workspace, target=spec) if is_target else replace(workspace, spec=spec)
        self._keep(changed)
        return changed

    def _keep(self, workspace: Workspace) -> None:
        self._by_id[workspace.id] = workspace
        self._on_change()


def _label_number(label: str) -> int:
    number = label.rpartition(".")[2]
    return int(number) if number.isascii() and number.isdigit() else 0


def _named_pin(spec: WorkspaceSpec) -> WorkspaceSpec:
    """Return *spec* with its image pinned where the reference names a digest."""
    digest = parse_image_reference(spec.image).digest if spec.image is not None else None
    return spec.model_copy(update={"image_digest": digest}) if digest else spec


def _spec(workspace_id: str, revision: int, document: Any) -> WorkspaceSpec:
    return WorkspaceSpec.from_wire({**document, "id": workspace_id, "revision": revision})
