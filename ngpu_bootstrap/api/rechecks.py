"""`/api/v1/workspaces/{id}/rechecks`: which of its tasks were run again elsewhere, and what came of it."""

# Annotations are evaluated here: FastAPI reads them.
from pydantic import BaseModel, Field

from ngpu_bootstrap.store.recheck_rows import RecheckRow


class RecheckView(BaseModel):
    """What came of running one task again."""

    task_id: str = Field(description="the client's task")
    workspace: str
    at_ms: int
    outcome: str = Field(
        description="agreed, first_lost, second_lost, not_deterministic, undecided, no_second: docs/trust.md"
    )
    first_node: str
    second_node: str
    third_node: str
    second_task: str = Field(description="the task that ran it again")
    third_task: str
    loser: str = Field(description="the node that two others contradicted; empty: none")


class RechecksView(BaseModel):
    """The last of a workspace's tasks that were run again."""

    deterministic: bool = Field(description="whether its tasks are run again at all")
    counts: dict[str, int] = Field(description="how many came to what, of those that are kept")
    rechecks: list[RecheckView] = Field(description="newest first")


def recheck_view(row: RecheckRow) -> RecheckView:
    """Return what came of one."""
    return RecheckView(
        task_id=row.task_id,
        workspace=row.workspace,
        at_ms=row.at_ms,
        outcome=row.outcome,
        first_node=row.first_node,
        second_node=row.second_node,
        third_node=row.third_node,
        second_task=row.second_task,
        third_task=row.third_task,
        loser=row.loser,
    )
