"""Judge one dispute file offline and say what it shows. Started by `scripts/verify-dispute`.

The file is what `ngpu-bootstrap dispute export` or `ngpu-node disputes export` writes: a receipt the bootstrap did not
accept, two receipts of one node that cannot both be true, or receipts that never came. The rules are
`ngpu_protocol.dispute_file`'s.

Exit code 0 when every rule holds, whoever it speaks against; 1 when one does not, and the file shows nothing; 2 when it
cannot be read.
"""

import sys
from argparse import Namespace

from verifying import Judged, Program, read_bounded

from ngpu_daemon.disputes import WHAT_IT_SHOWS
from ngpu_protocol.dispute_file import (
    MAX_FILE_BYTES,
    Contradiction,
    DisputeFile,
    Withheld,
    check_dispute_file,
    from_json,
)
from ngpu_protocol.receipts import SignedReceipt


def judge(arguments: Namespace) -> Judged:
    file = from_json(read_bounded(arguments.file, MAX_FILE_BYTES))
    results, finding = check_dispute_file(file, siblings=arguments.sibling)
    facts = _facts(file)
    return Judged(facts.items(), {"finding": finding.value, **facts}, results, says=f"shows: {WHAT_IT_SHOWS[finding]}")


def _facts(file: DisputeFile) -> dict[str, str]:
    signed = _accused(file)
    receipt = signed.receipt
    facts = {
        "kind": file.kind.value,
        "node": receipt.node,
        "bootstrap": receipt.bootstrap,
        "sequence": str(receipt.sequence),
        "receipt": "0x" + receipt.digest(file.chain_id).hex(),
    }
    if isinstance(file, Contradiction):
        return facts | {"other": "0x" + file.first.receipt.digest(file.chain_id).hex()}
    if isinstance(file, Withheld):
        claim = file.claim.observation
        return facts | {"rule": claim.rule, "wanted": claim.expected, "was": claim.actual, "seen": claim.seen}
    order = file.file.order.order
    facts["node"] = order.node  # the one asked; a forged receipt may name any
    facts["task"] = f"{order.task_id}, attempt {order.attempt}"
    if file.observation is not None:
        said = file.observation.observation
        facts |= {"rule": said.rule, "wanted": said.expected, "was": said.actual, "seen": said.seen}
    return facts


def _accused(file: DisputeFile) -> SignedReceipt:
    if isinstance(file, Contradiction):
        return file.second
    return file.after if isinstance(file, Withheld) else file.file.receipt


if __name__ == "__main__":
    sys.exit(Program("verify-dispute", "dispute", judge).main())
