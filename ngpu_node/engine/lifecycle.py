"""The life of one deployment that is an image: what happened goes in, what to do next comes out. Pure.

One thing is done at a time, an *activity*; its result, and whatever else happens meanwhile, are *events*. `Life.on`
takes an event and returns the activity that takes the place of the running one, or None to go on with it. The shell
(`containers`) performs activities, with the engine, and never decides.

    phase      what is done                          leaves it
    queued     Rest until there is room,             RoomChanged, Allowed, EngineBack
               or the owner allows it
    pulling    Fetch                                 ImageHere, ImageRefused
    starting   Place, then Ask; or Rest after a      Answered; death: Clear, Rest a growing while, Fetch again;
               death                                 after max_deaths in a row: failed
    ready      Ask now and then                      Silent; death; GpuSick: Clear, and at once again
    unhealthy  Ask                                   Answered; silent for too long is death
    failed     Rest                                  Unwanted (RoomChanged, where only room was wanting)
    stopping   Empty: the last tasks end; Clear      Cleared: gone, or queued where it was only withdrawn
    gone       nothing, ever

Deaths in a row count while none of the containers was ready for `stable_s`. What is not the workspace's fault does not
count: a sick GPU, an engine that stopped. An engine that is away is waited for; what was being done is done again when
it is back, and every `engine_wait_s`: one call may fail with an engine that never went away, of which nobody says that
it is back. Room, and the GPUs in it, are only given back when the engine said that the container is gone.
"""

from __future__ import annotations

from dataclasses import dataclass

from ngpu_protocol.control import DeploymentPhase as Phase


@dataclass(frozen=True, slots=True)
class Policy:
    """How patient a node is.

    Attributes:
        restart_waits_s: after the first death in a row, the second, ...; the last for all later ones.
        max_deaths: of so many in a row the last is final.
        engine_wait_s: what the engine did not do is tried again after this, unless it is known to be back before.
        stop_grace_s: how long the last tasks of what shall stop may go on.
    """

    readiness_wait_s: float = 0.05
    readiness_wait_max_s: float = 2.0
    health_interval_s: float = 10.0
    doubt_interval_s: float = 2.0
    unhealthy_limit_s: float = 60.0
    stable_s: float = 60.0
    restart_waits_s: tuple[float, ...] = (1.0, 2.0, 5.0, 15.0, 30.0)
    max_deaths: int = 5
    engine_wait_s: float = 30.0
    stop_grace_s: float = 30.0


# -- activities --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fetch:
    """Have the image on the engine. Ends with `ImageHere`, `ImageRefused` or `EngineLost`."""


@dataclass(frozen=True, slots=True)
class Place:
    """Take room, adopt a container or start one. Ends with `Up`, `NoRoom`, `StartRefused`, `Impossible`, ..."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask for an HTTP answer in *after_s*. Ends with `Answered`, `Silent`, `GpuSick` or `EngineLost`."""

    after_s: float


@dataclass(frozen=True, slots=True)
class Empty:
    """Let the last tasks end, for *grace_s* at most. Ends with `Emptied`."""

    grace_s: float


@dataclass(frozen=True, slots=True)
class Clear:
    """Stop and remove the container, then give back its room. Ends with `Cleared` or `EngineLost`."""


@dataclass(frozen=True, slots=True)
class Rest:
    """Do nothing until an event; ends with `Due` after *for_s*, where that is given."""

    for_s: float | None = None


@dataclass(frozen=True, slots=True)
class End:
    """It is over."""


Activity = Fetch | Place | Ask | Empty | Clear | Rest | End


# -- events ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pulling:
    """The image has to be fetched; *detail* says how far it is, *word* what is in the way."""

    detail: str
    word: str = ""


@dataclass(frozen=True, slots=True)
class ImageHere:
    """The image is on the engine."""


@dataclass(frozen=True, slots=True)
class ImageRefused:
    """There is no image, for a *reason*; *again_s* says when to try again, None for never."""

    reason: str
    again_s: float | None = None
    word: str = "image_unavailable"


