"""The reasons a node refuses an order with, and the one table that maps them to HTTP statuses.

A refusal is given before any byte reaches the workspace, so a refused order may go to another node at once, and there
is no receipt for it. It is marked by the header ``Ngpu-Refused: <reason>``; a status alone could be the workspace's
own. Nodes strip ``Ngpu-*`` headers from workspaces' answers, so the mark cannot be forged from inside.

After admission a receipt always follows. If the workspace then gave no answer at all, the node answers for it with
``Ngpu-Error: workspace_broke`` (502) or ``deadline`` (504) and a receipt whose status is 0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum

from ngpu_protocol.errors import MalformedError

REFUSED_HEADER = "Ngpu-Refused"
ERROR_HEADER = "Ngpu-Error"
CONTENT_LENGTH_HEADER = "Ngpu-Content-Length"
"""The length a workspace announced: the answer itself travels chunked, to carry the receipt behind it."""
TASK_ID_HEADER = "Ngpu-Task-Id"

MAX_REFUSAL_BYTES = 4096


class Reason(StrEnum):
    """Why a node refused an order."""

    MALFORMED_ORDER = "malformed_order"
    """The header is missing or does not decode."""
    BAD_SIGNATURE = "bad_signature"
    """The order's bootstrap did not sign it, or signed it for another network."""
    UNKNOWN_BOOTSTRAP = "unknown_bootstrap"
    """The node's owner does not trust this bootstrap."""
    WORKSPACE_UNKNOWN = "workspace_unknown"
    """The node has no deployment of this workspace."""
    ORDER_REPLAYED = "order_replayed"
    """The order was seen before."""
    DEADLINE_PASSED = "deadline_passed"
    """The deadline lies in the past by the node's clock."""
    WRONG_SESSION = "wrong_session"
    """The order was made for an earlier run of this node."""
    BODY_TOO_LARGE = "body_too_large"
    """The announced body is larger than this node takes."""
    WRONG_NODE = "wrong_node"
    """The order is addressed to another node."""
    ORDER_MISMATCH = "order_mismatch"
    """The request's method, target, port, workspace or revision is not the order's."""
    WORKSPACE_NOT_READY = "workspace_not_ready"
    """The deployment is there but does not serve now."""
    PATH_NOT_SERVED = "path_not_served"
    """The model server behind the workspace was not registered for such a call."""
    NO_FREE_SLOT = "no_free_slot"
    """Every slot of the node or the deployment is taken."""
    DRAINING = "draining"
    """The node takes no new orders: it is about to stop."""

    @property
    def status(self) -> int:
        """The HTTP status of a refusal for this reason."""
        return _STATUS[self]


_STATUS: dict[Reason, int] = {
    Reason.MALFORMED_ORDER: 400,
    Reason.BAD_SIGNATURE: 401,
    Reason.UNKNOWN_BOOTSTRAP: 403,
    Reason.WORKSPACE_UNKNOWN: 404,
    Reason.PATH_NOT_SERVED: 405,
    Reason.ORDER_REPLAYED: 409,
    Reason.DEADLINE_PASSED: 410,
    Reason.WRONG_SESSION: 412,
    Reason.BODY_TOO_LARGE: 413,
    Reason.WRONG_NODE: 421,
    Reason.ORDER_MISMATCH: 422,
    Reason.WORKSPACE_NOT_READY: 425,
    Reason.NO_FREE_SLOT: 429,
    Reason.DRAINING: 503,
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """A refusal as read from the wire; `reason` may be a later version's word."""

    reason: str
    message: str


def refusal_body(reason: str, message: str) -> bytes:
    """Return the JSON body ``{"reason", "message"}`` of a refusal, or of an answer in a workspace's place."""
    return json.dumps({"reason": str(reason), "message": message}).encode()


def parse_refusal(body: bytes) -> Refusal:
    """Return the refusal in *body*, its message cut to 500 characters.

    Raises:
        MalformedError: if it is larger than `MAX_REFUSAL_BYTES` or not such an object.
    """
    if len(body) > MAX_REFUSAL_BYTES:
        raise MalformedError("refusal", f"{len(body)} bytes, of which {MAX_REFUSAL_BYTES} are allowed")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedError("refusal", "not JSON") from error
    if not isinstance(document, dict):
        raise MalformedError("refusal", "not an object")
    reason, message = document.get("reason"), document.get("message", "")
    if not isinstance(reason, str) or not isinstance(message, str):
        raise MalformedError("refusal", "reason and message must be text")
    # JSON can spell what would break whoever writes it down later: half a surrogate pair, NUL, control characters.
    return Refusal(_writable(reason[:64]), _writable(message[:500]))


def _writable(text: str) -> str:
    whole = text.encode(errors="replace").decode()
    return whole if whole.isprintable() else "".join(one if one.isprintable() else " " for one in whole)
