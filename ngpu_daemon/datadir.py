"""The directory one daemon owns alone: its keystore, its database, its sockets.

Owns the directory's mode (0700: the files in it are nobody else's), the lock that keeps a second process out, and the
names of the files every daemon has. The lock is `flock` on a file that is never removed: the kernel lets go of it
however the process ends, so a crash leaves nothing to clean up. (A PID file would: PIDs are used again.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ngpu_daemon.errors import OperatorError


class DataDirectoryError(OperatorError):
    """The data directory cannot be used; `path` says which."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


class DataDirectoryInUse(DataDirectoryError):
    """Another process holds the directory; `pid` is its id where it could be read."""

    def __init__(self, path: Path, pid: int | None) -> None:
        holder = "another process" if pid is None else f"process {pid}"
        super().__init__(path, f"data directory {path} is in use by {holder}: stop it or choose another --data-dir")
        self.pid = pid


class DataDirectory:
    """Where a daemon keeps what must survive it. Building one touches nothing; `prepare` and `lock` do."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()

    @property
    def keystore(self) -> Path:
        """The encrypted account key, written by `init`."""
        return self.path / "keystore.json"

    @property
    def admin_socket(self) -> Path:
        """The Unix socket on which the running daemon answers its own operator."""
        return self.path / "admin.sock"

    def prepare(self) -> None:
        """Make the directory if it is missing, mode 0700, parents included.

        Raises:
            DataDirectoryError: it cannot be made, is not a directory, or cannot be written.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:
            raise DataDirectoryError(self.path, f"{self.path} is not a directory: choose another --data-dir") from None
        except OSError as error:
            raise DataDirectoryError(
                self.path, f"cannot make the data directory {self.path}: {error.strerror}"
            ) from None
        if not os.access(self.path, os.R_OK | os.W_OK | os.X_OK):
            raise DataDirectoryError(self.path, f"data directory {self.path} cannot be written by this user")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for this process alone while the block runs; makes the directory if need be.

        Raises:
            DataDirectoryInUse: another process holds it. Nothing in the directory was touched.
        """
        self.prepare()
        path = self.path / "lock"
        try:
            # O_CLOEXEC is Python's default: a child that outlives us must not keep the lock
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise DataDirectoryError(self.path, f"cannot open {path}: {error.strerror}") from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataDirectoryInUse(self.path, _pid_in(descriptor)) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)


def _pid_in(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() else None
