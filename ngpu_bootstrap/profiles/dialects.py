"""Refusals in the words of the caller: one object of JSON for each dialect a profile may choose.

Owns shapes and codes alone; which status and reason a refusal has is said where it is raised. Numbers as `code`: the
HTTP status where the document's own examples use it (`code_msg_data`), else what its callers test, which is only that
it is not 0. Every dialect keeps `reason`, our stable word, beside its own members, so that one note in a log is
enough. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ngpu_bootstrap.errors import Refusal
from ngpu_bootstrap.front.answers import Answer, json_answer
from ngpu_bootstrap.profiles.declaration import Dialect

# The words OpenAI's clients know for what we mean; other reasons are given as they are.
_OPENAI_CODES: Mapping[str, str] = {
    "token_missing": "invalid_api_key",
    "token_unknown": "invalid_api_key",
    "token_foreign": "invalid_api_key",
    "model_unknown": "model_not_found",
    "model_missing": "missing_required_parameter",
    "queue_full": "rate_limit_exceeded",
    "no_free_slot": "rate_limit_exceeded",
    "too_many_calls": "rate_limit_exceeded",
}
_OPENAI_PARAMETERS: Mapping[str, str] = {
    "model_unknown": "model",
    "model_missing": "model",
    "model_twice": "model",
    "model_not_text": "model",
    "model_ambiguous": "project",
    "project_twice": "project",
    "project_not_text": "project",
}


def refusal_in(
    dialect: Dialect, refusal: Refusal, *, task_id: str | None = None, words: Mapping[str, str] | None = None
) -> Answer:
    """Return how *refusal* looks to callers of a profile.

    Args:
        words: of the profile's own, by status (`Profile.error_words`).
        task_id: of the task that was accepted and then could not be served; None when there is none.
    """
    headers = dict(refusal.headers)
    if task_id is not None:
        headers["Ngpu-Task-Id"] = task_id
    document = _SHAPES[dialect](refusal)
    status = status_in(dialect, refusal.status)
    if words and dialect is Dialect.ERROR_DETAILS:
        document["error"] = words.get(str(status), document["error"])
    document.setdefault("reason", refusal.reason)
    if task_id is not None:
        document["task_id"] = task_id
    return json_answer(status, document, headers)


def status_in(dialect: Dialect, status: int) -> int:
    """Return the HTTP status of a refusal; `error_details` knows only 500 for whatever went wrong behind it."""
    return 500 if dialect is Dialect.ERROR_DETAILS and status in (502, 504) else status


def openai_error(refusal: Refusal) -> dict[str, Any]:
    """Return the `error` object of OpenAI's API."""
    return {
        "message": refusal.message,
        "type": _openai_type(refusal.status),
        "param": _OPENAI_PARAMETERS.get(refusal.reason),
        "code": _OPENAI_CODES.get(refusal.reason, refusal.reason),
    }


def _openai_type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 403:
        return "permission_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def _ngpu(refusal: Refusal) -> dict[str, Any]:
    return {"reason": refusal.reason, "message": refusal.message}


def _openai(refusal: Refusal) -> dict[str, Any]:
    return {"error": openai_error(refusal)}


def _code_message(refusal: Refusal) -> dict[str, Any]:
    return {"code": refusal.status, "message": refusal.message}


def _model_server(refusal: Refusal) -> dict[str, Any]:
    return {"code": refusal.status, "message": refusal.message, "error": openai_error(refusal)}


def _error_details(refusal: Refusal) -> dict[str, Any]:
    return {"error": _HEADLINES.get(refusal.status, "the request failed"), "details": refusal.message}


def _code_msg_data(refusal: Refusal) -> dict[str, Any]:
    return {"code": refusal.status, "msg": refusal.message, "data": None}


def _code_info_msg(refusal: Refusal) -> dict[str, Any]:
    return {"code": refusal.status, "info": None, "msg": refusal.message}


_HEADLINES: Mapping[int, str] = {
    400: "invalid request",
    401: "not authorized",
    403: "not allowed",
    404: "not found",
    405: "method not allowed",
    413: "request too large",
    429: "too many requests",
    502: "generation failed",
    503: "service unavailable",
    504: "timed out",
}

_SHAPES = {
    Dialect.NGPU: _ngpu,
    Dialect.OPENAI: _openai,
    Dialect.CODE_MESSAGE: _code_message,
    Dialect.MODEL_SERVER: _model_server,
    Dialect.ERROR_DETAILS: _error_details,
    Dialect.CODE_MSG_DATA: _code_msg_data,
    Dialect.CODE_INFO_MSG: _code_info_msg,
}
