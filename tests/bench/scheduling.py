"""A simulation of scheduling: thousands of nodes in virtual time, the real `registry.nodes` and `scheduling` choosing.

    python -m tests.bench.scheduling run --nodes 1000 --load 0.8 --out FILE      one load, every policy
    python -m tests.bench.scheduling report FILE... [--plot FILE.svg]            table and plot of such files
    python -m tests.bench.scheduling decide                                      how long one decision takes

What is simulated: Poisson arrivals; service times of a heavy-tailed mix (60 % exponential of 0.5 s, 30 % of 3 s, 10 %
bounded Pareto of 5 to 200 s); nodes with two slots each and round trips of 2 to 80 ms; 5 % of nodes dying an hour,
noticed after 10 s, back after 60 s; 2 % lying: they say that they are idle and have twice the slots, and refuse when
full. Every task may run again after a loss, and has five attempts beside those refused for want of a slot.

Two things are compared. Ours is the code the bootstrap runs, alone or three of them sharing the nodes: each hears of
the others' work only by heartbeats every 2 s, so its news is 1 s old on average. A node that is full refuses. The
other policies send at once, and a node that is full queues: random, round robin, the shorter of two random queues, and
joining the shortest of all queues with full knowledge of this moment (deaths and lies included), which no real system
has.

Only the clock is not real: no sleeping, no sockets, the same seed gives the same figures.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import structlog

from ngpu_bootstrap.dispatch.dispatcher import FULL_REFUSALS
from ngpu_bootstrap.errors import NotServed
from ngpu_bootstrap.registry.nodes import Nodes, NodeSession, Slot
from ngpu_bootstrap.scheduling.history import Fared
from ngpu_bootstrap.tasks.retry import pause_s
from ngpu_protocol.control import DeploymentState, Heartbeat
from ngpu_protocol.http1 import Client
from ngpu_protocol.identity import Address
from ngpu_protocol.workspaces import WorkspaceSpec

SLOTS = 2
HEARTBEAT_S = 2.0
TICK_S = 0.1
NOTICED_S = 10.0
BACK_S = 60.0
DEATHS_PER_HOUR = 0.05
LIARS = 0.02
ATTEMPTS = 5
SPEC = WorkspaceSpec(id="7", name="simulated", service="a/b", ports=[80], concurrency=SLOTS)
POLICIES = ("ours", "ours x3", "random", "round robin", "two choices", "full knowledge")


@dataclass(frozen=True, slots=True)
class Setup:
    """What is run. *load* is the share of the nodes' real capacity that arrivals ask for."""

    nodes: int
    load: float
    seconds: float = 300.0
    warm_up_s: float = 60.0
    seed: int = 7
    deaths_per_hour: float = DEATHS_PER_HOUR
    liars: float = LIARS


@dataclass(slots=True)
class Task:
    arrived_s: float
    service_s: float
    attempts: int = 0
    full: int = 0
    began_s: float = -1.0
    counted: bool = False


