"""Rounds of challenges: nodes made ready, held back from tasks, challenged at one moment, and what followed recorded.

Owns the life of a round and what is remembered of every GPU. Whom and when is `policy`'s decision, how one challenge
goes is `conversation`'s. A workspace with an image visits the node for the time of the round and gives the GPU back.

What keeps a challenge from being held at all (the GPU has another workspace, the image does not come, a model that no
table knows) says nothing about the node: it is shown, tried again later, and not recorded. Where no GPU was free, the
challenge stands in line for it: it takes one from nobody, and is the first to have it when it comes free.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import structlog
import trio

from ngpu_bootstrap.challenges import policy
from ngpu_bootstrap.challenges.checking import CheckFailed, Checking
from ngpu_bootstrap.challenges.conversation import Claim, OtherVersion, Reply, Told, challenge
from ngpu_bootstrap.config import ChallengesSection
from ngpu_bootstrap.dispatch.errands import Errands
from ngpu_bootstrap.errors import Refusal
from ngpu_bootstrap.metrics import Metrics
from ngpu_bootstrap.registry.nodes import Nodes, NodeSession
from ngpu_bootstrap.registry.standings import Standings
from ngpu_bootstrap.registry.workspaces import Workspace, Workspaces
from ngpu_bootstrap.store import challenge_rows
from ngpu_bootstrap.store.challenge_rows import ChallengeRow
from ngpu_bootstrap.store.errors import StoreError
from ngpu_bootstrap.store.store import Store
from ngpu_protocol.challenge.puzzle import bound_seed, sized
from ngpu_protocol.challenge.speeds import Allowed, Speed, allowed, depth_for, speed_of, too_large, too_small
from ngpu_protocol.challenge.verification import Finding, Judgement
from ngpu_protocol.control import DeploymentPhase
from ngpu_protocol.gpu_models import canonical_gpu_model
from ngpu_protocol.identity import Address
from ngpu_protocol.workspaces import WorkspaceSpec

log = structlog.get_logger(__name__)

API = "challenge"
RULE = "challenge"
LOOK_S = 5.0
# How often the wallets that nodes name are read anew, and what siblings recorded.
RELOAD_S = 60.0
ROUNDS_AT_ONCE = 4
RUNS_KEPT = 256
# A node that cannot get the image for want of room says so within this.
PLACED_S = 10.0
# What a round takes beside waiting for the image and for tasks to end; a claim that outlives it is nobody's.
ROUND_S = 1200.0
WAIT_LOOK_S = 0.05
RELEASE_S = 5.0
ANSWER_BYTES = 1 << 20
JSON = [(b"content-type", b"application/json")]


class NotHeld(Exception):
    """The challenge could not be held, for no fault of the node's; the text says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one GPU's challenge, with what follows for its node."""

    row: ChallengeRow
    consequence: policy.Consequence

    @property
    def is_good(self) -> bool:
        return self.row.finding == Finding.GOOD


@dataclass(eq=False, slots=True)
class Run:
    """One node's part of a round, kept for a while for whoever asked for it.

    Attributes:
        only: the number of the one GPU that is challenged, None for all that the workspace has.
        phase: what it is at, `done` at the end.
        problem: why it could not be held; empty when it was.
        over: set at the end.
    """

    id: str
    node: Address
    only: int | None = None
    phase: str = "waiting"
    problem: str = ""
    outcomes: list[Outcome] = field(default_factory=list)
    over: trio.Event = field(default_factory=trio.Event)


@dataclass(frozen=True, slots=True)
class _Prepared:
    run: Run
    session: NodeSession
    spec: WorkspaceSpec
    claims: list[Claim]


class ChallengeDesk:
    """Challenges nodes. Its `run` must be running for as long as it is used.

    Args:
        own: this bootstrap's address.
        secret: 32 bytes of this bootstrap's own: what nobody else knows decides when.
        wallets: whom each node's work pays, by its own signature.
        refresh: has what nodes should run worked out anew.
        lacking: why a workspace has not all nodes it wants, in words; empty when it has.
    """

    def __init__(
        self,
        settings: ChallengesSection,
        *,
        own: Address,
        secret: bytes,
        nodes: Nodes,
        workspaces: Workspaces,
        standings: Standings,
        store: Store,
        errands: Errands,
        metrics: Metrics,
        wallets: Callable[[], Awaitable[Mapping[Address, str]]],
        refresh: Callable[[], None],
        lacking: Callable[[Workspace], str],
        now_ms: Callable[[], int],
        checking: Checking | None = None,
    ) -> None:
        self._settings = settings
        self._own = own
        self._secret = secret
        self._nodes = nodes
        self._workspaces = workspaces
        self._standings = standings
        self._store = store
        self._errands = errands
        self._metrics = metrics
        self._read_wallets = wallets
        self._refresh = refresh
        self._lacking = lacking
        self._now_ms = now_ms
        self._check = checking or Checking()
        self._rules = policy.Rules(
            trusted_ms=int(settings.interval_s * 1000),
            suspect_ms=int(settings.suspect_interval_s * 1000),
            at_once=settings.at_once,
        )
        self._speeds = {
            each.model: Speed(each.tflops * 1e12, each.gbytes_per_s * 1e9, each.memory_gib, "the operator")
            for each in settings.speeds
        }
        self._pasts: dict[Address, dict[bytes, policy.Past]] = {}
        self._wallets: Mapping[Address, str] = {}
        self._not_before_ms: dict[Address, int] = {}
        self._visits: dict[str, set[Address]] = {}
        self._in_line: dict[Address, str] = {}
        self._under_way: dict[Address, Run] = {}
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._rounds = 0
        self._nursery: trio.Nursery | None = None

    # -- what others ask

    @property
    def is_offered(self) -> bool:
        """Whether nodes can be challenged at all."""
        return bool(self._settings.workspaces)

    def only_on(self, workspace: str) -> Collection[Address] | None:
        """Return the nodes that a workspace of challenges visits now; None for every other workspace."""
        if workspace not in self._settings.workspaces:
            return None
        waiting = {node for node, wanted in self._in_line.items() if wanted == workspace}
        return waiting | self._visits.get(workspace, set())

    def last(self, node: Address) -> tuple[str, int]:
        """Return the worst of what the GPUs of *node* last showed, and when; an empty text when nothing is known."""
        pasts = self._pasts.get(node, {}).values()
        worst = min(pasts, key=lambda past: (past.finding == Finding.GOOD, -past.at_ms), default=policy.NOTHING)
        return worst.finding, worst.at_ms

    def run_of(self, name: str) -> Run | None:
        """Return what is known of a run, None when nothing is (any more)."""
        return self._runs.get(name)

    def begin(self, nodes: Collection[Address], gpu: int | None = None) -> list[Run]:
        """Challenge *nodes* now, at one moment, due or not.

        Raises:
            Refusal: there is no workspace for it, one of them is not connected or offers no such GPU, or is being
                challenged.
        """
        if self._nursery is None or not self.is_offered:
            raise Refusal(
                409,
                "challenges_off",
                "no workspace answers challenges here: make one of examples/challenge and name it in [challenges] "
                "workspaces",
            )
        for node in nodes:
            session = self._nodes.get(node)
            if session is None or not session.admitted:
                raise Refusal(409, "node_away", f"node {node} is not connected, or not admitted")
            if gpu is not None and not 0 <= gpu < len(session.gpus):
                raise Refusal(404, "gpu_unknown", f"node {node} offers {len(session.gpus)} GPUs, numbered from 0")
            if node in self._under_way:
                raise Refusal(409, "challenge_under_way", f"node {node} is being challenged already")
        return self._begin(nodes, gpu)

    # -- the service

    async def load(self) -> None:
        """Read what earlier challenges found from the store."""
        pasts: dict[Address, dict[bytes, policy.Past]] = {}
        for node, gpu, finding, at_ms in await self._store.look_over(challenge_rows.findings):
            of_node = pasts.setdefault(node, {})
            of_node[gpu] = of_node.get(gpu, policy.NOTHING).after(Finding(finding), at_ms)
        self._pasts = pasts
        self._wallets = await self._read_wallets()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Begin rounds when nodes are due; for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            reload_at_s = trio.current_time()
            while True:
                await trio.sleep(LOOK_S)
                if not (self.is_offered and self._settings.automatic) or self._rounds >= ROUNDS_AT_ONCE:
                    continue
                try:
                    if trio.current_time() >= reload_at_s:
                        reload_at_s = trio.current_time() + RELOAD_S
                        await self.load()
                except StoreError as error:
                    log.error("challenges_not_read", reason=str(error))
                    continue
                if not self._due():
                    continue
                try:
                    await self.load()  # a bootstrap of the same database may have challenged them since
                except StoreError as error:
                    log.error("challenges_not_read", reason=str(error))
                    continue
                if due := self._due():
                    self._begin(due, None, automatic=True)

    def _due(self) -> list[Address]:
        candidates, now_ms = list(self._candidates()), self._now_ms()
        # a place in line keeps a GPU free once it is: nobody holds one for a challenge that is hours away
        self._leave_line(one.node for one in candidates if not policy.is_due(one, self._rules, now_ms, self._chance))
        return policy.next_round(candidates, self._rules, now_ms, self._chance)

    def _leave_line(self, nodes: Iterable[Address]) -> None:
        """Take *nodes* out of the line: others may have what was kept for their challenges."""
        left = [node for node in nodes if self._in_line.pop(node, None) is not None]
        if left:
            self._refresh()

    def _candidates(self) -> Iterator[policy.Candidate]:
        now_ms = self._now_ms()
        here = {session.node for session in self._nodes}
        self._in_line = {node: wanted for node, wanted in self._in_line.items() if node in here}
        self._not_before_ms = {node: at_ms for node, at_ms in self._not_before_ms.items() if at_ms > now_ms}
        for session in self._nodes:
            if session.node in self._under_way or not session.admitted or session.draining or not session.reported:
                continue
            yield policy.Candidate(
                node=session.node,
                gpus=[(gpu.id, canonical_gpu_model(gpu.model, gpu.memory_bytes)) for gpu in session.gpus],
                pasts=self._pasts.get(session.node, {}),
                score=self._standings.in_short(session.node)[0],
                ip=session.ip,
                wallet=self._wallets.get(session.node, ""),
                not_before_ms=0 if self._has_its_turn(session) else self._not_before_ms.get(session.node, 0),
            )

    def _has_its_turn(self, session: NodeSession) -> bool:
        """Whether the challenge that stood in line for a GPU of the node has it now."""
        return self._in_line.get(session.node, "") in session.assigned

    def _chance(self, gpu: bytes, past: policy.Past) -> float:
        drawn = hmac.digest(self._secret, b"challenge" + gpu + past.at_ms.to_bytes(8, "big"), hashlib.sha256)
        return int.from_bytes(drawn[:7], "big") / 2.0**56

    def _begin(self, nodes: Collection[Address], gpu: int | None, *, automatic: bool = False) -> list[Run]:
        assert self._nursery is not None
        runs = [Run(secrets.token_hex(8), node, gpu) for node in nodes]
        for run in runs:
            self._under_way[run.node] = run
            self._runs[run.id] = run
        while len(self._runs) > RUNS_KEPT:
            self._runs.popitem(last=False)
        self._rounds += 1
        self._nursery.start_soon(self._contained, runs, automatic)
        return runs

    async def _contained(self, runs: list[Run], automatic: bool) -> None:
        """Carry out a round; what goes wrong with it stays with it."""
        try:
            await self._claimed(runs, automatic)
        except StoreError as error:
            log.error("challenge_not_recorded", reason=str(error))
            _give_up(runs, "the store failed; it will be tried again")
        except Exception:
            log.exception("challenge_crashed")  # ours to mend, and no reason to end the daemon
            _give_up(runs, "the bootstrap failed to hold it; its operator's log says why")
        finally:
            self._rounds -= 1
            for run in runs:
                if run.problem:
                    self._not_before_ms[run.node] = self._now_ms() + policy.RETRY_MS
                    log.info("challenge_not_held", node=run.node, reason=run.problem)
                self._under_way.pop(run.node, None)
                run.phase = "done"
                run.over.set()

    # -- one round

    async def _claimed(self, runs: list[Run], automatic: bool) -> None:
        """Carry out a round with those of its nodes that no other bootstrap of this database challenges.

        Args:
            automatic: leave out those that one of them has challenged just before.
        """
        nodes = [run.node for run in runs]
        for_ms = int((self._settings.deploy_wait_s + self._settings.idle_wait_s + ROUND_S) * 1000)
        try:
            mine = await self._store.chore(
                lambda connection: challenge_rows.claim(connection, self._own, nodes, for_ms)
            )
            _give_up([run for run in runs if run.node not in mine], "another bootstrap of this database challenges it")
            wanted = mine
            if automatic:
                last = {node: self.last(node)[1] for node in nodes}
                await self.load()
                wanted = frozenset(node for node in mine if self.last(node)[1] == last[node])
                done = [run for run in runs if run.node in mine - wanted]
                _give_up(done, "another bootstrap of this database has just challenged it")
            self._leave_line(node for node in nodes if node not in wanted)
            await self._round([run for run in runs if run.node in wanted])
        finally:
            with trio.move_on_after(RELEASE_S, shield=True), suppress(StoreError):
                await self._store.chore(lambda connection: challenge_rows.release(connection, self._own, nodes))

    async def _round(self, runs: list[Run]) -> None:
        prepared: list[_Prepared] = []
        try:

            async def prepare(run: Run) -> None:
                try:
                    prepared.append(await self._prepare(run))
                except NotHeld as error:
                    run.problem = str(error)

            async with trio.open_nursery() as nursery:
                for run in runs:
                    nursery.start_soon(prepare, run)
            with self._held([one.session for one in prepared]):
                idle = [one for one in prepared if await self._is_idle(one)]
                # one moment for all: a card that answers for two claims has twice the work in the same time
                async with trio.open_nursery() as nursery:
                    for one in idle:
                        for claim in one.claims:
                            nursery.start_soon(self._one, one, claim)
        finally:
            for visited in self._visits.values():
                visited.difference_update(run.node for run in runs)
            self._refresh()

    @contextmanager
    def _held(self, sessions: Collection[NodeSession]) -> Iterator[None]:
        """Keep tasks from the nodes meanwhile: neither measures the other."""
        try:
            for session in sessions:
                self._nodes.hold(session, challenged=True)
            yield
        finally:
            for session in sessions:
                self._nodes.hold(session, challenged=False)

    async def _prepare(self, run: Run) -> _Prepared:
        """Return the node with a workspace that is ready on it.

        Raises:
            NotHeld: why there is none.
        """
        run.phase = "preparing"
        session = self._nodes.get(run.node)
        if session is None:
            raise NotHeld("the node has left")
        if not session.gpus:
            raise NotHeld("it offers no GPU")
        workspace = self._workspace_for(session)
        self._in_line.pop(run.node, None)
        spec = workspace.spec
        if spec.is_image:
            self._visits.setdefault(workspace.id, set()).add(run.node)
            self._refresh()
        began_s = trio.current_time()
        while True:
            state = session.deployments.get(workspace.id)
            if state is not None and state.state == DeploymentPhase.READY and workspace.id in session.assigned:
                break
            if self._nodes.get(run.node) is not session:
                raise NotHeld("the node has left")
            if state is not None and state.state == DeploymentPhase.FAILED:
                raise NotHeld(f"its workspace failed there: {state.detail or state.reason}")
            waited_s = trio.current_time() - began_s
            if workspace.id not in session.assigned and waited_s > PLACED_S:
                if self._settings.automatic:
                    self._in_line[run.node] = workspace.id
                raise NotHeld(f"its workspace finds no place there: {self._lacking(workspace) or 'nobody said why'}")
            if waited_s > self._settings.deploy_wait_s:
                raise NotHeld(f"its workspace was not ready there within {self._settings.deploy_wait_s:g} s")
            await trio.sleep(WAIT_LOOK_S)
        claims = [claim for claim in _claims(session, state.gpus) if run.only in (None, _place(session, claim))]
        if not claims:
            raise NotHeld("the workspace was given another GPU than the one that was to be challenged")
        return _Prepared(run, session, spec, claims)

    def _workspace_for(self, session: NodeSession) -> Workspace:
        """Return the workspace to challenge *session* with: of a model server it offers, else of the most GPUs."""
        offered = {f"{offer.project}/{offer.model}" for offer in session.services if offer.copies > 0}
        best: Workspace | None = None
        for name in self._settings.workspaces:
            workspace = self._workspaces.get(name)
            if workspace is None:
                continue
            spec = workspace.spec
            if spec.service is not None and spec.service in offered:
                return workspace
            fits = spec.is_image and spec.gpu_count <= len(session.gpus)
            if fits and (best is None or spec.gpu_count > best.spec.gpu_count):
                best = workspace
        if best is None:
            raise NotHeld("none of the workspaces in [challenges] fits the node")
        return best

    async def _is_idle(self, one: _Prepared) -> bool:
        one.run.phase = "idle"
        with trio.move_on_after(self._settings.idle_wait_s):
            while True:
                if not one.session.total_in_flight:
                    return True
                await trio.sleep(WAIT_LOOK_S)
        one.run.problem = f"its tasks did not end within {self._settings.idle_wait_s:g} s"
        return False

    async def _one(self, one: _Prepared, claim: Claim) -> None:
        """Challenge one GPU and record what came of it; what goes wrong with it ends no other's."""
        try:
            await self._challenge(one, claim)
        except StoreError as error:
            log.error("challenge_not_recorded", node=claim.node, reason=str(error))
            one.run.problem = "the store failed; it will be tried again"
        except Exception:
            log.exception("challenge_crashed", node=claim.node)  # ours to mend
            one.run.problem = "the bootstrap failed to hold it; its operator's log says why"

    async def _challenge(self, one: _Prepared, claim: Claim) -> None:
        speed = speed_of(claim.model, self._speeds)
        if speed is None:
            one.run.problem = f"how fast {claim.model} is stands in no table: add it to [[challenges.speeds]]"
            return
        if too_small(claim.memory_bytes, speed):
            one.run.problem = f"it offers too little of a {claim.model} for the time to say anything"
            return
        limits = Allowed(0.0, 0.0)
        if too_large(claim.memory_bytes, speed):
            told = Told(Judgement(Finding.TOO_LARGE, f"{claim.memory_bytes} bytes; {speed.memory_gib} GiB at most"))
        else:
            nonce = secrets.token_bytes(32)
            settings = self._settings
            try:
                puzzle = sized(
                    bound_seed(nonce, claim.node, claim.gpu),
                    claim.memory_bytes,
                    part=settings.memory_part,
                    depth=depth_for(settings.depth, claim.memory_bytes, speed),
                    steps=settings.steps,
                )
            except ValueError as error:
                one.run.problem = str(error)
                return
            limits = allowed(puzzle, speed)
            limits = Allowed(limits.product_s * settings.tolerance, limits.chains_s * settings.tolerance)
            if limits.product_s > one.spec.request_timeout_s:
                one.run.problem = (
                    f"a {claim.model} may take {limits.product_s:.0f} s, the challenge's workspace lets nothing take "
                    f"longer than {one.spec.request_timeout_s:g} s: raise its request_timeout_s"
                )
                return

            async def ask(method: str, path: str, body: bytes, timeout_s: float) -> Reply:
                return await self._ask(one, method, path, body, timeout_s)

            def say(phase: str) -> None:
                one.run.phase = phase

            try:
                told = await challenge(claim, puzzle, nonce, limits, ask, self._check, say)
            except OtherVersion as error:
                log.warning("challenge_of_another_version", node=claim.node, workspace=one.spec.id)
                one.run.problem = str(error)
                return
            except CheckFailed as error:
                log.error("challenge_not_checked", node=claim.node, reason=str(error))
                one.run.problem = str(error)
                return
        await self._record(one.run, claim, told, limits)

    async def _ask(self, one: _Prepared, method: str, path: str, body: bytes, timeout_s: float) -> Reply:
        errand = await self._errands.run(
            one.session,
            one.spec,
            api=API,
            method=method,
            target=path,
            body=body,
            headers=JSON,
            timeout_s=timeout_s,
            answer_bytes=ANSWER_BYTES,
        )
        return Reply(
            errand.status,
            errand.body,
            errand.seconds,
            errand.task_id,
            errand.is_late,
            "" if errand.status else errand.problem,
        )

    async def _record(self, run: Run, claim: Claim, told: Told, limits: Allowed) -> None:
        """Store what became of a challenge, and let the node's standing know."""
        of_node = self._pasts.setdefault(claim.node, {})
        before = of_node.get(claim.gpu)
        if before is None:
            # a GPU may come under a new name each time: it inherits the silence of those that are gone
            session = self._nodes.get(claim.node)
            offered = {gpu.id for gpu in session.gpus} if session is not None else {claim.gpu}
            gone = (past.silences for name, past in of_node.items() if name not in offered)
            before = policy.Past(silences=max(gone, default=0))
        finding, now_ms = told.judgement.finding, self._now_ms()
        follows = policy.consequence(finding, before)
        row = ChallengeRow(
            bootstrap=self._own,
            node=claim.node,
            gpu=claim.gpu,
            at_ms=now_ms,
            model=claim.model[:128],
            memory_bytes=claim.memory_bytes,
            finding=finding.value,
            detail=told.judgement.detail[:500],
            product_ms=int(told.product_s * 1000),
            product_limit_ms=int(limits.product_s * 1000),
            chains_ms=int(told.chains_s * 1000),
            chains_limit_ms=int(limits.chains_s * 1000),
            task_id=told.task_id,
        )
        await self._store.chore(lambda connection: challenge_rows.add(connection, row))
        self._metrics.challenged(finding.value)
        of_node[claim.gpu] = before.after(finding, now_ms)
        if follows.good:
            self._standings.spoken_for(claim.node, follows.good)
        if follows.disputes:
            self._standings.disputed(claim.node, rule=RULE, task_id=told.task_id, times=follows.disputes)
        run.outcomes.append(Outcome(row, follows))
        log.info(
            "challenged",
            node=claim.node,
            model=claim.model,
            finding=finding.value,
            detail=told.judgement.detail,
            product_s=round(told.product_s, 2),
            chains_s=round(told.chains_s, 2),
        )


def _claims(session: NodeSession, held: Collection[bytes]) -> Iterator[Claim]:
    """Yield the GPUs that the workspace has, as it numbers them: a container its own, a model server all there are."""
    offers = {gpu.id: gpu for gpu in session.gpus}
    for number, name in enumerate(held or offers):
        if (gpu := offers.get(name)) is not None:
            yield Claim(session.node, gpu.id, gpu.model, gpu.memory_bytes, number)


def _place(session: NodeSession, claim: Claim) -> int:
    """Return the number of the claim's GPU among all that the node offers."""
    return next(number for number, gpu in enumerate(session.gpus) if gpu.id == claim.gpu)


def _give_up(runs: Collection[Run], problem: str) -> None:
    for run in runs:
        run.problem = run.problem or problem
