"""`/api/v1/tasks/{id}/placement`: why each attempt of a task went where it did, as JSON."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, Field

from ngpu_bootstrap.scheduling.placement import Placement


class CandidateView(BaseModel):
    """A node as the choice saw it."""

    node_addr: str
    chosen: bool
    excluded: str = Field(description="why it was passed over; empty when it could have been chosen")
    compared: bool = Field(description="whether it was among those drawn by chance and compared")
    gpu_rank: int = Field(description="place of its GPUs in the workspace's gpu_types, 0 first")
    slots: int
    in_use: int
    expected_s: float = Field(description="expected finish, handicapped by failures and standing: the least wins")


class PlacementView(BaseModel):
    """Why one attempt went where it did."""

    attempt: int
    node_addr: str
    at_ms: int
    why: str = Field(
        description="ranked; only_one (had a free slot, of those drawn); affinity (its key sticks there); "
        "all_set_aside; checked (a task that looks into that very node)"
    )
    candidates_at_ms: int | None = Field(
        description="when the candidates that were not compared stood so; null when only those compared are known"
    )
    candidates: list[CandidateView]
    left_out: dict[str, int] = Field(
        default_factory=dict,
        description='how many candidates more there were, by why they were passed over; key "": they could have been '
        "chosen. Of a placement read from the database 64 candidates are named",
    )


class PlacementsView(BaseModel):
    """The placements of a task that are still known, first attempt first."""

    task_id: str
    queue_position: int | None = Field(description="how many wait before it; null when it does not wait")
    placements: list[PlacementView]


def placements_view(task_id: str, position: int | None, placements: Sequence[Placement]) -> PlacementsView:
    """Return placements as JSON values."""
    return PlacementsView(
        task_id=task_id, queue_position=position, placements=[_placement_view(one) for one in placements]
    )


def _placement_view(placement: Placement) -> PlacementView:
    return PlacementView(
        attempt=placement.attempt,
        node_addr=placement.node,
        at_ms=placement.at_ms,
        why=placement.why,
        candidates_at_ms=placement.candidates_at_ms,
        candidates=[
            CandidateView(
                node_addr=one.node,
                chosen=one.node == placement.node,
                excluded=one.excluded or "",
                compared=one.compared,
                gpu_rank=one.rank,
                slots=one.slots,
                in_use=one.in_use,
                expected_s=round(one.expected_s, 6),
            )
            for one in placement.candidates
        ],
        left_out=dict(placement.left_out),
    )
