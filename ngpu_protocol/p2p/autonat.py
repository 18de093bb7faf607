"""Whether others can dial this host: asked of a peer that tries it (libp2p specification *autonat*, version 1).

The asker names addresses; the peer dials those that lie at the IP address it sees the asker at, and no others, so that
it cannot be made to connect to a third party; and says which one worked. A relayed asker has no such address and is
refused. What one peer may have dialled is bounded in number and pace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from ipaddress import ip_address

import structlog
import trio
from google.protobuf.message import DecodeError
from libp2p.host.autonat.pb.autonat_pb2 import Message
from multiaddr import Multiaddr

from ngpu_protocol.errors import MalformedError
from ngpu_protocol.p2p.delimited import delimited, receive_delimited
from ngpu_protocol.p2p.errors import P2PError, StreamOpenError
from ngpu_protocol.p2p.host import Host
from ngpu_protocol.p2p.kad_messages import MAX_ADDRESS_BYTES, multiaddr_bytes, multiaddr_text, peer_id_bytes
from ngpu_protocol.p2p.listener import tcp_endpoint
from ngpu_protocol.p2p.stream import P2PStream

__all__ = ["AUTONAT_PROTOCOL", "DialBack", "ask_dialable"]

_log = structlog.get_logger(__name__)

AUTONAT_PROTOCOL = "/libp2p/autonat/1.0.0"
_MAX_BYTES = 4096
_MAX_ADDRESSES = 8
_DIAL_S = 3.0
_READ_S = 5.0
_DIALS_AT_ONCE = 16
_PER_PEER_S = 2.0
"""How often one peer may ask, in the long run; a few times at once are free."""
_BURST = 6
_MAX_PACED = 4096


async def ask_dialable(host: Host, peer_id: str, addresses: Sequence[str], *, timeout_s: float = 15.0) -> str | None:
    """Return at which of *addresses* the connected *peer_id* reached this host; None if at none.

    Args:
        addresses: multiaddrs without ``/p2p``.

    Raises:
        P2PError: the peer does not offer this, or gave no sensible answer in time.
    """
    dial = Message.Dial(
        peer=Message.PeerInfo(
            id=peer_id_bytes(host.peer_id), addrs=[multiaddr_bytes(text) for text in addresses[:_MAX_ADDRESSES]]
        )
    )
    stream = await host.open_stream(peer_id, AUTONAT_PROTOCOL, timeout_s=timeout_s)
    try:
        with trio.fail_after(timeout_s):
            await stream.send_all(delimited(Message(type=Message.DIAL, dial=dial).SerializeToString()))
            said = Message.FromString(await receive_delimited(stream, max_bytes=_MAX_BYTES)).dialResponse
    except (trio.TooSlowError, trio.BrokenResourceError, MalformedError, DecodeError) as error:
        raise StreamOpenError(peer_id, AUTONAT_PROTOCOL, "no sensible answer") from error
    finally:
        stream.reset_nowait()
    if said.status == Message.OK:
        return multiaddr_text(said.addr) or addresses[0]
    if said.status in (Message.E_DIAL_ERROR, Message.E_DIAL_REFUSED):
        return None
    raise StreamOpenError(peer_id, AUTONAT_PROTOCOL, said.statusText[:200] or f"status {said.status}")


class DialBack:
    """The side that tries: register `serve` for `AUTONAT_PROTOCOL`."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._room = trio.CapacityLimiter(_DIALS_AT_ONCE)
        self._spent: dict[str, float] = {}  # until when a peer's pace is used up

    async def serve(self, stream: P2PStream) -> None:
        """Answer one question."""
        try:
            with trio.fail_after(_READ_S):
                message = Message.FromString(await receive_delimited(stream, max_bytes=_MAX_BYTES))
        except (trio.TooSlowError, MalformedError, DecodeError) as error:
            _log.debug("dial_back_refused", peer=stream.remote_peer, reason=str(error))
            stream.reset_nowait()
            return
        answer = Message(type=Message.DIAL_RESPONSE, dialResponse=await self._answer(stream, message))
        with trio.move_on_after(_READ_S):
            await stream.send_all(delimited(answer.SerializeToString()))

    async def _answer(self, stream: P2PStream, message: Message) -> Message.DialResponse:
        peer = stream.remote_peer
        if message.dial.peer.id != peer_id_bytes(peer):
            return Message.DialResponse(status=Message.E_BAD_REQUEST, statusText="ask for yourself")
        seen_at = stream.remote_endpoint
        if seen_at is None:
            return Message.DialResponse(status=Message.E_DIAL_REFUSED, statusText="this connection is relayed")
        if not self._may_ask(peer):
            return Message.DialResponse(status=Message.E_DIAL_REFUSED, statusText="too often: ask again in a minute")
        allowed = [text for raw in message.dial.peer.addrs[:_MAX_ADDRESSES] if (text := _at(raw, seen_at[0]))]
        if not allowed:
            return Message.DialResponse(status=Message.E_DIAL_REFUSED, statusText=f"none of these is at {seen_at[0]}")
        async with self._room:
            for text in dict.fromkeys(allowed):
                try:
                    await self._host.probe(f"{text}/p2p/{peer}", timeout_s=_DIAL_S)
                except P2PError:
                    continue
                return Message.DialResponse(status=Message.OK, addr=multiaddr_bytes(text))
        return Message.DialResponse(status=Message.E_DIAL_ERROR, statusText="nobody answers there")

    def _may_ask(self, peer: str) -> bool:
        now_s = trio.current_time()
        if len(self._spent) >= _MAX_PACED:
            self._spent = {other: until_s for other, until_s in self._spent.items() if until_s > now_s}
            if len(self._spent) >= _MAX_PACED:
                return False
        until_s = max(self._spent.get(peer, -math.inf), now_s)
        if until_s - now_s > _PER_PEER_S * _BURST:
            return False
        self._spent[peer] = until_s + _PER_PEER_S
        return True


def _at(raw: bytes, ip: str) -> str | None:
    """Return the text of a plain TCP multiaddr that lies at *ip*; None for any other, names included."""
    text = multiaddr_text(raw) if len(raw) <= MAX_ADDRESS_BYTES else None
    endpoint = tcp_endpoint(Multiaddr(text)) if text is not None else None
    if endpoint is None:
        return None
    try:
        same = ip_address(endpoint[0]) == ip_address(ip)
    except ValueError:
        return None
    return text if same else None
