"""HTTP/1.1 on any byte stream: TCP for clients, libp2p streams between peers, loopback to workspaces.

Server:

    async def hello(exchange: Exchange) -> None:
        body = await exchange.receive_all(max_bytes=1_000_000)      # or: while data := await exchange.receive()
        await exchange.respond(200, [(b"content-type", b"text/plain")], b"hello " + body)

    async def streamed(exchange: Exchange) -> None:
        await exchange.send_head(200, [(b"content-type", b"text/event-stream")])
        async for event in events():
            await exchange.send(event)                               # goes out at once
        await exchange.end(trailers=[(b"ngpu-receipt", receipt)])

    await nursery.start(partial(serve_tcp, hello, host="127.0.0.1", port=8080))       # returns the bound addresses
    await serve_stream(p2p_stream, hello, remote=Remote(peer=str(address)), half_close=True)

Client:

    client = Client(tcp_opener("127.0.0.1", 8000), authority="127.0.0.1:8000")
    async with client.request("POST", "/run?x=1", [(b"content-type", b"application/json")], b"{}") as response:
        async for piece in response.body():
            ...
        response.trailers

    Client(tls_opener("example.org", 443, ssl.create_default_context()), authority="example.org")

Failures: `errors` says which tell that a request may run again. Proxies: `headers.end_to_end`.
"""

from ngpu_protocol.http1.asgi import AsgiHandler
from ngpu_protocol.http1.call import Body, Call
from ngpu_protocol.http1.client import Client
from ngpu_protocol.http1.draining import Draining
from ngpu_protocol.http1.errors import (
    ClientGoneError,
    HttpError,
    IncompleteError,
    LimitError,
    MalformedError,
    MaybeSentError,
    MisuseError,
    NotSentError,
    PoolTimeoutError,
    RemoteError,
)
from ngpu_protocol.http1.exchange import Exchange, Handler, Remote
from ngpu_protocol.http1.headers import (
    Headers,
    comma_list,
    end_to_end,
    header,
    trailers_end_to_end,
    wants_upgrade,
)
from ngpu_protocol.http1.heads import Request, ResponseHead
from ngpu_protocol.http1.limits import Limits
from ngpu_protocol.http1.response import Response
from ngpu_protocol.http1.server import serve_stream
from ngpu_protocol.http1.streams import SwitchedStream, abort_stream
from ngpu_protocol.http1.tcp import BoundAddress, open_listeners, serve_tcp, tls_opener
from ngpu_protocol.http1.tcp_stream import NothingSentError, TcpStream, tcp_opener

__all__ = [
    "AsgiHandler",
    "Body",
    "BoundAddress",
    "Call",
    "Client",
    "ClientGoneError",
    "Draining",
    "Exchange",
    "Handler",
    "Headers",
    "HttpError",
    "IncompleteError",
    "LimitError",
    "Limits",
    "MalformedError",
    "MaybeSentError",
    "MisuseError",
    "NotSentError",
    "NothingSentError",
    "PoolTimeoutError",
    "Remote",
    "RemoteError",
    "Request",
    "Response",
    "ResponseHead",
    "SwitchedStream",
    "TcpStream",
    "abort_stream",
    "comma_list",
    "end_to_end",
    "header",
    "open_listeners",
    "serve_stream",
    "serve_tcp",
    "tcp_opener",
    "tls_opener",
    "trailers_end_to_end",
    "wants_upgrade",
]
