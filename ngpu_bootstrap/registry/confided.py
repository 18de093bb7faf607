"""What clients confide for their workspaces: sealed in the store to this bootstrap, and to each node that runs them.

Owns the two boxes; the document inside is `ngpu_protocol.workspace_secrets`, the cipher `ngpu_protocol.sealing`. In
clear the secrets exist only between opening one box and closing the other.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from ngpu_bootstrap.errors import Refusal
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.identity import Account, public_key_of_peer_id
from ngpu_protocol.sealing import open_sealed, seal
from ngpu_protocol.workspace_secrets import NO_SECRETS, WorkspaceSecrets
from ngpu_protocol.workspaces import WorkspaceSpec


class Confided:
    """The secrets of every workspace.

    Args:
        account: gives this bootstrap's account. Asked only when there is something to seal or to open: a command that
            works while no daemon runs has to open the keystore for it.
    """

    def __init__(self, store: Store, account: Callable[[], Account]) -> None:
        self._store = store
        self._account = account

    def at_rest(self, confided: WorkspaceSecrets, workspace: str, revision: int) -> bytes | None:
        """Return *confided* as it goes into the store; None when there is nothing.

        Raises:
            Refusal: it is too large.
        """
        if confided.is_empty:
            return None
        return _sealed(confided, self._account().public_key, workspace, revision)

    async def read(self, workspace: str, revision: int) -> WorkspaceSecrets:
        """Return what was confided for a revision.

        Raises:
            MalformedError: it was sealed to another key: the data directory's key was replaced.
        """
        sealed = await self._store.sealed_secrets(workspace, revision)
        if sealed is None:
            return NO_SECRETS
        return WorkspaceSecrets.decode(open_sealed(sealed, self._account(), workspace=workspace, revision=revision))

    async def for_node(self, spec: WorkspaceSpec, peer_id: str) -> bytes | None:
        """Return the secrets of *spec* as one node alone can read them; None when it has none.

        Raises:
            MalformedError: as `read`.
        """
        if not spec.has_secrets:
            return None
        confided = await self.read(spec.id, spec.revision)
        return _sealed(confided, public_key_of_peer_id(peer_id), spec.id, spec.revision)


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
