"""The root of what the pure protocol modules raise, split by whose fault it is.

`ValueError` stands for misuse by our own code (a number out of range, a digest that is not 32 bytes); the classes
here stand for what others sent or an operator wrote. Each class carries fields a log line can use, not only text.
"""

from __future__ import annotations


class ProtocolError(Exception):
    """Something that came from outside does not follow the protocol."""


class MalformedError(ProtocolError):
    """Bytes from a peer do not decode; the only exception a decoder lets out, whatever it was given.

    Attributes:
        what: the thing that was being decoded, such as ``"order"``.
        detail: what is wrong with it, fit for the peer to read.
    """

    def __init__(self, what: str, detail: str) -> None:
        super().__init__(f"malformed {what}: {detail}")
        self.what = what
        self.detail = detail


class SignatureError(ProtocolError):
    """A signature has the wrong form or no key recovers from it."""


class AddressError(ProtocolError):
    """A text or byte string is not an account address, public key or PeerId of this protocol."""


class NetworkNameError(ProtocolError):
    """A configured network name cannot be used (the operator's to mend)."""
