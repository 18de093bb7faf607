"""What the store tells its callers when it cannot do what they asked, split by who must act.

Foreign errors (SQLAlchemy's, the driver's, the file system's) are translated at the edge; none leaves this package.
"""

from __future__ import annotations

from ngpu_daemon.errors import OperatorError


class StoreError(Exception):
    """Root of everything the store raises."""


class StoreUnavailable(StoreError):
    """The medium failed (disk full, I/O error, database locked or gone): the operator must act.

    The write is not known to be durable. It is not there now, but a commit that failed while being flushed may
    reappear after a crash, so a caller must not treat it as proof that nothing was written.
    """


class StoreClosed(StoreError):
    """The store is closing or closed: nothing was written."""


class StoreMismatch(StoreError, OperatorError):
    """The database belongs to another network, or its schema is not one this version can use; nothing was changed."""


class UnknownTask(StoreError):
    """No task of this id."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"no task {task_id}")
        self.task_id = task_id


class TaskExists(StoreError):
    """A task of this id was accepted before."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"task {task_id} exists already")
        self.task_id = task_id


class IdempotencyKeyUsed(StoreError):
    """The workspace used this idempotency key before, for the task *task_id*: answer with that one."""

    def __init__(self, workspace: str, key: str, task_id: str) -> None:
        super().__init__(f"workspace {workspace} used this idempotency key for task {task_id}")
        self.workspace = workspace
        self.key = key
        self.task_id = task_id


class TaskIsFinal(StoreError):
    """The task ended before, in *state*: nothing was changed."""

    def __init__(self, task_id: str, state: int) -> None:
        super().__init__(f"task {task_id} ended before, in state {state}")
        self.task_id = task_id
        self.state = state


class AttemptConflict(StoreError):
    """The attempt was begun before, or never: nothing was changed."""

    def __init__(self, task_id: str, attempt: int) -> None:
        super().__init__(f"attempt {attempt} of task {task_id} is not where it should be")
        self.task_id = task_id
        self.attempt = attempt


class UnknownWorkspace(StoreError):
    """No such workspace, or it was removed."""

    def __init__(self, workspace: str) -> None:
        super().__init__(f"no workspace {workspace}")
        self.workspace = workspace


class WorkspaceConflict(StoreError):
    """The workspace id, token label or token hash is taken, or the revision is not the next one."""

    def __init__(self, workspace: str, message: str) -> None:
        super().__init__(message)
        self.workspace = workspace


class PlacementOutdated(StoreError):
    """Where workspaces run was decided on what another bootstrap has changed since: nothing was stored."""


class RecordRefused(StoreError):
    """A value of this record cannot be stored (out of range, not text, too large): the caller's mistake."""


class BodyTooLarge(StoreError):
    """A body exceeds what the store keeps; nothing of it remains on disk."""

    def __init__(self, task_id: str, limit_bytes: int) -> None:
        super().__init__(f"a body of task {task_id} exceeds {limit_bytes} bytes")
        self.task_id = task_id
        self.limit_bytes = limit_bytes


class BodyMissing(StoreError):
    """The body's file is gone or shorter than recorded (removed by retention or by hand)."""

    def __init__(self, task_id: str, part: str) -> None:
        super().__init__(f"the {part} of task {task_id} is no longer on disk")
        self.task_id = task_id
        self.part = part