@dataclass(eq=False, slots=True)
class Node:
    """A machine. *queue* is used by policies that send without asking."""

    number: int
    rtt_s: float
    lies: bool
    alive: bool = True
    life: int = 0
    known: bool = True
    running: dict[Task, Any] = field(default_factory=dict)
    queue: deque[Task] = field(default_factory=deque)

    @property
    def length(self) -> int:
        return len(self.running) + len(self.queue)


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of a run: seconds, shares and counts of the tasks that arrived after the warm-up."""

    policy: str
    nodes: int
    load: float
    tasks: int
    lost: int
    refused: int
    again: int
    wait_p50_s: float
    wait_p99_s: float
    system_p50_s: float
    system_p99_s: float
    utilisation: float
    wall_s: float


Task.__hash__ = object.__hash__  # type: ignore[method-assign]


class Simulation:
    """One policy on one setup. Subclasses say where a task goes."""

    name = ""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.now_s = 0.0
        self.chance = random.Random(setup.seed)
        world = random.Random(setup.seed + 1)
        self.nodes = [
            Node(number, world.uniform(0.002, 0.08), world.random() < setup.liars) for number in range(setup.nodes)
        ]
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._arrivals = random.Random(setup.seed + 2)
        self._deaths = random.Random(setup.seed + 3)
        self._rate = setup.load * setup.nodes * SLOTS / mean_service_s()
        self.waits: list[float] = []
        self.systems: list[float] = []
        self.lost = self.refused = self.again = 0
        self._busy_s = 0.0
        self._placed = 0
        self.end_s = setup.warm_up_s + setup.seconds

    def at(self, when_s: float, call: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (when_s, next(self._numbers), call, arguments))

    def run(self) -> Figures:
        """Return the figures; every task that arrived in time has ended."""
        began = time.perf_counter()
        self.at(0.0, self._arrive)
        if self.setup.deaths_per_hour:
            self.at(self._next_death_s(), self._die)
        self.prepare()
        while self._events:
            self.now_s, _, call, arguments = heapq.heappop(self._events)
            call(*arguments)
            if self.now_s > self.end_s and self.is_over():
                break
        capacity_s = self.setup.seconds * self.setup.nodes * SLOTS
        self.waits.sort()
        self.systems.sort()
        return Figures(
            policy=self.name,
            nodes=self.setup.nodes,
            load=self.setup.load,
            tasks=len(self.systems),
            lost=self.lost,
            refused=self.refused,
            again=self.again,
            wait_p50_s=quantile(self.waits, 0.5),
            wait_p99_s=quantile(self.waits, 0.99),
            system_p50_s=quantile(self.systems, 0.5),
            system_p99_s=quantile(self.systems, 0.99),
            utilisation=self._busy_s / capacity_s,
            wall_s=time.perf_counter() - began,
        )

    # -- told by policies

    def prepare(self) -> None:
        """Start what the policy needs beside arrivals."""

    def place(self, task: Task) -> None:
        """Send *task* somewhere, or have it wait."""
        raise NotImplementedError

    def node_ended(self, node: Node) -> None:
        """Hear that *node* is gone, `NOTICED_S` after it died."""

    def node_back(self, node: Node) -> None:
        """Hear that *node* is there again, as another run of itself."""

    def start(self, node: Node, task: Task, slot: Any = None) -> None:
        """Begin *task* on *node*, which has room."""
        task.began_s = self.now_s
        node.running[task] = slot
        self._placed += 1
        self.at(self.now_s + task.service_s, self._finish, node, node.life, task)

    def give_up(self, task: Task) -> None:
        """Count *task* as lost."""
        self._open -= 1
        if task.counted:
            self.lost += 1

    def try_again(self, task: Task) -> None:
        """Place a task whose node was lost or had no room."""
        if task.attempts >= ATTEMPTS:
            self.give_up(task)
        else:
            self.again += task.counted
            self.place(task)

    def freed(self, node: Node, task: Task, slot: Any) -> None:
        """Hear that *task* ended on *node*."""

    # -- the world

    _open = 0

    def is_over(self) -> bool:
        return self._open == 0

    def is_settled(self) -> bool:
        """Return whether nothing is left to decide: every task runs, and none of their nodes dies any more."""
        return self.now_s > self.end_s + NOTICED_S + 1.0 and self._open == self._placed

    def _arrive(self) -> None:
        task = Task(self.now_s, draw_service_s(self._arrivals), counted=self.now_s >= self.setup.warm_up_s)
        self._open += 1
        next_s = self.now_s + self._arrivals.expovariate(self._rate)
        if next_s < self.end_s:
            self.at(next_s, self._arrive)
        self.place(task)

    def _finish(self, node: Node, life: int, task: Task) -> None:
        if node.life != life or task not in node.running:
            return
        slot = node.running.pop(task)
        overlap_s = min(self.now_s, self.end_s) - max(task.began_s, self.setup.warm_up_s)
        self._busy_s += max(0.0, overlap_s)
        self.at(self.now_s + node.rtt_s / 2, self._answered, node, task, slot)
        self.freed(node, task, slot)

    def _answered(self, node: Node, task: Task, slot: Any) -> None:
        self._open -= 1
        self._placed -= 1
        if task.counted:
            self.waits.append(task.began_s - task.arrived_s)
            self.systems.append(self.now_s - task.arrived_s)

    def _next_death_s(self) -> float:
        return self.now_s + self._deaths.expovariate(self.setup.deaths_per_hour * self.setup.nodes / 3600)

    def _die(self) -> None:
        if self.now_s < self.end_s:
            self.at(self._next_death_s(), self._die)
        node = self._deaths.choice(self.nodes)
        if not node.alive:
            return
        node.alive = False
        node.life += 1
        lost = [*node.running.items(), *((task, None) for task in node.queue)]
        self._placed -= len(node.running)
        node.running = {}
        node.queue.clear()
        self.at(self.now_s + NOTICED_S, self._noticed, node, lost)
        self.at(self.now_s + BACK_S, self._return, node)

    def _noticed(self, node: Node, lost: list[tuple[Task, Any]]) -> None:
        node.known = False
        self.node_ended(node)
        for task, slot in lost:
            if slot is not None:
                slot.release()
            self.try_again(task)

    def _return(self, node: Node) -> None:
        node.alive = node.known = True
        self.node_back(node)


class Queueing(Simulation):
    """Policies that send at once; a node that is full queues."""

    def place(self, task: Task) -> None:
        node = self.choose()
        task.attempts += 1
        self.at(self.now_s + node.rtt_s / 2, self._received, node, node.life, task)
        self.sent(node)

    def choose(self) -> Node:
        raise NotImplementedError

    def sent(self, node: Node) -> None:
        """Hear that a task is on its way to *node*."""

    def _received(self, node: Node, life: int, task: Task) -> None:
        if not node.alive or node.life != life:  # nobody answers: noticed as the death is
            self.at(self.now_s + NOTICED_S, self.try_again, task)
        elif len(node.running) < SLOTS:
            self.start(node, task)
        else:
            node.queue.append(task)

    def freed(self, node: Node, task: Task, slot: Any) -> None:
        if node.queue:
            self.start(node, node.queue.popleft())


class RandomNode(Queueing):
    name = "random"

    def choose(self) -> Node:
        while True:
            node = self.nodes[int(self.chance.random() * len(self.nodes))]
            if node.known:
                return node


class RoundRobin(Queueing):
    name = "round robin"
    _next = 0

    def choose(self) -> Node:
        while True:
            self._next = (self._next + 1) % len(self.nodes)
            if self.nodes[self._next].known:
                return self.nodes[self._next]


class TwoChoices(RandomNode):
    name = "two choices"

    def choose(self) -> Node:
        one, other = super().choose(), super().choose()
        return one if one.length <= other.length else other


class FullKnowledge(Queueing):
    """Joins the shortest queue of all, knowing every queue, every death and what is on its way, at this moment."""

    name = "full knowledge"

    def prepare(self) -> None:
        self._lengths = [0] * len(self.nodes)
        self._by_length: list[list[int]] = [list(range(len(self.nodes)))]
        self._places = list(range(len(self.nodes)))
        self._lowest = 0

    def choose(self) -> Node:
        length = 0
        while True:
            bucket = self._by_length[length]
            for _ in range(len(bucket)):
                node = self.nodes[bucket[int(self.chance.random() * len(bucket))]]
                if node.alive:
                    return node
            length += 1

    def sent(self, node: Node) -> None:
        self._move(node.number, 1)

    def freed(self, node: Node, task: Task, slot: Any) -> None:
        self._move(node.number, -1)
        super().freed(node, task, slot)

    def node_ended(self, node: Node) -> None:
        self._move(node.number, -self._lengths[node.number])

    def _move(self, number: int, change: int) -> None:
        bucket, place = self._by_length[self._lengths[number]], self._places[number]
        bucket[place] = bucket[-1]
        self._places[bucket[place]] = place
        bucket.pop()
        length = self._lengths[number] = max(0, self._lengths[number] + change)
        while len(self._by_length) <= length:
            self._by_length.append([])
        self._places[number] = len(self._by_length[length])
        self._by_length[length].append(number)


class Ours(Simulation):
    """The bootstrap's own code: *bootstraps* of them share the nodes, each hearing of the others by heartbeats."""

    name = "ours"
    bootstraps = 1

    def prepare(self) -> None:
        rtts = {f"peer{node.number}": node.rtt_s for node in self.nodes}
        self._views = [
            Nodes(
                now_ms=lambda: int(self.now_s * 1000),
                queue_limit=10**9,
                draw=random.Random(self.setup.seed + 10 + number).random,
                round_trip_s=rtts.get,
            )
            for number in range(self.bootstraps)
        ]
        # A heartbeat has one of few contents: the slots said free, in all and of the workspace, and whose tasks run.
        self._said = {
            (free, yours, lies): Heartbeat(
                at_ms=0,
                slots_free=2 * SLOTS if lies else free,
                deployments=(DeploymentState("7", 1, "ready", slots_free=2 * SLOTS if lies else free, yours=yours),),
                yours=yours,
            )
            for free in range(SLOTS + 1)
            for yours in range(SLOTS + 1)
            for lies in (False, True)
        }
        self._sessions: dict[tuple[int, int], NodeSession] = {}
        for node in self.nodes:
            self.node_back(node)
            offset_s = self.chance.uniform(0, HEARTBEAT_S)
            for view in range(self.bootstraps):
                self.at(offset_s + HEARTBEAT_S * view / self.bootstraps, self._beat, node, view)
        self.at(TICK_S, self._tick)

    def node_back(self, node: Node) -> None:
        for view in range(self.bootstraps):
            now_ms = int(self.now_s * 1000)
            session = _session(node.number, 2 * SLOTS if node.lies else SLOTS, now_ms)
            session.assign({"7": (1,)})
            self._sessions[view, node.number] = session
            self._views[view].attach(session)
            self._hear(node, view)

    def node_ended(self, node: Node) -> None:
        for view in range(self.bootstraps):
            self._views[view].detach(self._sessions[view, node.number])

    def place(self, task: Task) -> None:
        view = self._views[int(self.chance.random() * self.bootstraps)]
        slot = view.take(SPEC)
        if slot is not None:
            self._send(task, view, slot)
            return
        try:
            view.join(SPEC, lambda granted: self._send(task, view, granted), task_id=str(id(task)))
        except NotServed:
            self.give_up(task)

    def _send(self, task: Task, view: Nodes, slot: Slot) -> None:
        node = self.nodes[int(slot.session.node, 16)]
        task.attempts += 1
        self.at(self.now_s + node.rtt_s / 2, self._received, node, node.life, task, view, slot)

    def _received(self, node: Node, life: int, task: Task, view: Nodes, slot: Slot) -> None:
        if not node.alive or node.life != life:
            self.at(self.now_s + NOTICED_S, self._broke, task, view, slot)
        elif len(node.running) < SLOTS:
            self.start(node, task, slot)
        else:
            self.at(self.now_s + node.rtt_s / 2, self._was_refused, task, view, slot)

    def _was_refused(self, task: Task, view: Nodes, slot: Slot) -> None:
        self.refused += task.counted
        task.full += 1
        if task.full <= FULL_REFUSALS:
            task.attempts -= 1
        view.refused_full(slot)
        slot.release()
        if pause_s(task.full):
            self.at(self.now_s + pause_s(task.full), self.try_again, task)
        else:
            self.try_again(task)

    def _broke(self, task: Task, view: Nodes, slot: Slot) -> None:
        slot.release()
        view.ended(slot, Fared.NODE_FAILED, 0.0)
        self.try_again(task)

    def _answered(self, node: Node, task: Task, slot: Slot) -> None:
        super()._answered(node, task, slot)
        slot.release()
        slot._nodes.ended(slot, Fared.WELL, task.service_s + node.rtt_s)

    def _beat(self, node: Node, view: int) -> None:
        if self.is_settled():
            return
        self.at(self.now_s + HEARTBEAT_S, self._beat, node, view)
        if node.alive:
            self._hear(node, view)

    def _hear(self, node: Node, view: int) -> None:
        there = self._views[view]
        yours = sum(slot._nodes is there for slot in node.running.values())
        there.heard(self._sessions[view, node.number], self._said[SLOTS - len(node.running), yours, node.lies])

    def _tick(self) -> None:
        for view in self._views:
            view.tick()
        if not self.is_settled():
            self.at(self.now_s + TICK_S, self._tick)


