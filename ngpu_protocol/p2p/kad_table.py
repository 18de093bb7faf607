"""Whom a peer knows of the DHT: Kademlia's k-buckets (Maymounkov and Mazieres, 2002).

Bucket *i* holds up to 20 peers whose position shares exactly *i* leading bits with ours, so the table knows many
neighbours and few of the far side, and stays below 20 log2(n / 20) entries. Who is there stays: a new peer enters a
full bucket only when one of those in it has failed, since peers that have been up long are the likeliest to stay up.

Invariant: every entry answered a call of ours at an address this host dialled itself. That keeps out peers that
cannot be dialled (they would be asked for keys nobody can read), and whatever a hostile answer makes up. Of one
bucket, at most 2 entries share a public IPv4 /24 or IPv6 /48, so that one site cannot fill it with ground PeerIds;
private and loopback addresses are exempt, as a network of one's own lives on them.

Not the library's `RoutingTable`: that takes anybody who opens a stream, splits every full bucket until it holds whole
networks, hashes all of them for each question, and pings a bucket's oldest peer for up to 10 s with the bucket locked.

Pure.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from ngpu_protocol.p2p.kad_messages import KadPeer, kad_position, multiaddr_text

__all__ = ["BUCKET_SIZE", "Contact", "KadTable"]

BUCKET_SIZE = 20
_POSITION_BITS = 256
_PER_SUBNET = 2
_SUBNET_BITS = {4: 24, 6: 48}


@dataclass(slots=True)
class Contact:
    """An entry.

    Attributes:
        position: where the peer lies in the keyspace.
        subnet: its public subnet, empty when exempt.
        heard_s: when it last answered, monotonic.
        failed: the last call to it did not work.
    """

    peer: KadPeer
    position: int
    subnet: str
    heard_s: float
    failed: bool = False


class KadTable:
    """The buckets of one peer."""

    def __init__(self, own_id: bytes) -> None:
        self._own_id = own_id
        self._own = kad_position(own_id)
        self._buckets: dict[int, list[Contact]] = {}
        self._contacts: dict[bytes, Contact] = {}

    def __len__(self) -> int:
        return len(self._contacts)

    def __contains__(self, peer_id: bytes) -> bool:
        return peer_id in self._contacts

    def contacts(self) -> list[Contact]:
        """Return all entries, the closest to ourselves first."""
        return sorted(self._contacts.values(), key=lambda contact: contact.position ^ self._own)

    def get(self, peer_id: bytes) -> KadPeer | None:
        """Return the entry's peer."""
        contact = self._contacts.get(peer_id)
        return None if contact is None else contact.peer

    def closest(self, position: int, count: int = BUCKET_SIZE) -> list[KadPeer]:
        """Return up to *count* peers, the closest to *position* first."""
        nearest = heapq.nsmallest(count, self._contacts.values(), key=lambda contact: contact.position ^ position)
        return [contact.peer for contact in nearest]

    def has_room_for(self, peer_id: bytes) -> bool:
        """Whether `heard` could take the peer in, so that trying it out is worth a dial."""
        bucket = self._buckets.get(self._bucket_of(kad_position(peer_id)), ())
        return peer_id not in self._contacts and (len(bucket) < BUCKET_SIZE or any(other.failed for other in bucket))

    def heard(self, peer: KadPeer, now_s: float) -> bool:
        """Note that *peer* answered at its addresses; True if it is in the table now."""
        if peer.id == self._own_id or not peer.addresses:
            return False
        contact = self._contacts.get(peer.id)
        if contact is not None:
            contact.peer, contact.heard_s, contact.failed = peer, now_s, False
            return True
        position = kad_position(peer.id)
        index = self._bucket_of(position)
        bucket = self._buckets.setdefault(index, [])
        subnet = public_subnet(peer.addresses)
        if subnet and sum(other.subnet == subnet for other in bucket) >= _PER_SUBNET:
            return False
        if len(bucket) >= BUCKET_SIZE:
            lost = next((other for other in bucket if other.failed), None)
            if lost is None:
                return False
            self.remove(lost.peer.id)
        contact = Contact(peer, position, subnet, now_s)
        self._buckets.setdefault(index, []).append(contact)
        self._contacts[peer.id] = contact
        return True

    def answered(self, peer_id: bytes, now_s: float) -> bool:
        """Note that an entry answered, wherever; False if the peer is none."""
        contact = self._contacts.get(peer_id)
        if contact is None:
            return False
        contact.heard_s, contact.failed = now_s, False
        return True

    def failed(self, peer_id: bytes) -> None:
        """Note that a call to the peer did not work: the second time in a row it goes, whatever else there is."""
        contact = self._contacts.get(peer_id)
        if contact is None:
            return
        if contact.failed:
            self.remove(peer_id)
        contact.failed = True

    def remove(self, peer_id: bytes) -> None:
        """Forget the peer."""
        contact = self._contacts.pop(peer_id, None)
        if contact is not None:
            index = self._bucket_of(contact.position)
            self._buckets[index].remove(contact)
            if not self._buckets[index]:
                del self._buckets[index]

    def buckets(self) -> list[tuple[int, int]]:
        """Return ``(shared leading bits, entries)`` of each bucket that has any."""
        return sorted((index, len(bucket)) for index, bucket in self._buckets.items())

    def _bucket_of(self, position: int) -> int:
        return _POSITION_BITS - (position ^ self._own).bit_length()


def public_subnet(addresses: tuple[bytes, ...]) -> str:
    """Return the subnet of the first public address, empty when there is none."""
    for address in addresses:
        parts = (multiaddr_text(address) or "").split("/")
        if len(parts) < 3 or parts[1] not in ("ip4", "ip6") or "p2p-circuit" in parts:
            continue
        try:
            ip = ip_address(parts[2])
        except ValueError:
            continue
        if ip.is_global:
            return str(ip_network(f"{ip}/{_SUBNET_BITS[ip.version]}", strict=False))
    return ""
