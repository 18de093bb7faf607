"""What can go wrong at a bootstrap peer, by who must act.

Owns the classes and the words of a refusal. How a refusal looks on the wire belongs to `front.answers`; which code of
a node's refusal is which status belongs to `ngpu_protocol.wire_errors`. A message says what happened, to what, and
what to do next, and never holds a credential.
"""

from __future__ import annotations

from collections.abc import Mapping


class BootstrapError(Exception):
    """Root of what this package raises."""


class Refusal(BootstrapError):
    """A client's call is not served: the client must change something, or come again later.

    Args:
        status: the HTTP status of the answer.
        reason: stable and machine-readable, the same for the same cause for ever.
        message: English, for a person: what to change.
        retry_after_s: when coming again may help; None when it will not.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        *,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, retry_after_s))


class BadRequest(Refusal):
    """The request itself is wrong, whoever sends it and whenever."""

    def __init__(self, reason: str, message: str, *, status: int = 400) -> None:
        super().__init__(status, reason, message)


class Unauthorized(Refusal):
    """No credential, or one this bootstrap does not know."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(401, reason, message, headers={"WWW-Authenticate": 'Bearer realm="ngpu"'})


class Forbidden(Refusal):
    """A credential that is known, for something that is not its own."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(403, reason, message)


class NotServed(Refusal):
    """Nothing can run the call now: no node serves the workspace, or every slot and every place to wait is taken."""


class NodeFault(Refusal):
    """The call reached a node, and no answer that may be passed on came back."""
