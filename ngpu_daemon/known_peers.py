"""Peers to begin from after a restart, in a file of the data directory: multiaddrs, and nothing else about them.

What stands there is a hint: the handshake proves who answers. A file that cannot be read counts as empty.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import structlog

__all__ = ["KnownPeers"]

log = structlog.get_logger(__name__)

MAX_PEERS = 64
MAX_FILE_BYTES = 64 * 1024
MAX_ADDRESS_CHARS = 256


class KnownPeers:
    """The file and what it holds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held = self._read()

    @property
    def multiaddrs(self) -> tuple[str, ...]:
        """What was remembered last."""
        return self._held

    def remember(self, multiaddrs: Iterable[str]) -> None:
        """Keep *multiaddrs*, the first ones when there are too many. Kept as they were when there are none at all:
        a peer that lost everybody must not forget where it found them.
        """
        held = tuple(dict.fromkeys(text for text in multiaddrs if _is_one(text)))[:MAX_PEERS]
        if not held or held == self._held:
            return
        beside = self._path.with_suffix(".new")
        try:
            beside.write_text(json.dumps(held, indent=0) + "\n")
            os.replace(beside, self._path)
        except OSError as error:
            log.warning("peers_not_remembered", path=str(self._path), reason=error.strerror)
            return
        self._held = held

    def _read(self) -> tuple[str, ...]:
        try:
            with self._path.open("rb") as file:
                values = json.loads(file.read(MAX_FILE_BYTES))
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, RecursionError) as error:
            log.warning("known_peers_unreadable", path=str(self._path), reason=str(error)[:200])
            return ()
        if not isinstance(values, list):
            return ()
        return tuple(dict.fromkeys(text for text in values if _is_one(text)))[:MAX_PEERS]


def _is_one(text: object) -> bool:
    return isinstance(text, str) and len(text) <= MAX_ADDRESS_CHARS and text.startswith("/") and "/p2p/" in text
