"""The check of what a prover opened, without a GPU: in a process of its own (`judge_child` says why), one at a time."""

from __future__ import annotations

import json
import sys

import trio

from ngpu_bootstrap.errors import BootstrapError
from ngpu_protocol.challenge.puzzle import Puzzle
from ngpu_protocol.challenge.verification import Commitment, Finding, Judgement, Spots

# A full-size check takes 4 s of a core; this is for a machine that is busy with other things.
LONGEST_S = 180.0


class CheckFailed(BootstrapError):
    """The openings could not be checked: ours to mend, and nothing against the node."""


class Checking:
    """Checks openings."""

    def __init__(self) -> None:
        self._one = trio.CapacityLimiter(1)

    async def __call__(
        self, puzzle: Puzzle, committed: Commitment, spots: Spots, opened: bytes, vector: list[int], salt: bytes
    ) -> Judgement:
        """Return what the openings are worth.

        Args:
            salt: of the chains.
            opened: JSON as it came; the caller bounds its length.
            vector: 32 secret numbers, fresh for every answer.

        Raises:
            CheckFailed: the process did not end, or not well.
        """
        asked = {
            "puzzle": puzzle.to_json(),
            "committed": committed.to_json(),
            "spots": spots.to_json(),
            "opened": opened.decode("utf-8", "replace"),
            "vector": vector,
            "salt": salt.hex(),
        }
        command = [sys.executable, "-m", "ngpu_bootstrap.challenges.judge_child"]
        async with self._one:
            try:
                with trio.fail_after(LONGEST_S):
                    done = await trio.run_process(
                        command, stdin=json.dumps(asked).encode(), capture_stdout=True, capture_stderr=True, check=False
                    )
            except (OSError, trio.TooSlowError) as error:
                raise CheckFailed(f"the checking process: {error or 'it did not end in time'}") from None
        try:
            found = json.loads(done.stdout)
            return Judgement(Finding(found["finding"]), str(found["detail"]))
        except (KeyError, TypeError, ValueError):
            last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise CheckFailed(f"the checking process ended with {done.returncode}: {last[0][:200]}") from None
