"""Why an image is not here: one class for each cause, with what a person and a program need to know of it.

Each carries a stable `reason` for programs, a sentence for people that says what to do, and whether trying again can
help (`retry`). Registries' and engines' words end here (`from_registry`, `from_engine`): they differ between versions,
so both judge by status first and by words where the status says nothing, as the engine's 500 for nearly everything.
Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from ngpu_node.errors import NodeError

MAX_RETRY_AFTER_S = 300.0
AGAIN_S = 60.0


class ImageProblem(NodeError):
    """An image cannot be had.

    Attributes:
        reason: a stable word for programs.
        retry: whether the same may work a little later.
        after_s: how long the other side asked to be left alone, None where it did not.
    """

    reason: ClassVar[str] = "image_problem"
    retry: ClassVar[bool] = False

    def __init__(self, message: str, *, after_s: float | None = None) -> None:
        super().__init__(message)
        self.after_s = after_s

    @property
    def again_s(self) -> float | None:
        """When to try again after tries close together did not help; None for never."""
        return max(self.after_s or 0.0, AGAIN_S) if self.retry else None


class ImageMissing(ImageProblem):
    """The registry has no such image, or does not show it to whoever asks."""

    reason = "image_missing"


class PinConflict(ImageProblem):
    """The revision is pinned to a digest that its registry does not have, where it has another under the reference."""

    reason = "image_pin_conflict"


class WrongPlatform(ImageProblem):
    """The image exists, but not for this machine's processor or system."""

    reason = "image_wrong_platform"


class BadCredentials(ImageProblem):
    """The registry wants a login, or another one than was given."""

    reason = "registry_credentials"


class RegistryDown(ImageProblem):
    """The registry, or the way to it, does not work just now."""

    reason = "registry_unavailable"
    retry = True


class RateLimited(ImageProblem):
    """The registry has had enough of this machine or this login for a while."""

    reason = "registry_rate_limited"
    retry = True


class CorruptLayer(ImageProblem):
    """What arrived is not what its digest says: damaged on the way, or at the registry."""

    reason = "image_corrupt"
    retry = True


class Stalled(ImageProblem):
    """Nothing arrived for too long."""

    reason = "pull_stalled"
    retry = True


class TookTooLong(ImageProblem):
    """The whole took longer than the owner allows."""

    reason = "pull_timeout"


class WrongChecksum(ImageProblem):
    """The file behind a URL is not the one that was asked for."""

    reason = "image_wrong_checksum"


class BadArchive(ImageProblem):
    """The file behind a URL is not an image as `docker save` writes it."""

    reason = "image_bad_archive"


class BadImage(ImageProblem):
    """The registry's description of the image is not one an engine could use."""

    reason = "image_bad_manifest"


class DiskFull(ImageProblem):
    """The image does not fit beside what the owner keeps free.

    Attributes:
        needed, free, reserve: bytes.
    """

    reason = "disk_full"
    retry = True

    def __init__(self, what: str, *, needed: int, free: int, reserve: int) -> None:
        super().__init__(
            f"no room for {what}: it needs about {in_units(needed)}, {in_units(free)} are free, and the owner keeps "
            f"{in_units(reserve)} free"
        )
        self.needed, self.free, self.reserve = needed, free, reserve


class TooLarge(ImageProblem):
    """The image is larger than the owner takes."""

    reason = "image_too_large"

    def __init__(self, what: str, *, size: int, limit: int) -> None:
        super().__init__(f"{what} is too large: {in_units(size)}, of which this node's owner takes {in_units(limit)}")
        self.size, self.limit = size, limit


class TotalReached(ImageProblem):
    """All images together would be more than the owner gives them, and none of those here can go."""

    reason = "images_total"
    retry = True

    def __init__(self, what: str, *, needed: int, used: int, limit: int) -> None:
        super().__init__(
            f"no room for {what}: it needs about {in_units(needed)}, and images that are in use take {in_units(used)} "
            f"of the {in_units(limit)} the owner gives to images"
        )
        self.needed, self.used, self.limit = needed, used, limit


class RegistryNotAllowed(ImageProblem):
    """The owner does not take images from there."""

    reason = "registry_not_allowed"


class AddressNotAllowed(ImageProblem):
    """The name leads into this machine's own network, where the owner lets no client point."""

    reason = "address_not_allowed"


class NoPin(ImageProblem):
    """An image by URL without the checksum that says which file is meant."""

    reason = "image_not_pinned"


