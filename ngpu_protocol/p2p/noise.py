"""Noise, and nothing but noise: who the remote is, and the encrypted channel to it.

The handshake (Noise_XX_25519_ChaChaPoly_SHA256, libp2p noise specification) is the library's. What comes after it is
ours: `NoiseChannel` takes the two keys and works on whole reads and writes. The library's own path reads each message
as two reads through three locks and checks the clock and the environment on the way; measured for a 1 KiB echo it
was two thirds of the cost.

A message on the wire is a 2-byte big-endian length and that many bytes of ciphertext, the last 16 its tag. Nonces
count from 0 in each direction: 4 zero bytes, then 8 little-endian (Noise specification, section 12.3).

Traps closed here: a host of the library accepts `/plaintext/2.0.0` and secio unless told otherwise, so that anyone
can claim any PeerId. `security_options` holds noise alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.crypto.keys import KeyPair, PrivateKey, PublicKey
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL
from libp2p.security.noise.transport import Transport as LibraryNoise
from libp2p.security.secure_session import SecureSession
from multiaddr import Multiaddr

from ngpu_protocol.p2p.links import Link, LinkClosedError, RawLink, TcpLink

__all__ = ["MAX_PLAINTEXT_BYTES", "NoiseChannel", "security_options"]

_TAG_BYTES = 16
_MAX_MESSAGE_BYTES = 0xFFFF
MAX_PLAINTEXT_BYTES = _MAX_MESSAGE_BYTES - _TAG_BYTES
_INBOX_BYTES = 2 * (_MAX_MESSAGE_BYTES + 2)  # a connection's one standing buffer
_MAX_NONCE = 2**64 - 2  # the specification reserves the last one


class NoiseChannel(ISecureConn):
    """An authenticated, encrypted, ordered channel to one peer.

    Has two lives. While protocols are negotiated the library calls `read` and `write`. Then the muxer owns it alone
    and uses `receive`, `seal` and the link.
    """

    def __init__(self, session: SecureSession, link: Link, send_key: bytes, receive_key: bytes) -> None:
        self.link = link
        self.is_initiator = session.is_initiator
        self._session = session
        self._seal = ChaCha20Poly1305(send_key).encrypt
        self._open = ChaCha20Poly1305(receive_key).decrypt
        self._sealed = 0
        self._opened = 0
        self._inbox = memoryview(bytearray(_INBOX_BYTES))
        self._begin = 0
        self._end = 0
        self._unread = b""

    # The muxer's side.

    def take_unread(self) -> bytes:
        """Return plaintext that arrived behind the muxer's negotiation and was read along with it."""
        data, self._unread = self._unread, b""
        return data

    def seal(self, pieces: list[bytes]) -> list[bytes]:
        """Encrypt *pieces*, each at most MAX_PLAINTEXT_BYTES, in as few messages as they fit; ready for the link."""
        out: list[bytes] = []
        batch: list[bytes] = []
        size = 0
        for piece in pieces:
            if size + len(piece) > MAX_PLAINTEXT_BYTES:
                self._seal_message(batch[0] if len(batch) == 1 else b"".join(batch), out)
                batch = []
                size = 0
            batch.append(piece)
            size += len(piece)
        if batch:
            self._seal_message(batch[0] if len(batch) == 1 else b"".join(batch), out)
        return out

    def _seal_message(self, plaintext: bytes, out: list[bytes]) -> None:
        nonce = self._sealed
        if nonce > _MAX_NONCE:
            raise LinkClosedError("noise nonces are used up")
        self._sealed = nonce + 1
        out.append((len(plaintext) + _TAG_BYTES).to_bytes(2, "big"))
        out.append(self._seal((nonce << 32).to_bytes(12, "little"), plaintext, None))

    async def receive(self) -> list[bytes]:
        """Return the plaintext of every message at hand, at least one; an empty list at the remote's end.

        Raises:
            LinkClosedError: the link broke, was closed here, ended inside a message, or carried a forged one.
        """
        while True:
            messages = self._open_messages()
            if messages:
                return messages
            if self._begin == self._end:
                self._begin = self._end = 0
            elif _INBOX_BYTES - self._begin < _MAX_MESSAGE_BYTES + 2:
                rest = bytes(self._inbox[self._begin : self._end])
                self._inbox[: len(rest)] = rest
                self._begin, self._end = 0, len(rest)
            count = await self.link.read_into(self._inbox[self._end :])
            if not count:
                if self._begin != self._end:
                    raise LinkClosedError("the connection ended inside a message")
                return []
            self._end += count

    def _open_messages(self) -> list[bytes]:
        inbox, begin, end = self._inbox, self._begin, self._end
        messages: list[bytes] = []
        while end - begin > 2:
            stop = begin + 2 + (inbox[begin] << 8 | inbox[begin + 1])
            if stop > end:
                break
            try:
                nonce = (self._opened << 32).to_bytes(12, "little")
                messages.append(self._open(nonce, inbox[begin + 2 : stop], None))
            except (InvalidTag, ValueError, OverflowError) as error:
                raise LinkClosedError("a message does not authenticate") from error
            self._opened += 1
            begin = stop
        self._begin = begin
        return messages

    # The library's side, for negotiation only.

    async def write(self, data: bytes) -> None:
        step = MAX_PLAINTEXT_BYTES
        pieces = self.seal([data[at : at + step] for at in range(0, len(data), step)])
        while pieces:
            pieces = await self.link.write_some(pieces)

    async def read(self, n: int | None = None) -> bytes:
        if not self._unread:
            self._unread = b"".join(await self.receive())
        if n is None:
            n = len(self._unread)
        data, self._unread = self._unread[:n], self._unread[n:]
        return data

    async def close(self) -> None:
        self.link.close()

    def get_local_peer(self) -> ID:
        return self._session.get_local_peer()

    def get_local_private_key(self) -> PrivateKey:
        return self._session.get_local_private_key()

    def get_remote_peer(self) -> ID:
        return self._session.get_remote_peer()

    def get_remote_public_key(self) -> PublicKey:
        # The library gives the noise static key here, not the identity's. The identity is the PeerId, which the
        # handshake proved; nobody needs the other, and whoever asks believes it is the identity.
        key = self._session.get_remote_peer().extract_public_key()
        if key is None:
            raise LookupError("the key is not inlined in this PeerId")
        return key

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.link.remote

    def get_transport_addresses(self) -> list[Multiaddr]:
        return list(self.link.where)

    def get_connection_type(self) -> ConnectionType:
        return self._session.get_connection_type()


class _Noise(LibraryNoise):
    """The library's handshake, ending in a NoiseChannel."""

    def __init__(self, key_pair: KeyPair, nursery: trio.Nursery) -> None:
        super().__init__(key_pair, noise_privkey=create_x25519_key_pair().private_key)
        self._nursery = nursery

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        return self._channel(await super().secure_inbound(conn), conn)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        return self._channel(await super().secure_outbound(conn, peer_id), conn)

    def _channel(self, session: ISecureConn, raw: IRawConnection) -> NoiseChannel:
        assert isinstance(session, SecureSession)
        assert isinstance(session.conn, NoiseTransportReadWriter)
        state = session.conn.noise_state.noise_protocol
        link: Link
        if isinstance(raw, RawConnection) and isinstance(raw.stream, TrioTCPStream):
            link = TcpLink(raw.stream.stream)
        else:
            link = RawLink(raw, self._nursery)
        return NoiseChannel(session, link, state.cipher_state_encrypt.k, state.cipher_state_decrypt.k)


def security_options(key_pair: KeyPair, nursery: trio.Nursery) -> Mapping[TProtocol, _Noise]:
    """Return what a host may secure connections with: noise."""
    return {NOISE_PROTOCOL: _Noise(key_pair, nursery)}
