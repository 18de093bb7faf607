"""What the driver's error numbers (Xid) say about the health of a device.

After NVIDIA's "Analyzing Xid Errors with the Xid Catalog" and the practice of its device plugin for Kubernetes. A
number that is not listed here counts against the device: an unknown error is no reason for trust.
"""

from __future__ import annotations

from enum import StrEnum


class Blame(StrEnum):
    """Whose trouble an error is."""

    WORKSPACE = "workspace"
    """A program did it and may fail by it; the device is none the worse."""
    NOTED = "noted"
    """Of note for the owner; what it leads to shows in the device's other readings."""
    DEVICE = "device"
    """The device must not serve until it was looked at."""


_NAMES: dict[int, tuple[Blame, str]] = {
    8: (Blame.WORKSPACE, "a channel made no progress"),
    13: (Blame.WORKSPACE, "a program's kernel raised an exception"),
    31: (Blame.WORKSPACE, "a program used memory it does not have"),
    32: (Blame.WORKSPACE, "a program's command stream was damaged"),
    43: (Blame.WORKSPACE, "a program's channel was stopped"),
    45: (Blame.WORKSPACE, "a program's channel was removed after its errors"),
    48: (Blame.DEVICE, "uncorrectable memory error"),
    61: (Blame.DEVICE, "internal controller warning"),
    62: (Blame.DEVICE, "internal controller halted"),
    63: (Blame.NOTED, "a page or row was taken out of use"),
    64: (Blame.DEVICE, "a page or row could not be taken out of use"),
    68: (Blame.WORKSPACE, "a program's video decoder raised an exception"),
    69: (Blame.WORKSPACE, "a program's graphics class raised an exception"),
    74: (Blame.DEVICE, "NVLink error"),
    79: (Blame.DEVICE, "fallen off the bus"),
    92: (Blame.NOTED, "many corrected memory errors"),
    94: (Blame.WORKSPACE, "an uncorrectable memory error, contained to one program"),
    95: (Blame.DEVICE, "an uncorrectable memory error that was not contained"),
    109: (Blame.WORKSPACE, "a program's context could not be switched in time"),
    110: (Blame.DEVICE, "security fault"),
    119: (Blame.DEVICE, "the device's own processor (GSP) does not answer"),
    120: (Blame.DEVICE, "the device's own processor (GSP) failed"),
    121: (Blame.NOTED, "corrected errors on the chip-to-chip link"),
    137: (Blame.WORKSPACE, "a program's access over NVLink failed"),
    140: (Blame.DEVICE, "unrecovered memory error"),
    143: (Blame.DEVICE, "initialisation failed"),
    154: (Blame.NOTED, "the recommended recovery changed"),
}


def blame(xid: int) -> Blame:
    """Return whose trouble error number *xid* is."""
    return _NAMES.get(xid, (Blame.DEVICE, ""))[0]


def in_words(xid: int) -> str:
    """Return *xid* with what it means, for people."""
    meaning = _NAMES.get(xid, (Blame.DEVICE, ""))[1]
    return f"Xid {xid} ({meaning})" if meaning else f"Xid {xid}"
