"""What a node did before: how long its tasks took, how often they failed, and when it is set aside for that.

Times are averaged as logarithms, since service times have heavy tails and one long task says little about a node; the
average of a node is drawn towards its workspace's until there are enough of its own (`PRIOR_TASKS`). Failures are an
exponentially weighted rate. Both fade with time: a node that is passed over for what it did can show nothing better,
and would be passed over for ever. A node whose rate passes `FAILING` is set aside, for `FIRST_PAUSE_MS` at first and
twice as long each time; then it gets one task at a time until one succeeds. Pure: time and chance are arguments.
"""

from __future__ import annotations

import enum
import math

TIME_WEIGHT = 1 / 32
"""Of the newest task in a node's average; the workspace's own average moves at half of it."""
PRIOR_TASKS = 16
"""A node's own average counts as much as its workspace's after so many tasks."""
FAILURE_WEIGHT = 0.2
FAILING = 0.5
"""A rate beyond this sets a node aside: four failures in a row after none, or every second over a while."""
FIRST_PAUSE_MS = 1_000
LAST_PAUSE_MS = 300_000
PAUSE_SPREAD = 0.2
"""Pauses differ by up to this share, so that bootstraps do not all come back at once."""
FAILURE_HALF_LIFE_MS = 30_000
SPEED_HALF_LIFE_MS = 600_000
CALM_TASKS = 16
"""After so many successes in a row the next pause is a first one again."""
FIRST_GUESS_S = 1.0
"""How long a task of a workspace is thought to take before one has ended."""
_SHORTEST_S = 0.001


class Fared(enum.Enum):
    """What an attempt says about where it ran."""

    WELL = enum.auto()
    """The workspace answered."""
    DEPLOYMENT_FAILED = enum.auto()
    """The workspace broke, or was too slow."""
    NODE_FAILED = enum.auto()
    """The node was lost, refused what it should take, or lied in its receipt."""
    NO_MATTER = enum.auto()
    """It says nothing: the client left, or the node was merely full."""


class ServiceTimes:
    """The moving average of a workspace's service times, over all nodes."""

    __slots__ = ("log_s", "tasks")

    def __init__(self) -> None:
        self.log_s = math.log(FIRST_GUESS_S)
        self.tasks = 0

    @property
    def typical_s(self) -> float:
        """The geometric mean of late."""
        return math.exp(self.log_s)

    def took(self, log_s: float) -> None:
        """Take in a task's time, as a logarithm."""
        self.tasks += 1
        self.log_s += (log_s - self.log_s) * max(TIME_WEIGHT / 2, 1 / self.tasks)


class Trouble:
    """How often something fails, and until when it is set aside.

    Attributes:
        rate: of failures, 0 to 1.
        until_ms: set aside until then; 0 when it is not.
        pause_ms: the last pause, from which the next is made; 0 when the next is a first one.
        probing: back from a pause, and nothing has succeeded since.
    """

    __slots__ = ("_at_ms", "_calm", "pause_ms", "probing", "rate", "until_ms")

    def __init__(self) -> None:
        self.rate = 0.0
        self.until_ms = 0
        self.pause_ms = 0
        self.probing = False
        self._calm = 0
        self._at_ms = 0

    def fade(self, now_ms: int) -> None:
        """Let the rate fade up to *now_ms*."""
        if self.rate:
            self.rate *= 0.5 ** (max(0, now_ms - self._at_ms) / FAILURE_HALF_LIFE_MS)
        self._at_ms = now_ms

    def failed(self, now_ms: int, draw: float) -> bool:
        """Count a failure; return whether it set aside what was not."""
        self.fade(now_ms)
        self.rate += (1.0 - self.rate) * FAILURE_WEIGHT
        self._calm = 0
        if self.until_ms or not (self.probing or self.rate > FAILING):
            return False
        self.pause_ms = min(LAST_PAUSE_MS, self.pause_ms * 2) if self.pause_ms else FIRST_PAUSE_MS
        self.until_ms = now_ms + int(self.pause_ms * (1.0 + PAUSE_SPREAD * draw))
        self.probing = False
        return True

    def succeeded(self) -> bool:
        """Count a success; return whether it ended a probation."""
        self.rate -= self.rate * FAILURE_WEIGHT
        self._calm += 1
        if self._calm >= CALM_TASKS:
            self.pause_ms = 0
        if not self.probing:
            return False
        self.probing = False
        self.rate = min(self.rate, FAILING / 2)
        return True

    def comes_back(self, now_ms: int) -> bool:
        """Return whether a pause is over now, and begin the probation if so."""
        if not self.until_ms or now_ms < self.until_ms:
            return False
        self.until_ms = 0
        self.probing = True
        return True


class DeploymentHistory:
    """What one workspace's tasks came to on one node.

    Attributes:
        speed: its service times over the workspace's typical ones: 2 is a node that takes twice as long.
    """

    __slots__ = ("_at_ms", "_log_ratio", "speed", "tasks", "trouble")

    def __init__(self) -> None:
        self._at_ms = 0
        self.trouble = Trouble()
        self.tasks = 0
        self.speed = 1.0
        self._log_ratio = 0.0

    def took(self, seconds: float, times: ServiceTimes) -> None:
        """Take in the time of a task that was answered."""
        log_s = math.log(max(seconds, _SHORTEST_S))
        times.took(log_s)
        self.tasks += 1
        self._log_ratio += (log_s - times.log_s - self._log_ratio) * max(TIME_WEIGHT, 1 / self.tasks)
        self._set_speed()

    def fade(self, now_ms: int) -> None:
        """Let failures and speed fade up to *now_ms*."""
        self.trouble.fade(now_ms)
        if self._log_ratio:
            self._log_ratio *= 0.5 ** (max(0, now_ms - self._at_ms) / SPEED_HALF_LIFE_MS)
            self._set_speed()
        self._at_ms = now_ms

    def _set_speed(self) -> None:
        known = min(self.tasks, 1 / TIME_WEIGHT)
        self.speed = math.exp(self._log_ratio * known / (known + PRIOR_TASKS))


class NodeHistory:
    """What is remembered of a node across its sessions.

    Attributes:
        trouble: failures that are the node's own, whatever the workspace: lost connections, refused orders.
        deployments: by workspace id.
    """

    __slots__ = ("deployments", "trouble")

    DEPLOYMENT_LIMIT = 256

    def __init__(self) -> None:
        self.trouble = Trouble()
        self.deployments: dict[str, DeploymentHistory] = {}

    def of(self, workspace: str) -> DeploymentHistory:
        """Return the history of *workspace* here, which begins now if there is none."""
        found = self.deployments.get(workspace)
        if found is None:
            if len(self.deployments) >= self.DEPLOYMENT_LIMIT:  # the one that came first: it is likely gone
                del self.deployments[next(iter(self.deployments))]
            found = self.deployments[workspace] = DeploymentHistory()
        return found
