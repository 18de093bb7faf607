"""A task as `getDetailed` shows it: every field of the documents, and beside them what this network knows more. Pure.

Wire spellings (`recordDursion`, `gpudursion`) are the documents'. Fields the documents call obsolete are there and
empty, because clients read them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ngpu_bootstrap.front.answers import text_of
from ngpu_bootstrap.front.wire_times import show_time
from ngpu_bootstrap.store.job_rows import JobRow
from ngpu_bootstrap.store.records import NewReceipt, ReceiptRecord, TaskDetail, TaskRecord
from ngpu_protocol.errors import MalformedError
from ngpu_protocol.losses import SignedLoss
from ngpu_protocol.orders import SignedOrder

UNPAID = "disputed"


def task_info(
    detail: TaskDetail,
    request: bytes | None,
    response: bytes | None,
    *,
    zone_minutes: int,
    show_node_ip: bool,
    job: JobRow | None = None,
    asked_by: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the documents' `taskInfo`.

    Args:
        request: the body that went to the workspace; None when it is not kept.
        response: the workspace's answer; None when there is none, or it is not kept.
        job: of a task that is a job of the workspace's own: each of its attempts is one call made for it.
        asked_by: tasks by which its client asked for that job itself.
    """
    task = detail.task
    receipts = [filed.receipt for filed in detail.receipts]
    of_attempt = {filed.receipt.attempt: filed for filed in detail.receipts}
    shown: dict[str, Any] = {
        "id": task.number,
        "userkey": task.token_label,
        "btcaddress": task.btc_address,
        "workspaceid": task.client,
        "taskid": task.task_id,
        "requrl": task.request_url,
        "method": task.api,
        "userip": task.user_ip,
        "nodeip": task.node_ip if show_node_ip else "",
        "nodeaddr": task.node or "",
        "requesttime": show_time(task.accepted_at_ms, zone_minutes),
        "responsetime": show_time(task.finished_at_ms, zone_minutes),
        **_body("request", request, _request_type(task)),
        "state": int(task.state),
        **_body("response", response, task.content_type),
        "recordDursion": _seconds(max(0, (task.finished_at_ms or task.accepted_at_ms) - task.accepted_at_ms)),
        "videodursion": 0,
        "gpudursion": gpu_seconds(receipts),
        "watermarktime": "",
        "watermarkres": "",
        "state_name": task.state.name.lower(),
        "result_code": task.result_code,
        "reason": task.reason,
        "brc20": json.loads(task.brc20) if task.brc20 else None,
        "verdict": task.verdict,
        "receipt": _receipt(receipts[-1]) if receipts else None,
        "attempts": [
            {
                "attempt": attempt.attempt,
                "nodeaddr": attempt.node,
                "nodeip": attempt.node_ip if show_node_ip else "",
                "begintime": show_time(attempt.began_at_ms, zone_minutes),
                "endtime": show_time(attempt.ended_at_ms, zone_minutes),
                "outcome": attempt.outcome,
                "reason": attempt.reason,
                "status": attempt.status,
                "receipt": _receipt(of_attempt[attempt.attempt].receipt) if attempt.attempt in of_attempt else None,
                **({} if job is None else {"call": _call(of_attempt.get(attempt.attempt))}),
            }
            for attempt in detail.attempts
        ],
    }
    if job is not None:
        shown["job"] = {
            "name": job.name,
            "id": job.job.key,
            "nodeaddr": job.job.node,
            # a task that was cancelled ended without a word on its job
            "phase": task.state.name.lower()
            if task.state.is_final and not job.job.phase.is_final
            else job.job.phase.value,
            "state": job.job.state,
            "result": job.job.result,
            "calls": list(asked_by),
        }
        if job.loss:
            shown["job"]["loss"] = SignedLoss.from_bytes(job.loss).to_json()
    return shown


def gpu_seconds(receipts: list[NewReceipt]) -> int:
    """Return whole seconds of GPU time, rounded up: busy time where it was metered, else reserved. Disputed: none."""
    counted = 0
    for receipt in receipts:
        if receipt.verdict != UNPAID:
            counted += receipt.busy_gpu_ms if receipt.meter != "none" else receipt.reserved_gpu_ms
    return _seconds(counted)


def _seconds(milliseconds: int) -> int:
    return -(-milliseconds // 1000)


def _call(filed: ReceiptRecord | None) -> str:
    """Return what was asked of the workspace, as the order that the node receipted has it."""
    if filed is None or not filed.order:
        return ""
    try:
        order = SignedOrder.from_bytes(filed.order).order
    except MalformedError:
        return ""
    return f"{order.method} {order.target}"


def _receipt(receipt: NewReceipt) -> Mapping[str, Any]:
    return {
        "hash": "0x" + receipt.hash.hex(),
        "sequence": receipt.sequence,
        "verdict": receipt.verdict,
        "rule": receipt.rule,
        "outcome": receipt.outcome,
        "meter": receipt.meter,
        "duration_ms": receipt.duration_ms,
        "reserved_gpu_ms": receipt.reserved_gpu_ms,
        "busy_gpu_ms": receipt.busy_gpu_ms,
    }


def _body(name: str, body: bytes | None, content_type: str) -> dict[str, str]:
    if body is None:
        return {name: ""}
    text = text_of(body, content_type)
    if text is not None:
        return {name: text}
    return {name: base64.b64encode(body).decode(), f"{name}_encoding": "base64"}


def _request_type(task: TaskRecord) -> str:
    return next((value for name, value in task.headers if name == "content-type"), "")
