"""What clients confide for their workspaces: sealed in the store to the bootstraps that may read it, and to each node
that runs them.

Owns the boxes; the document inside is `ngpu_protocol.workspace_secrets`, the cipher `ngpu_protocol.sealing`. In clear
the secrets exist only between opening one box and closing the other.

Several bootstraps on one database can each deploy a workspace only if each can read its secrets. Who may is the
operator's word (`siblings`): the database says only which key belongs to an address, and a key proves its address, so
that whoever can write into the database alone gains nothing. What was confided before a sibling joined is sealed to it
by the first that can read it (`share`).
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence

import structlog
import trio

from ngpu_bootstrap.errors import Refusal
from ngpu_bootstrap.store import queries
from ngpu_bootstrap.store.leases import Sibling
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.errors import AddressError, MalformedError
from ngpu_protocol.identity import Account, Address, address_of_peer_id, public_key_of_peer_id
from ngpu_protocol.sealing import open_sealed, seal
from ngpu_protocol.workspace_secrets import NO_SECRETS, WorkspaceSecrets
from ngpu_protocol.workspaces import WorkspaceSpec

log = structlog.get_logger(__name__)

# Boxes made at a time, about: the rest follows with the next beat.
SHARED_AT_ONCE = 50


class Confided:
    """The secrets of every workspace.

    Args:
        account: gives this bootstrap's account. Asked only when there is something to seal or to open: a command that
            works while no daemon runs has to open the keystore for it.
        siblings: other bootstraps of the database that may read them too.
    """

    def __init__(self, store: Store, account: Callable[[], Account], siblings: Collection[Address] = ()) -> None:
        self._store = store
        self._account = account
        self._siblings = frozenset(siblings)
        self._met: frozenset[Address] = frozenset()
        self._shared_with: frozenset[Address] = frozenset()
        # sealed to somebody else's key, before there were boxes for several
        self._foreign: set[tuple[str, int]] = set()

    async def at_rest(self, confided: WorkspaceSecrets, workspace: str, revision: int) -> Mapping[str, bytes]:
        """Return *confided* as it goes into the store: by the bootstrap that can read it; empty when there is nothing.

        Raises:
            Refusal: it is too large.
        """
        if confided.is_empty:
            return {}
        keys = {self._account().address: self._account().public_key}
        if self._siblings and self._store.is_shared:
            keys |= self._keys(await self._store.siblings())
        return {address: _sealed(confided, key, workspace, revision) for address, key in keys.items()}

    async def read(self, workspace: str, revision: int) -> WorkspaceSecrets:
        """Return what was confided for a revision.

        Raises:
            MalformedError: it was sealed to other keys: the data directory's was replaced, or a sibling has not sealed
                it to this one yet.
        """
        account = self._account()
        sealed, is_there = await self._store.sealed_secrets(workspace, revision, account.address)
        if sealed is None and is_there:
            raise MalformedError(
                "secrets", "they are sealed to other bootstraps: name this one under `siblings` in their configuration"
            )
        if sealed is None:
            return NO_SECRETS
        return WorkspaceSecrets.decode(open_sealed(sealed, account, workspace=workspace, revision=revision))

    def opened(self, boxes: Mapping[str, bytes], workspace: str, revision: int) -> WorkspaceSecrets:
        """Return what `at_rest` sealed into *boxes* that are kept elsewhere than with a workspace.

        Raises:
            MalformedError: none of them is this bootstrap's, or its key was replaced.
        """
        account = self._account()
        if account.address not in boxes:
            raise MalformedError("secrets", "they are sealed to other bootstraps")
        opened = open_sealed(boxes[account.address], account, workspace=workspace, revision=revision)
        return WorkspaceSecrets.decode(opened)

    async def for_node(self, spec: WorkspaceSpec, peer_id: str) -> bytes | None:
        """Return the secrets of *spec* as one node alone can read them; None when it has none.

        Raises:
            MalformedError: as `read`.
        """
        if not spec.has_secrets:
            return None
        confided = await self.read(spec.id, spec.revision)
        return _sealed(confided, public_key_of_peer_id(peer_id), spec.id, spec.revision)

    async def share(self, met: Sequence[Sibling]) -> None:
        """Seal to the bootstraps *met* what they may read and cannot yet. Cheap where nothing is new.

        Raises:
            StoreError: the store cannot be used.
        """
        own = self._account().address
        there = {Address(one.address) for one in met if one.address != own}
        for stranger in there - self._siblings - self._met:
            log.warning("sibling_reads_no_secrets", bootstrap=stranger, hint="name it under `siblings` if it is yours")
        self._met |= there
        keys = {own: self._account().public_key, **self._keys(met)}
        if self._shared_with == keys.keys():
            return
        lacking = await self._store.look_over(functools.partial(queries.secrets_to_share, own=own, readers=list(keys)))
        made: list[tuple[str, int, Address, bytes]] = []
        for workspace, revision, sealed, readers in lacking:
            if len(made) >= SHARED_AT_ONCE:
                break
            if (workspace, revision) in self._foreign:
                continue
            try:
                opened = open_sealed(sealed, self._account(), workspace=workspace, revision=revision)
                confided = WorkspaceSecrets.decode(opened)
            except MalformedError:
                self._foreign.add((workspace, revision))
                continue
            for one in map(Address, readers):
                made.append((workspace, revision, one, _sealed(confided, keys[one], workspace, revision)))
            await trio.lowlevel.checkpoint()
        else:
            self._shared_with = frozenset(keys)
        if made:
            await self._store.chore(lambda connection: queries.add_boxes(connection, made))
            log.info("secrets_shared", boxes=len(made), readers=len(keys))

    def _keys(self, met: Sequence[Sibling]) -> dict[Address, bytes]:
        """Return the public key of each of *met* that is a sibling and says it."""
        keys: dict[Address, bytes] = {}
        for one in met:
            address, peer_id = Address(one.address), one.about.get("peer_id")
            if address not in self._siblings or not isinstance(peer_id, str):
                continue
            try:
                if address_of_peer_id(peer_id) == address:
                    keys[address] = public_key_of_peer_id(peer_id)
            except AddressError as error:
                log.warning("sibling_without_key", bootstrap=address, reason=str(error))
        return keys


def _sealed(confided: WorkspaceSecrets, recipient: bytes, workspace: str, revision: int) -> bytes:
    try:
        return seal(
            confided.encode(),
            recipient,
            workspace=workspace,
            revision=revision,
            ephemeral_key=secrets.token_bytes(32),
        )
    except ValueError as error:
        raise Refusal(422, "secrets_too_large", str(error)) from None


def complete(new: WorkspaceSecrets, before: WorkspaceSecrets, spec: WorkspaceSpec) -> WorkspaceSecrets:
    """Return the secrets of *spec*: those given now, and of those it names besides, the ones confided before. Pure.

    Raises:
        Refusal: 422, naming one that was never given.
    """
    env = {name: value for name, value in (before.env | new.env).items() if name in spec.secret_env}
    registry = (new.registry or before.registry) if spec.has_registry_credentials else None
    image_query = (new.image_query or before.image_query) if spec.has_image_query else ""
    missing = [name for name in spec.secret_env if name not in env]
    if missing:
        raise Refusal(422, "secret_missing", f"secret_env: {missing[0]} has no value; give it under secrets.env")
    if spec.has_registry_credentials and registry is None:
        raise Refusal(422, "secret_missing", "has_registry_credentials: give them under secrets.registry")
    if spec.has_image_query and not image_query:
        raise Refusal(422, "secret_missing", "has_image_query: give image_url with its query")
    return WorkspaceSecrets(registry=registry, env=env, image_query=image_query)
