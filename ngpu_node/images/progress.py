"""How far a pull is, from what the engine tells of its layers.

The engine tells of each layer by the first 12 digits of its blob's digest, and of a layer that waits not how large it
is: sizes come from the manifest, before. Then::

    fraction = 0.8 * downloaded bytes / all + 0.2 * unpacked bytes / all        of the compressed sizes
    percent  = floor(100 * fraction), at most 99 until the digest is confirmed

It never goes back: the engine starts a layer again after a broken connection, and this counts the furthest it was. A
rate is measured over the last `WINDOW_S` of movement, so seconds left follow the network of now. Pure; one thread at a
time feeds it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ngpu_node.images.problems import in_units

DOWNLOAD_WEIGHT = 0.8
UNPACK_WEIGHT = 0.2
WINDOW_S = 15.0
SHORT_DIGEST = 12


@dataclass(frozen=True, slots=True)
class Progress:
    """One look at a pull.

    Attributes:
        percent: 0 to 100; 100 only once the image is here and its digest confirmed.
        bytes_done: downloaded of what was missing.
        bytes_total: what was missing, 0 while that is unknown.
        seconds_left: by the rate of the last seconds; None while there is none.
        note: what happens now, where it is not plain downloading.
        reason: a stable word, where what happens is waiting after a failure.
    """

    percent: int = 0
    bytes_done: int = 0
    bytes_total: int = 0
    seconds_left: int | None = None
    note: str = ""
    reason: str = ""

    def sentence(self, what: str) -> str:
        """Return it for people; *what* is being fetched."""
        if self.note:
            return self.note
        if not self.bytes_total:
            return f"pulling {what}"
        left = f", about {self.seconds_left} s left" if self.seconds_left is not None else ""
        return f"pulling {what}: {in_units(self.bytes_done)} of {in_units(self.bytes_total)}{left}"


@dataclass(slots=True)
class _Layer:
    size: int
    downloaded: int = 0
    unpacked: int = 0


class PullProgress:
    """The account of one pull, over all its tries.

    Attributes:
        moved: counts whatever brought the pull forward; stands still when it is stalled.
        unpacking: whether everything is downloaded and only unpacking is left.
    """

    def __init__(self, sizes: Mapping[str, int] | None) -> None:
        """Begin.

        Args:
            sizes: bytes of each layer by its digest `sha256:…`; None when the registry could not be asked, and the
                total grows as the engine tells of layers.
        """
        self._layers = {_short(digest): _Layer(size) for digest, size in (sizes or {}).items()}
        self._sizes_known = sizes is not None
        self._furthest = 0.0
        self._done = 0
        self._total = 0
        self._marks: deque[tuple[float, float]] = deque(maxlen=256)
        self.moved = 0

    def feed(self, event: Mapping[str, Any]) -> None:
        """Take in one event of the engine's stream; what is no layer's is ignored."""
        name, status = event.get("id"), event.get("status")
        if not isinstance(name, str) or not isinstance(status, str):
            return
        layer = self._layers.get(name)
        detail = event.get("progressDetail")
        current, total = _numbers(detail) if isinstance(detail, Mapping) else (0, 0)
        if layer is None:
            if self._sizes_known or total <= 0 or status != "Downloading":
                return
            layer = self._layers[name] = _Layer(total)
        before = (layer.downloaded, layer.unpacked)
        if status == "Downloading":
            layer.downloaded = max(layer.downloaded, min(current, layer.size))
        elif status in ("Verifying Checksum", "Download complete"):
            layer.downloaded = layer.size
        elif status == "Extracting":
            layer.downloaded = layer.size
            layer.unpacked = max(layer.unpacked, min(current, layer.size))
        elif status in ("Pull complete", "Already exists"):
            layer.downloaded = layer.unpacked = layer.size
        if before != (layer.downloaded, layer.unpacked):
            self.moved += 1

    def downloaded(self, count: int, total: int) -> None:
        """Take in that *count* of *total* bytes of an only file are here; 0 where the total is unknown."""
        layer = self._layers.setdefault("", _Layer(max(count, total)))
        layer.size = max(layer.size, count)
        if count > layer.downloaded:
            layer.downloaded = count
            self.moved += 1

    @property
    def unpacking(self) -> bool:
        return bool(self._layers) and all(layer.downloaded >= layer.size for layer in self._layers.values())

    @property
    def total(self) -> int:
        return sum(layer.size for layer in self._layers.values())

    def look(self, now_s: float, note: str = "") -> Progress:
        """Return how far it is at *now_s* of a monotonic clock, which never goes back between looks."""
        total = self.total
        done = sum(layer.downloaded for layer in self._layers.values())
        unpacked = sum(layer.unpacked for layer in self._layers.values())
        self._done, self._total = max(self._done, done), max(self._total, total)
        if total:
            fraction = DOWNLOAD_WEIGHT * done / total + UNPACK_WEIGHT * unpacked / total
            self._furthest = max(self._furthest, min(fraction, 1.0))
        percent = min(99, int(100 * self._furthest + 1e-9))
        return Progress(percent, self._done, self._total, self._seconds_left(now_s), note)

    def _seconds_left(self, now_s: float) -> int | None:
        if not self._marks or self._marks[-1][1] < self._furthest:
            self._marks.append((now_s, self._furthest))
        while len(self._marks) > 2 and now_s - self._marks[1][0] > WINDOW_S:
            self._marks.popleft()
        began_s, began = self._marks[0]
        gained = self._furthest - began
        if gained <= 0 or now_s - began_s < 1.0:
            return None
        return int((1.0 - self._furthest) * (now_s - began_s) / gained) + 1


def _short(digest: str) -> str:
    return digest.partition(":")[2][:SHORT_DIGEST]


def _numbers(detail: Mapping[str, Any]) -> tuple[int, int]:
    current, total = detail.get("current"), detail.get("total")
    return (current if isinstance(current, int) else 0, total if isinstance(total, int) else 0)