class OursTimesThree(Ours):
    name = "ours x3"
    bootstraps = 3


SIMULATIONS: dict[str, type[Simulation]] = {
    one.name: one for one in (Ours, OursTimesThree, RandomNode, RoundRobin, TwoChoices, FullKnowledge)
}


def _session(number: int, slots: int, now_ms: int) -> NodeSession:
    return NodeSession(
        node=Address(f"0x{number:040x}"),
        peer_id=f"peer{number}",
        session=bytes(32),
        software="ngpu-node/1.0.0",
        gpus=(),
        slots=slots,
        admitted=True,
        connected_at_ms=now_ms,
        heard_at_ms=now_ms,
        requests=Client(_no_stream),
    )


async def _no_stream() -> Any:
    raise OSError("nothing is connected in a simulation")


def draw_service_s(chance: random.Random) -> float:
    """Return a service time of the mix."""
    kind = chance.random()
    if kind < 0.6:
        return chance.expovariate(1 / 0.5)
    if kind < 0.9:
        return chance.expovariate(1 / 3.0)
    low, high, alpha = 5.0, 200.0, 1.5
    share = chance.random() * (1 - (low / high) ** alpha)
    return low / (1 - share) ** (1 / alpha)


def mean_service_s() -> float:
    """Return the mean of the mix."""
    low, high, alpha = 5.0, 200.0, 1.5
    pareto = low * alpha / (alpha - 1) * (1 - (low / high) ** (alpha - 1)) / (1 - (low / high) ** alpha)
    return 0.6 * 0.5 + 0.3 * 3.0 + 0.1 * pareto


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which *share* of the ordered values are; 0 for none."""
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def run_policies(setup: Setup, policies: Sequence[str] = POLICIES) -> list[Figures]:
    """Return the figures of each policy on *setup*."""
    return [SIMULATIONS[policy](setup).run() for policy in policies]


# -- how long a decision takes


def decision_us(nodes: int, *, contended: bool = False, rounds: int = 7, decisions: int = 500) -> float:
    """Return what one decision takes: a slot taken and given back among so many candidates, in microseconds.

    The best of *rounds*, each the mean of *decisions*: what else runs on the machine only makes one slower.

    Args:
        contended: other bootstraps are often there first, so that more is looked at.
    """
    now_ms = 1_000_000
    view = Nodes(now_ms=lambda: now_ms, queue_limit=1, draw=random.Random(3).random)
    state = DeploymentState("7", 1, "ready", slots_free=SLOTS)
    for number in range(nodes):
        session = _session(number, SLOTS, now_ms)
        session.assign({"7": (1,)})
        view.attach(session)
        view.heard(session, Heartbeat(at_ms=0, slots_free=SLOTS, deployments=(state,)))
    held = [view.take(SPEC) for _ in range(nodes)]  # half of all slots are in use
    if contended:
        for slot in held[: min(nodes // 2, 64)]:
            assert slot is not None
            view.refused_full(slot)
    best = math.inf
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(decisions):
            slot = view.take(SPEC)
            assert slot is not None
            slot.release()
        best = min(best, (time.perf_counter() - began) / decisions)
    return best * 1e6


# -- what a person runs


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scheduling")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="simulate one load with every policy")
    run.add_argument("--nodes", type=int, default=1000)
    run.add_argument("--load", type=float, default=0.8)
    run.add_argument("--seconds", type=float, default=300.0, help="measured, after the warm-up")
    run.add_argument("--warm-up", type=float, default=60.0)
    run.add_argument("--seed", type=int, default=7)
    run.add_argument("--policy", action="append", choices=POLICIES)
    run.add_argument("--out", type=Path, help="where the figures go as JSON")
    report = commands.add_parser("report", help="table and plot of what was run")
    report.add_argument("files", nargs="+", type=Path)
    report.add_argument("--plot", type=Path, help="SVG or PNG")
    commands.add_parser("decide", help="how long one decision takes, among 1 to 10,000 candidates")
    arguments = parser.parse_args()
    structlog.configure(processors=[_drop])
    if arguments.command == "decide":
        print("candidates  one bootstrap  several, contended")
        for nodes in (1, 10, 100, 1_000, 10_000):
            print(f"{nodes:10,}  {decision_us(nodes):10.1f} us  {decision_us(nodes, contended=True):15.1f} us")
        return 0
    if arguments.command == "run":
        setup = Setup(arguments.nodes, arguments.load, arguments.seconds, arguments.warm_up, arguments.seed)
        figures = []
        for policy in arguments.policy or POLICIES:
            figures += run_policies(setup, [policy])
            print(_row(figures[-1], None), file=sys.stderr, flush=True)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps([asdict(one) for one in figures], indent=1))
        print(table(figures))
        return 0
    figures = [Figures(**one) for path in arguments.files for one in json.loads(path.read_text())]
    print(table(figures))
    if arguments.plot is not None:
        plot(figures, arguments.plot)
    return 0


def _drop(logger: Any, method: str, event: Any) -> Any:
    raise structlog.DropEvent


def table(figures: Sequence[Figures]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| nodes | load | policy | wait p50 | wait p99 | in system p50 | in system p99 | against full knowledge "
        "| in use | tasks | lost | ran again |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in sorted(figures, key=lambda one: (one.nodes, one.load, POLICIES.index(one.policy))):
        best = [f for f in figures if (f.nodes, f.load, f.policy) == (one.nodes, one.load, "full knowledge")]
        lines.append(_row(one, best[0] if best else None))
    return "\n".join(lines)


def _row(one: Figures, best: Figures | None) -> str:
    ratio = f"{one.system_p99_s / best.system_p99_s:.3f}" if best is not None else "-"
    return (
        f"| {one.nodes:,} | {one.load:.0%} | {one.policy} | {one.wait_p50_s:.3f} s | {one.wait_p99_s:.3f} s "
        f"| {one.system_p50_s:.2f} s | {one.system_p99_s:.2f} s | {ratio} | {one.utilisation:.1%} | {one.tasks:,} "
        f"| {one.lost} | {one.again:,} |"
    )


def plot(figures: Sequence[Figures], path: Path) -> None:
    """Draw p99 waiting over load, one panel for each number of nodes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ngpu"
    from matplotlib import pyplot

    sizes = sorted({one.nodes for one in figures})
    panels, axes = pyplot.subplots(1, len(sizes), figsize=(5 * len(sizes), 4), sharey=True, squeeze=False)
    for axis, nodes in zip(axes[0], sizes, strict=True):
        for policy in POLICIES:
            line = sorted((f.load, f.wait_p99_s) for f in figures if f.nodes == nodes and f.policy == policy)
            axis.plot([100 * load for load, _ in line], [wait for _, wait in line], marker="o", label=policy)
        axis.set(title=f"{nodes:,} nodes", xlabel="load, % of capacity", yscale="log")
    axes[0][0].set_ylabel("p99 waiting, s")
    axes[0][-1].legend(fontsize="small")
    panels.tight_layout()
    panels.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    sys.exit(main())