@dataclass(frozen=True, slots=True)
class NoRoom:
    """This node has too little of something; *ever*: it has enough when others leave."""

    reason: str
    ever: bool


@dataclass(frozen=True, slots=True)
class Up:
    """A container runs. *readiness_timeout_s* is how long it may take to answer."""

    readiness_timeout_s: float


@dataclass(frozen=True, slots=True)
class StartRefused:
    """The engine did not start it; it may another time."""

    reason: str


@dataclass(frozen=True, slots=True)
class Impossible:
    """This node will not run it; *until_engine_back*: unless its engine, or its packet filter, is mended."""

    reason: str
    word: str = "not_possible_here"
    until_engine_back: bool = False


@dataclass(frozen=True, slots=True)
class Answered:
    """The workspace answered HTTP."""


@dataclass(frozen=True, slots=True)
class Silent:
    """It did not; *problem* says how."""

    problem: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The container ended. *is_fault* says whether that speaks against the workspace."""

    reason: str
    is_fault: bool = True
    word: str = "exited"


@dataclass(frozen=True, slots=True)
class GpuSick:
    """A device it holds must not be used any more."""

    reason: str


@dataclass(frozen=True, slots=True)
class EngineLost:
    """What was being done could not be: the engine does not answer."""

    reason: str


@dataclass(frozen=True, slots=True)
class EngineBack:
    """The engine answers again, or what else this machine could not do it can."""


@dataclass(frozen=True, slots=True)
class RoomChanged:
    """Others gave something back, or the usable GPUs are others."""


@dataclass(frozen=True, slots=True)
class Doubted:
    """A request could not reach it: ask now."""


@dataclass(frozen=True, slots=True)
class Due:
    """A rest is over."""


@dataclass(frozen=True, slots=True)
class Emptied:
    """No task runs on it any more, or the grace is over."""


@dataclass(frozen=True, slots=True)
class Cleared:
    """Nothing of it is left on the engine."""


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """It shall leave the machine for now, for a *reason*, and come back when `Allowed`."""

    reason: str
    word: str = "withdrawn"


@dataclass(frozen=True, slots=True)
class Allowed:
    """It may come back."""


@dataclass(frozen=True, slots=True)
class Unwanted:
    """It shall go for good."""

    reason: str = "no longer wanted"


Event = (
    Pulling | ImageHere | ImageRefused | NoRoom | Up | StartRefused | Impossible | Answered | Silent | Ended | GpuSick
    | EngineLost | EngineBack | RoomChanged | Doubted | Due | Emptied | Cleared | Withdrawn | Allowed | Unwanted
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Then:
    """What follows a `Clear`: a rest of *wait_s* (None: for good) and another start, or the end as failed."""

    phase: Phase
    detail: str
    wait_s: float | None = 0.0
    word: str = ""


_AGAIN = _Then(Phase.STARTING, "")


class Life:
    """Where one deployment stands.

    Attributes:
        phase, detail: for the heartbeat and for people.
        word: the stable one for why it is not ready, empty where all goes well (`control.DeploymentState.reason`).
        activity: what is being done.
        served: it was ready once.
        lacks_room: it waits for others to leave.
    """

    def __init__(self, policy: Policy) -> None:
        self.phase = Phase.QUEUED
        self.detail = ""
        self.word = ""
        self.activity: Activity = Fetch()
        self.served = False
        self.lacks_room = False
        self._policy = policy
        self._deaths = 0
        self._ready_since_s: float | None = None
        self._last_answer_s = 0.0
        self._ready_by_s = 0.0
        self._readiness_timeout_s = 0.0
        self._wait_s = policy.readiness_wait_s
        self._may_exist = False
        self._again_with_engine = False
        self._then = _AGAIN
        self._waits_for_engine: Activity | None = None
        self._withdrawn = ""
        self._withdrawn_word = ""
        self._unwanted = ""

    def on(self, event: Event, now_s: float) -> Activity | None:
        """Take in *event* and return the activity that replaces the running one, None to go on with it."""
        found = self._on(event, now_s)
        if found is not None:
            self.activity = found
            if not isinstance(event, EngineLost):
                self._waits_for_engine = None
        return found

    def _on(self, event: Event, now_s: float) -> Activity | None:
        if self.phase is Phase.GONE:
            return None
        match event:
            case Unwanted(reason):
                self._unwanted = self._unwanted or reason
                return self._leave(reason)
            case Withdrawn(reason, word):
                is_news, self._withdrawn, self._withdrawn_word = not self._withdrawn, reason, word
                return self._leave(reason) if is_news or self.phase is Phase.QUEUED else None
            case Allowed():
                return self._allowed()
            case EngineBack():
                return self._engine_back()
            case Due() if self._waits_for_engine is not None:
                return self._engine_back()
            case EngineLost(reason):
                return self._engine_lost(reason)
            case Cleared():
                return self._cleared()
            case Emptied():
                return Clear() if isinstance(self.activity, Empty) else None
            case Ended() | GpuSick() if not self._may_exist or isinstance(self.activity, Clear):
                return None
            case Ended() | GpuSick() if self._is_leaving:
                return Clear()
            case Ended(reason, is_fault, word):
                return self._death(reason, word, now_s) if is_fault else self._blameless(reason, word)
            case GpuSick(reason):
                return self._blameless(reason, "gpu_sick")
        if self._is_leaving:
            return None
        return self._on_the_way_up(event, now_s)

    def _on_the_way_up(self, event: Event, now_s: float) -> Activity | None:
        match event:
            case Pulling(detail, word):
                return self._say(Phase.PULLING, detail, word=word)
            case ImageHere():
                self._say(Phase.STARTING, "starting the container")
                self._may_exist = True
                return Place()
            case ImageRefused(reason, None, word):
                return self._say(Phase.FAILED, reason, Rest(), word=word)
            case ImageRefused(reason, again_s, word):
                detail = f"{reason}; trying again in {again_s:g} s"
                return self._say(Phase.PULLING, detail, Rest(again_s), word=word)
            case NoRoom(reason, ever):
                self._may_exist = False
                self.lacks_room = True
                return self._say(Phase.QUEUED if ever else Phase.FAILED, reason, Rest(), word="no_room")
            case Impossible(reason, word, until_engine_back):
                self._then = _Then(Phase.FAILED, reason, None, word)
                self._again_with_engine = until_engine_back
                return Clear()
            case StartRefused(reason):
                return self._death(reason, "start_refused", now_s)
            case RoomChanged():
                return self._from_the_beginning() if self.lacks_room else None
            case Due():
                return self._from_the_beginning() if isinstance(self.activity, Rest) else None
            case Up(timeout_s):
                self._readiness_timeout_s, self._ready_by_s = timeout_s, now_s + timeout_s
                self._wait_s = self._policy.readiness_wait_s
                return Ask(0.0)
            case Doubted():
                return Ask(0.0) if self.phase is Phase.READY and isinstance(self.activity, Ask) else None
            case Answered():
                self.served = True
                self._last_answer_s = now_s
                if self._ready_since_s is None:
                    self._ready_since_s = now_s
                return self._say(Phase.READY, "", Ask(self._policy.health_interval_s))
            case Silent(problem):
                return self._silent(problem, now_s)
        return None

    # -- steps ---------------------------------------------------------------------------------------------------------

    @property
    def _is_leaving(self) -> bool:
        return bool(self._unwanted or self._withdrawn)

    def _say(self, phase: Phase, detail: str, activity: Activity | None = None, *, word: str = "") -> Activity | None:
        self.phase, self.detail, self.word = phase, detail, word
        return activity

    def _from_the_beginning(self) -> Activity:
        self.lacks_room = self._again_with_engine = False
        return Fetch()

    def _silent(self, problem: str, now_s: float) -> Activity | None:
        if self._ready_since_s is None:
            if now_s >= self._ready_by_s:
                reason = f"not ready within {self._readiness_timeout_s:g} s: {problem}"
                return self._death(reason, "never_answered", now_s)
            wait_s, self._wait_s = self._wait_s, min(self._wait_s * 1.5, self._policy.readiness_wait_max_s)
            return self._say(Phase.STARTING, f"waiting for an answer: {problem}", Ask(wait_s))
        limit_s = self._policy.unhealthy_limit_s
        if now_s - self._last_answer_s >= limit_s:
            return self._death(f"no answer for {limit_s:g} s: {problem}", "no_answer", now_s)
        return self._say(Phase.UNHEALTHY, problem, Ask(self._policy.doubt_interval_s), word="no_answer")

    def _death(self, reason: str, word: str, now_s: float) -> Activity:
        was_stable = self._ready_since_s is not None and now_s - self._ready_since_s >= self._policy.stable_s
        self._deaths = 1 if was_stable else self._deaths + 1
        if self._deaths >= self._policy.max_deaths:
            self._then = _Then(Phase.FAILED, f"given up after {self._deaths} starts: {reason}", None, word)
        else:
            waits = self._policy.restart_waits_s
            wait_s = waits[min(self._deaths, len(waits)) - 1]
            self._then = _Then(Phase.STARTING, f"{reason}; starting again in {wait_s:g} s", wait_s, word)
        self._say(Phase.STARTING, reason, word=word)
        return Clear()

    def _blameless(self, reason: str, word: str) -> Activity:
        self._then = _Then(Phase.STARTING, reason, word=word)
        self._say(Phase.STARTING, reason, word=word)
        return Clear()

    def _leave(self, reason: str) -> Activity | None:
        if not self._may_exist:
            return self._left()
        if self._unwanted or self.phase is not Phase.STOPPING:
            self._say(Phase.STOPPING, self._unwanted or reason)
        if isinstance(self.activity, Clear | Empty) or self._waits_for_engine is not None:
            # what waits for the engine may have a container there, which has to be cleared when it is back
            self._waits_for_engine = Clear() if self._waits_for_engine is not None else None
            return None
        return Empty(self._policy.stop_grace_s)

    def _left(self) -> Activity:
        self._waits_for_engine = None
        self._then = _AGAIN
        self._deaths = 0
        self.lacks_room = False
        if self._unwanted:
            self._say(Phase.GONE, self._unwanted)
            return End()
        self._say(Phase.QUEUED, self._withdrawn, word=self._withdrawn_word)
        return Rest()

    def _allowed(self) -> Activity | None:
        if not self._withdrawn:
            return None
        self._withdrawn = ""
        if self._unwanted:
            return None
        if not self._may_exist:
            return self._from_the_beginning()
        # its container is still there: while its last tasks were ending, it is taken back as it is
        return Ask(0.0) if isinstance(self.activity, Empty) else None

    def _cleared(self) -> Activity | None:
        if not isinstance(self.activity, Clear):
            return None
        self._may_exist = False
        self._ready_since_s = None
        if self._is_leaving:
            return self._left()
        then, self._then = self._then, _AGAIN
        self._say(then.phase, then.detail or self.detail, word=then.word or self.word)
        if then.wait_s is None:
            return Rest()
        return Rest(then.wait_s) if then.wait_s else self._from_the_beginning()

    def _engine_lost(self, reason: str) -> Activity | None:
        if isinstance(self.activity, Ask):
            # only its look at the GPUs needs the engine; whether the workspace still answers is asked as before
            return Ask(self._policy.health_interval_s)
        if not isinstance(self.activity, Fetch | Place | Clear):
            return None
        # a start that was cut off may have left a container: clear first, under a name that is ours
        self._waits_for_engine = self.activity
        if self.phase is not Phase.STOPPING:
            self._say(Phase.UNHEALTHY if self._ready_since_s is not None else Phase.QUEUED, reason, word="engine_away")
        return Rest(self._policy.engine_wait_s)

    def _engine_back(self) -> Activity | None:
        again, self._waits_for_engine = self._waits_for_engine, None
        if again is None and self._again_with_engine and self.phase is Phase.FAILED:
            return self._from_the_beginning()
        return again
