"""What can go wrong for a client, by who must act."""

from __future__ import annotations


class NgpuError(Exception):
    """Root of this package's errors."""


class BootstrapUnreachable(NgpuError):
    """The bootstrap cannot be reached, or the connection broke before an answer. Trying again later may help."""


class AnswerCut(NgpuError):
    """A stream ended before its answer did: what came so far is not the whole."""


class UnexpectedAnswer(NgpuError):
    """Something answered that does not speak this API: is the URL that of a bootstrap?"""


class ApiError(NgpuError):
    """The bootstrap refused a call.

    Attributes:
        status: HTTP status.
        reason: stable word, empty where the answer had none.
        message: for people: what happened and what to change.
        retry_after_s: when to come again, where it was said.
    """

    def __init__(self, status: int, reason: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{status} {reason}: {message}" if reason else f"{status}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after_s = retry_after_s


class TaskFailed(NgpuError):
    """A task ended without the workspace's success.

    Attributes:
        task_id: which.
        result_code: the workspace's status, or the gateway's for what became of the task.
        reason: stable word, empty when the workspace itself answered.
        message: for people.
        data: what the workspace answered, if it did.
    """

    def __init__(self, task_id: str, result_code: int, reason: str, message: str, data: str = "") -> None:
        super().__init__(f"task {task_id} ended with {result_code}: {message}")
        self.task_id = task_id
        self.result_code = result_code
        self.reason = reason
        self.message = message
        self.data = data


class NotFinished(NgpuError):
    """The time to wait is over and the task is still on its way: wait again, or cancel it.

    Attributes:
        task_id: which.
    """

    def __init__(self, task_id: str, within_s: float) -> None:
        super().__init__(f"task {task_id} has not ended within {within_s:g} s; it goes on")
        self.task_id = task_id
