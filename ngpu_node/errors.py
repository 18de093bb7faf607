"""What can go wrong on a node, by who must act.

An `OperatorError` (from `ngpu_daemon`) is the owner's to mend and ends the daemon at start. Everything here happens
while it runs. Refusals of orders are no exceptions: they are answers, see `execution.admission`.
"""

from __future__ import annotations

from ngpu_daemon.errors import OperatorError


class NodeConfigurationError(OperatorError):
    """The owner's configuration cannot be used; the message says which key and what to write instead."""


class NodeError(Exception):
    """Root of what goes wrong while a node runs."""


class BootstrapMisbehaved(NodeError):
    """A bootstrap broke the protocol on a control or receipts stream: the connection is dropped and made again."""


class BootstrapRefused(NodeError):
    """A bootstrap would not have this node; `reason` is its stable word for why."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason


class LedgerUnavailable(NodeError):
    """The ledger could not make a receipt durable (disk full or failing): no receipt may leave, no order be taken."""


class EngineUnavailable(NodeError):
    """The container engine does not answer."""


class EngineFailed(NodeError):
    """The container engine answered with an error; the message has its words."""


class DeploymentImpossible(NodeError):
    """This node cannot run what was asked for (GPUs, network, an option of the engine); the message names the lack."""


class VolumeFull(DeploymentImpossible):
    """A workspace's volumes hold more than they may; a revision with other volumes begins with empty ones."""


class EgressUnguarded(DeploymentImpossible):
    """A workspace that may reach the outside could reach the owner's network too; no longer once the rules are set."""


class GpusNotGiven(DeploymentImpossible):
    """The engine cannot give containers their GPUs; the message has the fix."""


class StateUnavailable(NodeError):
    """What the node must know again after a restart cannot be written (disk full or failing)."""


class CallRefused(NodeError):
    """A call on the loopback port that gets an error answer: a status and, of the interface's numbers, a code.

    Attributes:
        retry_after: what its `Retry-After` field says; empty for none.
    """

    def __init__(self, status: int, code: int, message: str, *, retry_after: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after
