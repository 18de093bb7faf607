"""Networks: one name decides everything that keeps signatures, records and greetings of two networks apart.

The chain id of a network is derived from its name, for the well-known names as for one's own, so there is no registry
to
keep: the first 6 bytes of keccak-256 of ``ngpu network <name>`` as a big-endian number. 48 bits stay exact in a
    JavaScript number and far from the ids of real chains, where these signatures must mean nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from ngpu_protocol.errors import NetworkNameError
from ngpu_protocol.identity import keccak

_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True)
class Network:
    """A network's constants.

    Attributes:
        name: as configured and said in the hello: ``main``, ``test``, ``local`` or one's own.
        chain_id: the chainId of the EIP-712 domain, below 2**48.
        kad_prefix: ``/ngpu/<name>``, to which the DHT appends ``/kad/1.0.0``.
    """

    name: str
    chain_id: int
    kad_prefix: str

    @property
    def kad_protocol(self) -> str:
        """The whole libp2p protocol id of the network's DHT."""
        return f"{self.kad_prefix}/kad/1.0.0"


@lru_cache(maxsize=64)
def network_named(name: str) -> Network:
    """Return the network called *name*.

    Raises:
        NetworkNameError: unless it is 1 to 32 lower-case letters, digits and hyphens, beginning with a letter.
    """
    if _NAME.fullmatch(name) is None:
        raise NetworkNameError(
            f"network {name[:64]!r}: use 1 to 32 lower-case letters, digits and hyphens, beginning with a letter"
        )
    chain_id = int.from_bytes(keccak(f"ngpu network {name}".encode())[:6], "big")
    return Network(name=name, chain_id=chain_id, kad_prefix=f"/ngpu/{name}")
