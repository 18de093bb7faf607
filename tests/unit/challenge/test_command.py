"""What `ngpu-bootstrap challenge` prints."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from ngpu_bootstrap import challenge_cli

GOOD = {
    "finding": "good",
    "model": "H200",
    "memory_bytes": 150_754_820_096,
    "product_ms": 7160,
    "product_limit_ms": 9700,
    "chains_ms": 680,
    "chains_limit_ms": 1000,
    "detail": "",
}


def run(phase: str, *challenges: dict[str, Any], problem: str = "") -> dict[str, Any]:
    return {
        "id": "a",
        "node_addr": "0x" + "11" * 20,
        "phase": phase,
        "problem": problem,
        "challenges": list(challenges),
    }


def shown(*runs: dict[str, Any]) -> str:
    text = StringIO()
    Console(file=text, width=200).print(challenge_cli._table(list(runs)))
    return text.getvalue()


def test_the_table_has_the_verdict_and_both_times() -> None:
    late = {**GOOD, "finding": "late_chains", "product_ms": 0, "detail": "too slow"}
    text = shown(run("done", GOOD, late), run("done", problem="its GPU has other work"))
    for words in ("140.4 GiB", "good", "7.16 of 9.70 s", "0.68 of 1.00 s", "late chains", "none", "too slow"):
        assert words in text
    assert "not held" in text
    assert "its GPU has other work" in text


def test_each_phase_is_said_once_until_all_are_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(challenge_cli, "LOOK_S", 0.0)
    phases = iter(["product", "product", "chains", "done"])
    found = challenge_cli._followed(lambda name: run(next(phases)), [run("waiting")], quiet=False)
    assert [one["phase"] for one in found] == ["done"]
    said = [line.split("  ")[1] for line in capsys.readouterr().err.splitlines()]
    assert said == ["waits", "it multiplies", "it follows the chains", "done"]
