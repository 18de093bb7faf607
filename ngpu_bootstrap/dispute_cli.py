"""The commands about receipts that were not accepted: `ngpu-bootstrap dispute`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ngpu_bootstrap.cli_options import settings_of
from ngpu_bootstrap.config import DEFAULT_DATA_DIR
from ngpu_daemon.dispute_cli import dispute_commands
from ngpu_daemon.disputes import Evidence


@contextmanager
def _evidence(config: Path | None, data_dir: Path | None) -> Iterator[Evidence]:
    from ngpu_bootstrap.disputes import open_evidence

    with open_evidence(settings_of(config, data_dir=data_dir)) as evidence:
        yield evidence


dispute_app = dispute_commands(
    "Receipts that were not accepted, and chains that do not add up, with the evidence.",
    "node",
    str(DEFAULT_DATA_DIR),
    _evidence,
)
