"""The service that calls clients back: due calls out of the store, a bounded number at once, each noted.

A call is made at least once; one that fails is tried again for about a day. It never holds up a task: the end of a
task is committed before and whatever becomes of the call.
"""

from __future__ import annotations

import random
import ssl
from collections.abc import Awaitable, Callable
from functools import cached_property

import structlog
import trio

from ngpu_bootstrap.store.errors import StoreError
from ngpu_bootstrap.store.store import Store
from ngpu_bootstrap.store.webhook_rows import DueWebhook, ToldWebhook
from ngpu_bootstrap.webhooks.rules import (
    Target,
    WebhookRules,
    body_of,
    next_pause_ms,
    parse_url,
    signature,
    signing_key,
)
from ngpu_daemon.addresses import IpAddress
from ngpu_daemon.outbound import resolve
from ngpu_protocol.http1 import Client, Limits, RemoteError

log = structlog.get_logger(__name__)

AT_ONCE = 16
CALL_S = 10.0
# How often due calls are looked for without a task having ended here.
LOOK_S = 5.0
SOON_S = 0.05

Resolve = Callable[[str, int], Awaitable[list[IpAddress]]]
TokenHash = Callable[[str, str], bytes | None]


class WebhookCaller:
    """Makes the calls.

    Args:
        token_hash: the stored hash of a workspace's token, by workspace and label; None once it is gone.
        resolve: the addresses of a name.
        tls: how servers are verified; by the system's authorities without it.
    """

    def __init__(
        self,
        store: Store,
        rules: WebhookRules,
        *,
        token_hash: TokenHash,
        now_ms: Callable[[], int],
        resolve: Resolve = resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._store = store
        self._rules = rules
        self._token_hash = token_hash
        self._now_ms = now_ms
        self._resolve = resolve
        self._own_tls = tls
        self._places = trio.Semaphore(AT_ONCE)
        self._wake = trio.Event()

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return self._own_tls or ssl.create_default_context()  # loads a few hundred certificates: when first needed

    def task_ended(self) -> None:
        """Look for due calls soon: a task that has one ended."""
        self._wake.set()

    async def run(self) -> None:
        """Make the calls that are due, for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    while due := await self._store.due_webhooks(self._now_ms(), AT_ONCE):
                        for one in due:
                            await self._places.acquire()
                            nursery.start_soon(self._one, one)
                except StoreError as error:
                    log.error("webhooks_not_read", reason=str(error))
                with trio.move_on_after(LOOK_S):
                    await self._wake.wait()
                await trio.sleep(SOON_S)
                self._wake = trio.Event()

    async def _one(self, due: DueWebhook) -> None:
        try:
            try:
                status, problem = await self._call(due)
            except StoreError:
                raise  # it stays due
            except Exception:
                # ours to mend, and a try like any other: one that is not counted would be made for ever
                log.exception("webhook_crashed", task_id=due.task_id)
                status, problem = 0, "this bootstrap failed to make the call"
            now_ms, tries = self._now_ms(), due.tries + 1
            made = not problem
            pause_ms = None if made else next_pause_ms(tries, random.random())
            told = ToldWebhook(
                due.task_id,
                tries,
                now_ms + (pause_ms or 0),
                now_ms if pause_ms is None else None,
                status,
                problem[:200],
            )
            await self._store.note_webhook(told)
            log.info(
                "webhook_called",
                task_id=due.task_id,
                host=_host(due.url),
                made=made,
                status=status,
                reason=problem[:200],
                tries=tries,
                again_in_ms=pause_ms,
            )
        except StoreError as error:
            log.error("webhook_not_noted", task_id=due.task_id, reason=str(error))
        finally:
            self._places.release()

    async def _call(self, due: DueWebhook) -> tuple[int, str]:
        """Return the status, 0 without one, and what went wrong."""
        task = await self._store.task_state(due.task_id)
        token_hash = self._token_hash(due.workspace, due.token_label)
        if task is None or token_hash is None:
            return 0, "the token it would be signed with is gone"
        target = parse_url(due.url)
        body = body_of(task)
        timestamp_s = self._now_ms() // 1000
        fields = [
            (b"content-type", b"application/json"),
            (b"user-agent", b"ngpu-bootstrap"),
            (b"ngpu-webhook-id", due.task_id.encode()),
            (b"ngpu-webhook-timestamp", b"%d" % timestamp_s),
            (b"ngpu-webhook-signature", signature(signing_key(token_hash), timestamp_s, body).encode()),
        ]
        status, problem = 0, ""
        with trio.move_on_after(CALL_S) as patience:
            try:
                addresses = await self._resolve(target.host, target.port)
                address, problem = self._rules.choose([str(one) for one in addresses], secure=target.secure)
                if problem:
                    return 0, problem
                client = Client(
                    lambda: self._open(target, address),
                    authority=target.authority,
                    max_connections=1,
                    limits=Limits(max_head_bytes=16 * 1024),
                )
                try:
                    async with client.request("POST", target.path, fields, body) as response:
                        status = response.status
                finally:
                    with trio.move_on_after(1, shield=True):
                        await client.aclose()
            except (RemoteError, OSError, ssl.SSLError, trio.BrokenResourceError) as error:
                # an answer that cannot be read to its end is an answer all the same
                problem = "" if status else f"no answer: {error}"
        if patience.cancelled_caught and not status:
            return 0, f"no answer within {CALL_S:g} s"
        if status and not 200 <= status < 300:
            problem = f"it answered {status}"
        return status, problem

    async def _open(self, target: Target, address: str) -> trio.abc.Stream:
        """Connect to the address that was judged, under the name the URL has."""
        stream = await trio.open_tcp_stream(address, target.port)
        if not target.secure:
            return stream
        secured = trio.SSLStream(stream, self._tls, server_hostname=target.host, https_compatible=True)
        await secured.do_handshake()
        return secured


def _host(url: str) -> str:
    try:
        return parse_url(url).host
    except ValueError:
        return ""