class PullBroke(ImageProblem):
    """The engine said something else; its words are in the message."""

    reason = "pull_failed"
    retry = True


def from_registry(status: int, words: str, what: str, *, logged_in: bool, after_s: float | None = None) -> ImageProblem:
    """Return what a registry's answer other than success means.

    Args:
        words: what it said, shown to people in part.
        logged_in: whether credentials were sent along.
    """
    said = f": the registry says {_shown(words)!r}" if words.strip() else ""
    if status == 404:
        return ImageMissing(f"there is no image {what}{said}; check the name, or give credentials if it is private")
    if status in (401, 403):
        return _credentials(what, said, logged_in=logged_in)
    if status == 429:
        waits = min(after_s, MAX_RETRY_AFTER_S) if after_s is not None else None
        return RateLimited(f"the registry limits how often {what} may be pulled{said}", after_s=waits)
    if status >= 500 or status == 408:
        return RegistryDown(f"the registry of {what} is out of order ({status}){said}")
    return BadImage(f"the registry of {what} answers {status}{said}")


# What the engine says, most telling first. It wraps the registry's own words, and gives 500 or 404 to most.
_ENGINE_WORDS: tuple[tuple[re.Pattern[str], type[ImageProblem]], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), problem)
    for pattern, problem in (
        (r"toomanyrequests|too many requests|429", RateLimited),
        (r"no space left on device|disk quota exceeded", DiskFull),
        (r"filesystem layer verification failed|unexpected commit digest|does not match digest|checksum|"
         r"invalid checksum|unexpected EOF.*layer|failed to register layer.*(gzip|flate|archive/tar|unexpected EOF)|"
         r"error processing tar", CorruptLayer),
        (r"no basic auth credentials|unauthorized|authentication required|incorrect username|denied", BadCredentials),
        (r"no matching manifest|does not match the specified platform|image operating system .* cannot be used",
         WrongPlatform),
        (r"manifest unknown|not found|name unknown|repository does not exist|blob unknown", ImageMissing),
        (r"unsupported media type|unsupported manifest|error parsing HTTP|invalid character|schema", BadImage),
        (r"connection refused|no such host|timeout|timed out|i/o|connection reset|no route|unreachable|EOF|"
         r"handshake|x509|received unexpected HTTP status|server misbehaving|HTTP response to HTTPS|5\d\d",
         RegistryDown),
    )
)  # fmt: skip


def from_engine(words: str, what: str, *, logged_in: bool) -> ImageProblem:
    """Return what the engine's words about a pull mean."""
    said = f": the engine says {_shown(words)!r}"
    for pattern, problem in _ENGINE_WORDS:
        if pattern.search(words) is None:
            continue
        if problem is BadCredentials:
            return _credentials(what, said, logged_in=logged_in)
        if problem is DiskFull:
            return OutOfSpace(f"the disk filled up while {what} was pulled{said}")
        return problem(f"{_ENGINE_SENTENCES[problem].format(what=what)}{said}")
    return PullBroke(f"cannot pull {what}{said}")


class OutOfSpace(ImageProblem):
    """The disk filled up under a pull that seemed to fit."""

    reason = DiskFull.reason
    retry = True


_ENGINE_SENTENCES: Mapping[type[ImageProblem], str] = {
    RateLimited: "the registry limits how often {what} may be pulled",
    CorruptLayer: "{what} arrived damaged",
    WrongPlatform: "{what} is not made for this machine",
    ImageMissing: "there is no image {what}",
    BadImage: "{what} is not an image this engine can use",
    RegistryDown: "the registry of {what} cannot be reached or is out of order",
}


def _credentials(what: str, said: str, *, logged_in: bool) -> BadCredentials:
    if logged_in:
        return BadCredentials(f"the credentials given do not open {what}{said}; check user name, password and rights")
    return BadCredentials(f"{what} does not exist or wants a login{said}; give registry credentials with the workspace")


def _shown(words: str) -> str:
    line = " ".join(words.split())
    return line if len(line) <= 200 else line[:199] + "…"


def in_units(count: int) -> str:
    """Return a number of bytes as people read it, in decimal units: `1.5 GB`."""
    units = ["B", "kB", "MB", "GB", "TB"]
    size, unit = float(count), units.pop(0)
    while size >= 999.5 and units:
        size, unit = size / 1000, units.pop(0)
    return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.3g} {unit}"
