"""The bootstrap dies at each step a task takes, with clients that try again: nothing is lost, nothing runs twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from ngpu_bootstrap.kill_points import POINTS
from tests.support.crash_rounds import crash_rounds


@pytest.mark.timeout_s(400)
def test_death_at_any_point_loses_no_acknowledged_task_and_runs_none_again_once_answered(tmp_path: Path) -> None:
    account = trio.run(crash_rounds, tmp_path)
    assert account.is_clean, account.summary()
    assert account.deaths == dict.fromkeys(POINTS, 1)
    assert len(account.acknowledged) > len(POINTS)
