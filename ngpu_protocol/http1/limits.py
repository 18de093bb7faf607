"""What one HTTP/1.1 connection may cost us.

Every limit is checked before memory is taken for what it bounds. Sizes are bytes on the wire, times are seconds.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a server's connections; the head bounds hold for a client's answers as well.

    Attributes:
        max_head_bytes: Start line and header fields together (answer: 431).
        max_target_bytes: The request target alone (answer: 414).
        max_headers: Header fields of one message (answer: 431); also the fields of one trailer section.
        max_body_bytes: Decoded request body, None for no bound (answer: 413). A handler may set its exchange's own.
        head_timeout_s: From a request's first byte to the end of its head (answer: 408). Ends a slowloris.
        idle_timeout_s: Between two requests, and before the first.
        stall_timeout_s: One read of a body, or one write, that makes no progress.
        max_connections: Connections of one listener; above it the longest idle one goes, else the new one gets 503.
    """

    max_head_bytes: int = 32 * 1024
    max_target_bytes: int = 8 * 1024
    max_headers: int = 100
    max_body_bytes: int | None = None
    head_timeout_s: float = 10.0
    idle_timeout_s: float = 75.0
    stall_timeout_s: float = 120.0
    max_connections: int = 1024
