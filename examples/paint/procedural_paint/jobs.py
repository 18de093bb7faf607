"""Jobs that are submitted and polled: a bounded queue, a few painters, answers kept for a while.

The life of one: queued -> running -> done | failed, and gone when its time is over or too many came after it.
"""

import queue
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from .requests import Job

MAX_QUEUED = 64
MAX_KEPT = 64
KEPT_S = 600.0


class QueueFull(Exception):
    """As many jobs wait as may."""


class Jobs:
    """The jobs of this process.

    Args:
        painters: threads that paint.
    """

    def __init__(self, painters: int = 2, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._states: dict[str, dict[str, Any]] = {}
        self._queue: queue.Queue[tuple[str, Job]] = queue.Queue(MAX_QUEUED)
        for number in range(painters):
            threading.Thread(target=self._paint, name=f"painter {number}", daemon=True).start()

    def submit(self, job: Job) -> str:
        """Return the id of a new job.

        Raises:
            QueueFull: come again later.
        """
        task_id = secrets.token_hex(16)
        state = {"task_id": task_id, "status": "queued", "progress": 0, "ended_s": None}
        with self._lock:
            self._forget()
            self._states[task_id] = state
        try:
            self._queue.put_nowait((task_id, job))
        except queue.Full:
            with self._lock:
                del self._states[task_id]
            raise QueueFull from None
        return task_id

    def status(self, task_id: str) -> dict[str, Any] | None:
        """Return how a job stands, with its pictures when it is done; None when it is not known any more."""
        with self._lock:
            self._forget()
            state = self._states.get(task_id)
            return {key: value for key, value in state.items() if key != "ended_s"} if state is not None else None

    def _forget(self) -> None:
        now_s = self._clock()
        ended = [(state["ended_s"], key) for key, state in self._states.items() if state["ended_s"] is not None]
        surplus = sorted(ended)[: max(0, len(ended) - MAX_KEPT)]
        for key in {key for ended_s, key in ended if now_s - ended_s > KEPT_S} | {key for _, key in surplus}:
            del self._states[key]

    def _paint(self) -> None:
        while True:
            task_id, job = self._queue.get()
            self._note(task_id, status="running")
            try:
                files = job.run(lambda share, task_id=task_id: self._note(task_id, progress=min(99, int(share * 100))))
                self._note(task_id, status="done", progress=100, ended_s=self._clock(), **job.answer(files))
            except Exception as error:  # one picture that cannot be painted must not end the painter
                self._note(task_id, status="failed", error=str(error) or type(error).__name__, ended_s=self._clock())

    def _note(self, task_id: str, **news: Any) -> None:
        with self._lock:
            if task_id in self._states:
                self._states[task_id].update(news)
