"""`/api/v1/challenges`: challenge nodes now, and see how that goes and what came of it."""

# Annotations are evaluated here: FastAPI reads them.
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from ngpu_bootstrap.api.documented_calls import ERROR_SHOWN
from ngpu_bootstrap.challenges.desk import ChallengeDesk, Run
from ngpu_bootstrap.errors import Refusal
from ngpu_bootstrap.store.challenge_rows import ChallengeRow
from ngpu_protocol.errors import AddressError
from ngpu_protocol.identity import parse_address


class NewChallenge(BaseModel):
    """Whom to challenge."""

    model_config = ConfigDict(extra="forbid")

    nodes: list[str] = Field(min_length=1, max_length=64, description="nodeAddr of each: all at the same moment")
    gpu: int | None = Field(default=None, ge=0, description="the number of one GPU; null: all the workspace has")


class ChallengeView(BaseModel):
    """What became of one challenge of one GPU."""

    at_ms: int
    gpu: str = Field(description="its name in receipts")
    model: str = Field(description="as claimed")
    memory_bytes: int = Field(description="as claimed")
    finding: str = Field(description="`good`, or what is wrong: docs/trust.md says what each means")
    detail: str
    product_ms: int = Field(description="to the commitment to the product; 0 when it did not come")
    product_limit_ms: int = Field(description="what a GPU of that model may take")
    chains_ms: int
    chains_limit_ms: int
    task_id: str = Field(description="of the order that began it; empty when none went out")


class ChallengeRunView(BaseModel):
    """How the challenge of one node goes."""

    id: str
    node_addr: str
    phase: str = Field(
        description="waiting, preparing (its workspace comes up there), idle (its tasks end), product, chains, "
        "opening, checking, done"
    )
    problem: str = Field(description="why it could not be held; says nothing about the node")
    challenges: list[ChallengeView]


class ChallengeRunsView(BaseModel):
    """The challenges begun, in the order of the nodes."""

    runs: list[ChallengeRunView]


def challenge_view(row: ChallengeRow) -> ChallengeView:
    """Return what became of one."""
    return ChallengeView(
        at_ms=row.at_ms,
        gpu="0x" + row.gpu.hex(),
        model=row.model,
        memory_bytes=row.memory_bytes,
        finding=row.finding,
        detail=row.detail,
        product_ms=row.product_ms,
        product_limit_ms=row.product_limit_ms,
        chains_ms=row.chains_ms,
        chains_limit_ms=row.chains_limit_ms,
        task_id=row.task_id,
    )


def _run_view(run: Run) -> ChallengeRunView:
    rows = sorted((outcome.row for outcome in run.outcomes), key=lambda row: row.gpu)
    return ChallengeRunView(
        id=run.id,
        node_addr=run.node,
        phase=run.phase,
        problem=run.problem,
        challenges=[challenge_view(row) for row in rows],
    )


def add_challenge_calls(
    app: FastAPI, desk: ChallengeDesk, *, may_start: Sequence[Any], may_read: Sequence[Any], errors: Any
) -> None:
    """Give *app* the calls about challenges."""

    @app.post(
        "/api/v1/challenges", status_code=202, tags=["nodes"], dependencies=may_start,
        responses={**errors, 409: {**ERROR_SHOWN, "description": "none can be held there now"}},
    )  # fmt: skip
    async def challenge_nodes(asked: NewChallenge) -> ChallengeRunsView:
        """Challenge nodes now, at one moment: their GPUs show that they are what they claim, or do not."""
        try:
            nodes = list(dict.fromkeys(parse_address(node) for node in asked.nodes))
        except AddressError as error:
            raise Refusal(400, "bad_node_addr", f"not a nodeAddr: {error}") from None
        return ChallengeRunsView(runs=[_run_view(run) for run in desk.begin(nodes, asked.gpu)])

    @app.get("/api/v1/challenges/{run_id}", tags=["nodes"], dependencies=may_read, responses=errors)
    async def get_challenge(run_id: str) -> ChallengeRunView:
        """How one goes; what came of it stands with the node as well (`/api/v1/nodes/{node_addr}`)."""
        run = desk.run_of(run_id)
        if run is None:
            raise Refusal(
                404, "challenge_unknown", "no such challenge is remembered; its node's page has the last ones"
            )
        return _run_view(run)
