"""Our own path as a system of the benchmark: a bootstrap, one node, the shared workspace registered beside the node.

Everything is as an operator would have it: durable commits, orders signed, receipts verified, stored and acknowledged.
After the load the bootstrap's database is read to see that none is missing.
"""

import sqlite3
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from examples.demo.network import MODEL, PROJECT, LocalNetwork, Workspace
from tests.bench.report import Receipts
from tests.bench.streams import Endpoint
from tests.bench.systems import System

PORT = 8000
SLOTS = 256
SETTLE_S = 20.0
_SPECIFICATION = f"""\
name = "bench"
service = "{PROJECT}/{MODEL}"
ports = [{PORT}]
concurrency = {SLOTS}
readiness_path = "/health"
"""


class ReceiptsMissing(Exception):
    """The store does not hold what it should; the message says what is missing."""


class Ours:
    """The running network; `system` is what to measure.

    Args:
        folder: a directory for it.
        upstream: the workspace's URL.
    """

    def __init__(self, folder: Path, upstream: str) -> None:
        self._network = LocalNetwork(folder, nodes=1, docker=False, say=lambda text: None, slots=SLOTS)
        self._upstream = upstream
        self.system = System("ngpu", Endpoint("", {}))

    def __enter__(self) -> Self:
        try:
            self._network.start()
            self._network.register_model_server(self._network.nodes[0], self._upstream)
            workspace = self._network.add_workspace(_SPECIFICATION)
            self._network.wait_deployed(workspace)
        except BaseException:
            self._network.stop()
            raise
        self.system = self._system(workspace)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._network.stop()

    def _system(self, workspace: Workspace) -> System:
        endpoint = Endpoint(f"{self._network.url}/proxy/{PORT}", workspace.headers)
        bootstrap, node = self._network.bootstrap, self._network.nodes[0]
        assert bootstrap is not None
        assert bootstrap.process is not None
        assert node.process is not None
        return System("ngpu", endpoint, [bootstrap.process, node.process])

    def receipts(self, answered: int) -> Receipts:
        """Return what the bootstrap's store holds, once the last of *answered* requests is filed.

        Raises:
            ReceiptsMissing: fewer after `SETTLE_S`.
        """
        assert self._network.bootstrap is not None
        database = self._network.bootstrap.folder / "data" / "bootstrap.db"
        deadline = time.monotonic() + SETTLE_S
        while True:
            verdicts, stored = _read(database)
            if verdicts.get("verified", 0) >= answered or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        verified = verdicts.pop("verified", 0)
        if verified < answered:
            raise ReceiptsMissing(f"{answered} requests were answered, {verified} receipts are verified and stored")
        return Receipts(answered=answered, stored=stored, verified=verified, others=verdicts)


def _read(database: Path) -> tuple[dict[str, int], int]:
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10)
    try:
        verdicts = dict(connection.execute("SELECT verdict, count(*) FROM receipts GROUP BY verdict"))
        (stored,) = connection.execute("SELECT count(*) FROM tasks").fetchone()
    finally:
        connection.close()
    return verdicts, stored
