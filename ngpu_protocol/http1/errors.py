"""What can go wrong in an HTTP/1.1 exchange, split by who must act.

| class | whose fault | what is known |
|---|---|---|
| `MisuseError` | ours: the caller broke the protocol's rules | nothing was sent that could mislead the peer |
| `MalformedError` | the remote's: bytes that are no HTTP/1.1 | the connection is useless from here |
| `LimitError` | the remote's: more than we agreed to take | the connection is closed after the answer |
| `IncompleteError` | the remote's: the message was cut short | what came so far is not the whole message |
| `ClientGoneError` | the remote's: the client left | the answer cannot be delivered |
| `NotSentError` | the network's: no complete request left this host | trying again, here or elsewhere, is always safe |
| `PoolTimeoutError` | ours: every connection stayed busy | as `NotSentError` |
| `MaybeSentError` | the network's: no answer to what may have arrived | only an idempotent request may run again |

The difference between the last three decides retries, so a doubtful case is always a `MaybeSentError`.
"""


class HttpError(Exception):
    """Root of this package's errors."""


class MisuseError(HttpError):
    """The caller asked for something HTTP/1.1 does not allow (a second head, a body over its Content-Length)."""


class RemoteError(HttpError):
    """The other side misbehaved.

    Attributes:
        status: The status a server answers with when this error ends a request.
        reason: A stable machine-readable word for the answer's JSON body.
    """

    status = 400
    reason = "malformed_request"

    def __init__(self, message: str, *, status: int | None = None, reason: str | None = None) -> None:
        super().__init__(message)
        if status is not None:
            self.status = status
        if reason is not None:
            self.reason = reason


class MalformedError(RemoteError):
    """The remote sent bytes that are no HTTP/1.1 message, or one whose end cannot be told for certain."""


class LimitError(RemoteError):
    """The remote sent more (bytes, header fields, time) than the limits allow."""

    status = 413
    reason = "body_too_large"


class IncompleteError(RemoteError):
    """The remote's message ended before its framing said it would."""

    status = 502
    reason = "incomplete"


class ClientGoneError(RemoteError):
    """The client closed or reset its connection; raised only where a cancellation cannot be delivered (shields)."""

    status = 499
    reason = "client_gone"


class NotSentError(HttpError):
    """No complete request head can have reached the remote: it never acted on this request."""


class PoolTimeoutError(NotSentError):
    """No connection of the pool became free in time."""


class MaybeSentError(HttpError):
    """The connection failed after the request may have reached the remote, and before an answer came."""


def blame_server(error: BaseException) -> None:
    """Give an error about an answer the status with which a proxy passes it on."""
    if isinstance(error, MalformedError | LimitError):
        error.status, error.reason = 502, "malformed_answer"
