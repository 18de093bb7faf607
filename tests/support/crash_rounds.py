"""A bootstrap that dies at one named point after another while clients go on, and the account of what that cost.

    python -m tests.support.crash_rounds [--rounds 3] [--minutes M] [--clients 4] [--store URL] [--point NAME ...]

A network of real processes: one bootstrap, one node, a workspace in this process. The bootstrap is started with one
point of `ngpu_bootstrap.kill_points` armed, dies there under load, and is started again with the next. Clients submit
under idempotency keys and try again until they are answered, as clients do. At the end, with nothing armed:

- every task that was acknowledged has ended, with the answer that its workspace gave (or cancelled, where its client
  asked for that);
- no key was given two tasks;
- no request reached the workspace again once the workspace had answered it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from ngpu_bootstrap.kill_points import ENVIRONMENT, POINTS
from ngpu_protocol.http1 import Exchange, HttpError
from tests.integration.whole_path.rig import Daemon, Network, network

JSON = [(b"content-type", b"application/json")]
CLIENTS = 4
WORK_S = 0.03
# An armed point that is not met for this long, recovery having had nothing to do: dies anyway, in the middle of work.
PATIENCE_S = 6.0
TRIES = 4


@dataclass
class Account:
    """What happened. The lists at the end must be empty."""

    deaths: Counter[str] = field(default_factory=Counter)
    acknowledged: dict[str, str] = field(default_factory=dict)  # key: task id
    cancelled: set[str] = field(default_factory=set)
    started: Counter[bytes] = field(default_factory=Counter)
    answered: set[bytes] = field(default_factory=set)
    twice: list[bytes] = field(default_factory=list)
    two_tasks: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    not_met: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not (self.twice or self.two_tasks or self.lost or self.not_met)

    def summary(self) -> dict[str, object]:
        return {
            "deaths": sum(self.deaths.values()),
            "points": dict(self.deaths),
            "acknowledged": len(self.acknowledged),
            "cancelled": len(self.cancelled),
            "requests_run": sum(self.started.values()),
            "lost": self.lost,
            "run_again_after_an_answer": [body.decode() for body in self.twice],
            "two_tasks_for_a_key": self.two_tasks,
            "points_not_met": self.not_met,
        }


class _Rounds:
    def __init__(self, clients: int) -> None:
        self.account = Account()
        self._clients = clients
        self._done = False
        self._number = 0

    async def workspace(self, exchange: Exchange) -> None:
        if exchange.request.method != "POST":  # the node's own: is it ready, which models has it
            await exchange.respond(200 if exchange.request.path == "/" else 404, [], b"")
            return
        account = self.account
        body = await exchange.receive_all(1 << 20)
        account.started[body] += 1
        if body in account.answered:
            account.twice.append(body)
        await trio.sleep(WORK_S)
        account.answered.add(body)
        await exchange.respond(200, [(b"content-type", b"text/plain")], body)

    async def run(self, folder: Path, points: Iterable[str], lines: tuple[str, ...]) -> Account:
        async with network(
            folder,
            self.workspace,
            # far beyond all restarts together: on a slow machine a task that waited would expire, as it should
            spec={"concurrency": max(2, self._clients // 2), "request_timeout_s": 3600},
            bootstrap_lines=lines,
            node_module="tests.support.eager_node",
        ) as net:
            await net.bootstrap.kill()
            async with trio.open_nursery() as nursery:
                for _ in range(self._clients):
                    nursery.start_soon(self._client, net)
                for point in points:
                    await self._die_at(net, point)
                net.bootstrap.environment = {}
                await self._start(net)
                self._done = True
            await self._check(net)
        return self.account

    async def _start(self, net: Network) -> None:
        await net.bootstrap.start()
        await net.connect_client()

    async def _die_at(self, net: Network, point: str) -> None:
        for number in range(TRIES):
            net.bootstrap.environment = {ENVIRONMENT: point}
            try:
                await self._start(net)
            except AssertionError:  # it died before it said where it listens, as it does at a point of recovery
                if not await self._has_died(net.bootstrap):
                    raise
            process = net.bootstrap.process
            assert process is not None
            with trio.move_on_after(PATIENCE_S * 2**number):
                await process.wait()
                self.account.deaths[point] += 1
                print(f"died at {point}", file=sys.stderr, flush=True)
                return
            await net.bootstrap.kill()
        self.account.not_met.append(point)

    async def _has_died(self, daemon: Daemon) -> bool:
        return daemon.process is not None and daemon.process.poll() == -9

    async def _client(self, net: Network) -> None:
        """Submit one task after the other, asynchronous and synchronous in turn, until everything is over."""
        while not self._done:
            self._number += 1
            number = self._number
            key = f"key-{number}"
            path = "/user/draw" if number % 3 == 0 else "/user/train"
            fields = [*JSON, (b"idempotency-key", key.encode())]
            body = b'{"data": "b%d"}' % number
            while True:
                task_id = await self._once(net, path, body, fields)
                if task_id:
                    break
                await trio.sleep(0.05)
            known = self.account.acknowledged.setdefault(key, task_id)
            # a client that did not hear the answer asks again, and must hear of the same task
            if number % 4 == 0:
                again = await self._once(net, path, body, fields)
                if again and again != known:
                    self.account.two_tasks.append(key)
            if number % 5 == 1 and path == "/user/train":
                self.account.cancelled.add(task_id)
                await self._once_cancelled(net, task_id)

    async def _once(self, net: Network, path: str, body: bytes, fields: list[tuple[bytes, bytes]]) -> str:
        """Return the task id of an acknowledged call, empty when nothing was acknowledged."""
        try:
            with trio.fail_after(20):
                answer = await net.call("POST", path, body, fields)
            return str(answer.document["taskId"]) if answer.status == 200 else ""
        except (HttpError, OSError, trio.TooSlowError, json.JSONDecodeError, KeyError):
            return ""

    async def _once_cancelled(self, net: Network, task_id: str) -> None:
        try:
            with trio.fail_after(20):
                await net.call("DELETE", f"/api/v1/tasks/{task_id}")
        except (HttpError, OSError, trio.TooSlowError):
            return

    async def _check(self, net: Network) -> None:
        for key, task_id in self.account.acknowledged.items():
            try:
                document = await net.poll(task_id, within_s=60)
            except AssertionError as error:
                self.account.lost.append(f"{task_id}: {error}")
                continue
            expected = "b" + key.removeprefix("key-")
            if document["state"] == 5 and task_id in self.account.cancelled:
                continue
            if (document["state"], document["data"]) != (3, expected):
                self.account.lost.append(f"{task_id}: {document}")


async def crash_rounds(
    folder: Path, points: Iterable[str] = POINTS, *, store: str = "", clients: int = CLIENTS
) -> Account:
    """Let a bootstrap die at *points*, one after the other, and return what that cost.

    Args:
        store: URL of a PostgreSQL database; SQLite without one.
        clients: how many submit at once.
    """
    lines = (f"store = {json.dumps(store)}",) if store else ()
    return await _Rounds(clients).run(folder, points, lines)


def rounds_of(points: Sequence[str], rounds: int, minutes: float) -> Iterator[str]:
    """Yield every point in turn, *rounds* times; with *minutes* as often as that takes, each whole round begun."""
    ends_s = time.monotonic() + minutes * 60
    for number in itertools.count():
        if time.monotonic() >= ends_s if minutes else number >= rounds:
            return
        print(f"round {number + 1}", file=sys.stderr, flush=True)
        yield from points


def main() -> int:
    """Run rounds until told to stop, print the account of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often every point is died at")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin rounds for this long, instead of --rounds")
    parser.add_argument("--clients", type=int, default=CLIENTS, help="how many submit at once")
    parser.add_argument("--store", default="", help="PostgreSQL URL of an empty database (default: SQLite)")
    parser.add_argument("--point", action="append", choices=POINTS, help="only this point; repeat for more")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        points = rounds_of(tuple(arguments.point or POINTS), arguments.rounds, arguments.minutes)
        account = trio.run(lambda: crash_rounds(Path(folder), points, store=arguments.store, clients=arguments.clients))
    print(json.dumps(account.summary(), indent=1))
    return 0 if account.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
