"""An engine whose containers' users are none of this machine's (`userns-remap`): what must hold does so there too.

Such an engine is started in namespaces of its own, and tests of other modules run against it, in a pytest of their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import trio

from ngpu_protocol.control import DeploymentPhase
from ngpu_protocol.identity import Account
from tests.integration.node.places import a_place, spec

pytestmark = [pytest.mark.needs_docker, pytest.mark.needs_netns, pytest.mark.needs_gcc]

ROOT = Path(__file__).parents[3]
HERE = "tests/integration/node"
CHOSEN = (
    f"{HERE}/test_containers.py::test_a_workspace_comes_up_confined_and_goes_without_a_trace",
    f"{HERE}/test_containers.py::test_a_crashed_daemons_container_is_adopted_and_one_nobody_wants_removed",
    f"{HERE}/test_confinement.py::test_volumes_are_kept_over_restarts_and_revisions_belong_to_one_workspace_and_go_with_it",
    f"{HERE}/test_confinement.py::test_nothing_of_the_image_or_the_machine_can_be_written",
    f"{HERE}/test_container_gpus.py::test_an_image_without_nvidia_smi_is_looked_at_from_outside",
    f"{HERE}/test_remapped_engine.py::test_where_users_are_remapped",
)
SCRIPT = """
ip link set lo up
trap '.ci/engine stop "$0"' EXIT
DOCKER_HOST=$(NGPU_ENGINE_USERNS=1 .ci/engine start "$0") || exit 1
export DOCKER_HOST NGPU_TEST_REMAPPED=1
"$@"
"""


@pytest.mark.timeout_s(240)
def test_containers_are_confined_kept_adopted_and_get_gpus_where_users_are_remapped() -> None:
    if os.geteuid() != 0 or shutil.which("dockerd", path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
        pytest.skip("an engine of one's own wants root and dockerd")
    folder = Path(tempfile.mkdtemp(prefix="ngpu-", dir="/tmp"))
    folder.chmod(0o711)
    try:
        done = subprocess.run(
            [
                *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("bash", "-c", SCRIPT, str(folder / "e")),
                *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHOSEN),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "7 passed" in done.stdout


if "NGPU_TEST_REMAPPED" in os.environ:  # in the pytest that the test above runs

    def test_where_users_are_remapped(account: Account, image: str) -> None:
        async def main() -> None:
            async with a_place(account) as place:
                place.wish(spec(image, volumes=[{"name": "cache", "path": "/cache"}]))
                await place.until(DeploymentPhase.READY)
                (state,) = await place.engine.containers()
                uids = Path(f"/proc/{state.pid}/status").read_text().partition("\nUid:")[2].split()[:4]  # noqa: ASYNC240
                assert uids == [str(100_000 + 65_534)] * 4, "no user of this machine"
                (finding,) = [f for f in place.containers.findings() if f.subject == "engine's rights"]
                assert "user namespaces" in finding.text
                assert not finding.advice

        trio.run(main)
