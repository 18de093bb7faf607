"""The line for GPUs that other work holds: who stands in it, and until when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ngpu_bootstrap.challenges.desk import ChallengeDesk
from ngpu_bootstrap.challenges.policy import Past
from ngpu_bootstrap.config import ChallengesSection
from ngpu_protocol.challenge.verification import Finding
from ngpu_protocol.identity import Address

NODE = Address(f"0x{1:040x}")
GPU = bytes(32)
NOW_MS = 1_800_000_000_000


def test_a_node_that_is_no_longer_due_leaves_the_line_and_its_gpu_is_free_for_others() -> None:
    gpu = SimpleNamespace(id=GPU, model="H200", memory_bytes=1 << 37)
    session = SimpleNamespace(
        node=NODE, gpus=[gpu], admitted=True, draining=False, reported=True, ip="", assigned={}, load=None
    )
    refreshed: list[None] = []
    parts: dict[str, Any] = dict.fromkeys(
        ("workspaces", "store", "errands", "metrics", "wallets", "lacking", "checking")
    )
    desk = ChallengeDesk(
        ChallengesSection(workspaces=["7"]),
        own=NODE,
        secret=bytes(32),
        nodes=[session],  # type: ignore[arg-type]
        standings=SimpleNamespace(in_short=lambda node: (1.0, 0)),  # type: ignore[arg-type]
        refresh=lambda: refreshed.append(None),
        now_ms=lambda: NOW_MS,
        **parts,
    )
    desk._in_line[NODE] = "7"
    assert desk._due() == [NODE]
    assert desk.only_on("7") == {NODE}
    assert not refreshed
    desk._pasts = {NODE: {GPU: Past(NOW_MS, Finding.GOOD.value, 9)}}  # a sibling has challenged it
    assert desk._due() == []
    assert desk.only_on("7") == set()
    assert refreshed == [None]
