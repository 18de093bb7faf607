"""The client's half: requests over a pool of kept connections. One request is a `call.Call`.

A connection goes back to the pool only when both messages on it are complete and nothing else came; one whose request
was cancelled, refused before its body, or cut short is reset. No request is ever sent twice from here: whether that may
be done, the errors tell and the caller decides.
"""

from collections.abc import Awaitable, Callable

import trio

from ngpu_protocol.http1.call import Body, Call, Link
from ngpu_protocol.http1.errors import MisuseError, NotSentError
from ngpu_protocol.http1.headers import Headers
from ngpu_protocol.http1.limits import Limits
from ngpu_protocol.http1.pool import Pool
from ngpu_protocol.http1.streams import close_stream


class Client:
    """Requests to one place over a bounded pool of kept connections.

    Attributes:
        authority: The Host field of requests that bring none.
        limits: Bounds of the answers' heads and trailers.
        pool: Its connections: `pool.open`, `pool.idle` and `pool.waiting` are for metrics.
    """

    def __init__(
        self,
        open: Callable[[], Awaitable[trio.abc.Stream]],
        *,
        authority: str = "localhost",
        max_connections: int = 64,
        max_idle_s: float = 30.0,
        acquire_timeout_s: float = 10.0,
        open_timeout_s: float = 10.0,
        limits: Limits | None = None,
    ) -> None:
        """Make a client; nothing is connected yet.

        Args:
            open: Makes a new connection. What it raises becomes the cause of a `NotSentError`.
            authority: The Host field of requests that bring none.
            max_connections: Connections at once; further requests wait in order.
            max_idle_s: A connection idle for longer is closed, not used. Keep it below the server's own limit, so that
                a request rarely meets a connection that is being closed.
            acquire_timeout_s: How long a request waits for a connection before `PoolTimeoutError`.
            open_timeout_s: How long opening one may take.
            limits: Bounds of the answers' heads and trailers.
        """
        self._open = open
        self._acquire_timeout_s = acquire_timeout_s
        self._open_timeout_s = open_timeout_s
        self._closed = False
        self.authority = authority.encode("ascii")
        self.limits = limits or Limits()
        self.pool: Pool[Link] = Pool(
            max_connections=max_connections, max_idle_s=max_idle_s, is_usable=Link.is_usable, now=trio.current_time
        )

    def request(
        self,
        method: str,
        target: str,
        headers: Headers | None = None,
        body: Body = b"",
        *,
        expect_continue: bool = False,
        continue_timeout_s: float = 5.0,
        trailers: Headers | None = None,
    ) -> Call:
        """Return a context manager that sends the request and yields its `Response`.

        Leaving the context before the body was received whole resets the connection, which tells the server to stop.

        Args:
            method: Any token but CONNECT.
            target: `/path?query`, already encoded.
            headers: Fields in order; Host and the framing are added. Connection and Upgrade go out as given.
            body: Bytes, or an asynchronous iterable of them (chunked unless *headers* give its Content-Length). What
                the iterable raises, the context raises. Where it has an attribute `trailers`, those it has at its end
                are sent behind a chunked body.
            expect_continue: Send the body only when the server asks for it.
            continue_timeout_s: Send it anyway after this time (RFC 9110 section 10.1.1).
            trailers: Sent after the body, which is then chunked.

        Raises:
            MisuseError: At once, when these cannot be a request.
            NotSentError, PoolTimeoutError, MaybeSentError, IncompleteError, MalformedError, LimitError: On entering
                the context; see `errors`.
        """
        if self._closed:
            raise MisuseError("the client is closed")
        return Call(
            self,
            method,
            target,
            headers or [],
            body,
            expect_continue=expect_continue,
            continue_timeout_s=continue_timeout_s,
            trailers=trailers or [],
        )

    async def sweep(self) -> None:
        """Close connections idle for too long; each request does so too, so only clients at rest need it called."""
        for link in self.pool.dropped():
            await close_stream(link.stream)

    async def aclose(self) -> None:
        """Close all idle connections; those in use close when their requests end. New requests are refused."""
        self._closed = True
        for link in self.pool.clear():
            await close_stream(link.stream)

    # What calls use

    @property
    def closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._closed

    async def acquire(self) -> Link:
        """Return a connection ready for a request; the caller gives it to `release` or `forget`."""
        link, granted = self.pool.take()
        if link is not None:
            return link
        if not granted:
            link = await self.pool.wait(self._acquire_timeout_s)
            if link is not None and link.is_usable():
                return link
        try:
            if link is not None:
                await close_stream(link.stream)
            await self.sweep()
            with trio.fail_after(self._open_timeout_s):
                return Link(await self._open())
        except BaseException as error:
            self.pool.forget()
            if not isinstance(error, Exception) or isinstance(error, NotSentError):
                raise
            if isinstance(error, trio.TooSlowError):
                raise NotSentError(f"no connection within {self._open_timeout_s:g} s") from error
            raise NotSentError(f"no connection: {error or type(error).__name__}") from error

    def release(self, link: Link) -> None:
        """Take back a connection that can carry another request."""
        self.pool.release(link)

    def forget(self, link: Link) -> None:
        """Take note that a connection was closed."""
        self.pool.forget()
