"""The service that removes old tasks, a bounded number at a time, for as long as the daemon runs.

What goes and what stays is `store.retention`'s. Several bootstraps on one database may all do this; a task is removed
once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import structlog
import trio

from ngpu_bootstrap.config import RetentionSection
from ngpu_bootstrap.store import job_rows
from ngpu_bootstrap.store.errors import StoreError
from ngpu_bootstrap.store.store import Store

log = structlog.get_logger(__name__)

EVERY_S = 300.0
AT_ONCE = 500
# Between two batches others have the database.
BREATH_S = 0.2
DAY_MS = 24 * 3600 * 1000


async def sweep(store: Store, settings: RetentionSection, now_ms: int) -> int:
    """Remove what is too old or too much now; return how many tasks that were."""
    before_ms = now_ms - int(settings.days * DAY_MS) if settings.days else None
    bodies_bytes = settings.bodies_bytes or None
    removed = 0
    if before_ms is None and bodies_bytes is None:
        return 0
    if before_ms is not None:
        await store.forget_gpus(before_ms)
    while gone := await store.remove_old(before_ms=before_ms, bodies_bytes=bodies_bytes, limit=AT_ONCE):
        removed += gone
        await trio.sleep(BREATH_S)
    return removed


async def keep_swept(
    store: Store, settings: RetentionSection, now_ms: Callable[[], int], *, kept_keys: int, kept_keys_days: float
) -> None:
    """Sweep now and then, for ever.

    Args:
        kept_keys: of one workspace, that hold calls on one node; *kept_keys_days* after its last use one is removed.
    """
    while True:
        try:
            removed = await sweep(store, settings, now_ms())
            if removed:
                log.info("old_tasks_removed", tasks=removed)
            before_ms = now_ms() - int(kept_keys_days * DAY_MS)
            await store.chore(functools.partial(job_rows.forget_keys, before_ms=before_ms, limit=kept_keys))
        except StoreError as error:
            log.error("old_tasks_not_removed", reason=str(error))
        await trio.sleep(EVERY_S)
