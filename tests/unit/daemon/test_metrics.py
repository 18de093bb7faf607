"""The exposition that both daemons serve."""

from __future__ import annotations

from prometheus_client import Counter
from prometheus_client.parser import text_string_to_metric_families

from ngpu_daemon.metrics import exposition, new_registry, software_version


def test_a_registry_reports_build_process_and_what_is_added() -> None:
    registry = new_registry("ngpu-node")
    Counter("ngpu_tasks", "Tasks.", ["state"], registry=registry).labels("finished").inc(2)
    families = {family.name: family for family in text_string_to_metric_families(exposition(registry).decode())}
    assert families["ngpu_build_info"].samples[0].labels == {"daemon": "ngpu-node", "version": software_version()}
    assert [sample.value for sample in families["ngpu_tasks"].samples if sample.name == "ngpu_tasks_total"] == [2]
    assert "process_resident_memory_bytes" in families


def test_two_daemons_in_one_process_share_nothing() -> None:
    one, other = new_registry("ngpu-node"), new_registry("ngpu-bootstrap")
    Counter("ngpu_only_here", "One.", registry=one)
    assert b"ngpu_only_here" not in exposition(other)
