"""How one revision of a workspace takes the place of another on a node. Pure.

The bootstrap wishes for one revision. While it comes up, the one before goes on serving where there is room for both;
where there is not, and its leaving would make enough, it makes room. When the new one is ready the old one goes; when
the new one failed, the old one serves on, and comes back if it had made room.

Only what has served is kept: of several old ones the newest, and none that never got so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ngpu_protocol.control import DeploymentPhase as Phase


@dataclass(frozen=True, slots=True)
class RevisionState:
    """How one revision stands.

    Attributes:
        is_wished: the bootstrap wants it.
        served: it was ready once.
        would_fit_alone: it waits for room, and there is enough if the other revisions of its workspace leave.
        made_room: it was withdrawn for its successor.
    """

    revision: int
    phase: Phase
    is_wished: bool
    served: bool = False
    would_fit_alone: bool = False
    made_room: bool = False


@dataclass(frozen=True, slots=True)
class Stop:
    """*revision* shall go for good."""

    revision: int
    reason: str


@dataclass(frozen=True, slots=True)
class MakeRoom:
    """*revision* shall leave the machine until its successor failed."""

    revision: int
    successor: int


@dataclass(frozen=True, slots=True)
class TakeBack:
    """*revision* shall serve again."""

    revision: int


Step = Stop | MakeRoom | TakeBack


def settle(workspace: Sequence[RevisionState]) -> list[Step]:
    """Return what to do now with the revisions of one workspace; those that are going are not in it."""
    wished = [one for one in workspace if one.is_wished]
    others = sorted((one for one in workspace if not one.is_wished), key=lambda one: one.revision)
    if not wished:
        return [Stop(one.revision, "no longer wanted") for one in others]
    new = max(wished, key=lambda one: one.revision)
    if new.phase is Phase.READY:
        return [Stop(one.revision, f"revision {new.revision} took its place") for one in others]
    serving = [one for one in others if one.served]
    kept = serving[-1] if serving else None
    steps: list[Step] = [
        Stop(one.revision, f"revision {new.revision} is to take its place") for one in others if one is not kept
    ]
    if kept is not None:
        if new.phase is Phase.FAILED and kept.made_room:
            steps.append(TakeBack(kept.revision))
        elif new.would_fit_alone and not kept.made_room:
            steps.append(MakeRoom(kept.revision, new.revision))
    return steps
