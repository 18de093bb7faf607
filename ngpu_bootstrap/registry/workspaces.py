"""The workspaces of clients: kept in the store, held in memory whole, looked up on every call.

Owns making, finding and removing workspaces and the check of a token against them. What a specification may say is
`ngpu_protocol.workspaces`; where a workspace runs is `assignment`. The store is written first and the memory after
it, so that what a caller was told survives a crash.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from ngpu_bootstrap.credentials import SECRET_BYTES, Token, make_token, opens, stored_hash
from ngpu_bootstrap.errors import Forbidden, Refusal, Unauthorized
from ngpu_bootstrap.store.errors import UnknownWorkspace, WorkspaceConflict
from ngpu_bootstrap.store.records import WorkspaceRow, WorkspaceToken
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.workspaces import WorkspaceSpec

# Ids have 18 digits, as the documents' have: enough that two bootstraps do not meet, and exact in 64 bits.
_ID_LOW, _ID_HIGH = 10**17, 10**18
_NOBODY = bytes(32)


class NewWorkspace(WorkspaceSpec):
    """A workspace to be made: a specification without id and revision, which the bootstrap gives it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: SkipJsonSchema[str] = "1"
    revision: SkipJsonSchema[int] = 1
    image_digest: SkipJsonSchema[str | None] = None
    owner: Annotated[str, Field(max_length=128)] = Field(default="", description="who it belongs to, for the operator")

    @model_validator(mode="before")
    @classmethod
    def _not_given(cls, document: Any) -> Any:
        for key in ("id", "revision", "image_digest"):
            if isinstance(document, dict) and key in document:
                raise ValueError(f"{key} is given by the bootstrap; leave it out")
        return document


@dataclass(frozen=True, slots=True)
class Workspace:
    """A workspace as this bootstrap knows it. Its tokens are known by their hashes alone."""

    spec: WorkspaceSpec
    owner: str
    tokens: tuple[WorkspaceToken, ...]
    created_at_ms: int

    @property
    def id(self) -> str:
        return self.spec.id


class Workspaces:
    """Every workspace that is not removed.

    Args:
        on_change: called after each change, for whoever distributes workspaces.
    """

    def __init__(self, store: Store, *, now_ms: Callable[[], int], on_change: Callable[[], None]) -> None:
        self._store = store
        self._now_ms = now_ms
        self._on_change = on_change
        self._by_id: dict[str, Workspace] = {}

    def __iter__(self) -> Iterator[Workspace]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    async def load(self) -> None:
        """Read every workspace from the store."""
        self._by_id = {row.id: _workspace(row) for row in await self._store.list_workspaces()}
        self._on_change()

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
                    return workspace, known
        raise Unauthorized("token_unknown", "this workspace token is not known here; it may have been removed")

    async def add(self, new: NewWorkspace) -> tuple[Workspace, Token]:
        """Make a workspace and return it with its token, which is shown this once."""
        fields = new.model_dump(exclude={"id", "revision", "owner"})
        while True:
            workspace_id = str(_ID_LOW + secrets.randbelow(_ID_HIGH - _ID_LOW))
            spec = WorkspaceSpec(id=workspace_id, **fields)
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
                await self._store.add_workspace(row)
            except WorkspaceConflict:  # the id is taken: one in 10**18 for each workspace there is
                continue
            workspace = _workspace(row)
            self._by_id[workspace_id] = workspace
            self._on_change()
            return workspace, token

    async def rotate_token(self, workspace_id: str, overlap_s: float) -> tuple[Token, WorkspaceToken, int]:
        """Give the workspace a new token; return it, its record, and when the tokens before end (UTC milliseconds).

        Those that end sooner anyway stay as they are.

        Raises:
            Refusal: 404; 409 when another rotation was faster.
        """
        workspace = self.require(workspace_id)
        now_ms = self._now_ms()
        ends_at_ms = now_ms + int(overlap_s * 1000)
        token = make_token(workspace_id, secrets.token_bytes(SECRET_BYTES))
        number = 1 + max((_label_number(known.label) for known in workspace.tokens), default=0)
        record = WorkspaceToken(f"{workspace_id}.{number}", stored_hash(token), now_ms)
        shortened = [
            known.label for known in workspace.tokens if known.expires_at_ms is None or known.expires_at_ms > ends_at_ms
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

    async def remove(self, workspace_id: str) -> Workspace:
        """Remove the workspace: its token opens nothing any more and its deployments stop. Its tasks stay on record.

        Raises:
            Refusal: 404.
        """
        workspace = self.require(workspace_id)
        with contextlib.suppress(UnknownWorkspace):  # removed by another process on the same database
            await self._store.remove_workspace(workspace_id, self._now_ms())
        self._by_id.pop(workspace_id, None)
        self._on_change()
        return workspace


def _label_number(label: str) -> int:
    number = label.rpartition(".")[2]
    return int(number) if number.isascii() and number.isdigit() else 0


def _workspace(row: WorkspaceRow) -> Workspace:
    spec = WorkspaceSpec.from_wire({**row.spec, "id": row.id, "revision": row.revision})
    return Workspace(spec, row.owner, row.tokens, row.created_at_ms)
