"""The seam through which calls beyond the documents come in, where an operator asks for them (`ngpu_bootstrap.compat`).

The front asks an extension for the names it reserves and does not serve itself, for one prefix of paths, for how a poll
under an API's own name looks, and for a port that a client knows by another number. It knows nothing else of it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from ngpu_bootstrap.credentials import Token
from ngpu_bootstrap.front.answers import Answer
from ngpu_protocol.http1 import Headers

ReadBody = Callable[[int], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class UserCall:
    """A call of `/user/<name>`. *client* is the address it comes from."""

    name: str
    method: str
    query: str | None
    headers: Headers = field(repr=False)
    token: Token | None
    client: str


class Extension(Protocol):
    """What the front asks of it."""

    prefix: str
    """Paths that begin so are the extension's."""

    async def user_call(self, call: UserCall, read_body: ReadBody) -> Answer:
        """Return the answer to `/user/<name>`; raises Refusal, 404 for a name it does not know."""

    async def call(
        self, method: str, path: str, query: str | None, headers: Headers, client: str, read_body: ReadBody
    ) -> Answer:
        """Return the answer to a path under `prefix`; raises Refusal."""

    def poll(self, name: str, answer: Answer) -> Answer:
        """Return how *answer*, that of a poll under the API *name*, looks to its clients."""

    async def port_of(self, workspace: str, port: str) -> str:
        """Return the workspace's own port for the one a client named."""
