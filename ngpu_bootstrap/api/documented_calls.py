"""The calls that are served outside the application, as the OpenAPI document has them: `/user/...`, `/brc20/...`.

Owns the description of these calls and the examples of all others; what they do is `front`'s. Written as the document
is, so that a reader can hold one against the other. The application's own calls have their examples in `examples.json`,
taken from a running network.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

TASK_ID = "20261120_18_24_28_43667151477142904981"
NODE = "0xd5B4dbFa70209f57b009Dc595F41C56BB58bf635"
ADDRESS = "bc1pp8vyhh2ma0ntzjwr26xxrn5r0w296yu68wdwle5rrhgtv3a2lgkqtyayus"
WORKSPACE = "367614711220405248"

_REFUSAL = {
    "type": "object",
    "required": ["result_code", "msg", "reason"],
    "properties": {
        "result_code": {"type": "integer", "description": "the HTTP status"},
        "msg": {"type": "string", "description": "for people: what is wrong and what to change"},
        "reason": {"type": "string", "description": "stable and machine-readable"},
    },
}
_WORDS = {
    400: (
        "the request is wrong",
        {"result_code": 400, "msg": "limit must be a number from 1 to 10000", "reason": "bad_limit"},
    ),
    401: (
        "no token, or an unknown one",
        {
            "result_code": 401,
            "msg": "this call needs a workspace token: send `Authorization: Bearer <token>`",
            "reason": "token_missing",
        },
    ),
    403: (
        "a token of another workspace, or a policy that is not met",
        {"result_code": 403, "msg": "this token is of another workspace than the task", "reason": "token_foreign"},
    ),
    404: ("no such thing", {"result_code": 404, "msg": f"there is no task {TASK_ID}", "reason": "task_unknown"}),
    413: (
        "the body is too large",
        {"result_code": 413, "msg": "at most 16777216 bytes are taken", "reason": "body_too_large"},
    ),
    429: (
        "too many calls, or every slot is taken; come again after `Retry-After`",
        {"result_code": 429, "msg": "no slot became free within 30 s; come again later", "reason": "no_free_slot"},
    ),
    502: (
        "the node or the workspace broke",
        {"result_code": 502, "msg": "the workspace could not be reached or broke", "reason": "workspace_broke"},
    ),
    503: (
        "no node serves the workspace now, or a part of the gateway is down",
        {"result_code": 503, "msg": "no node serves workspace 5 now (no node is connected)", "reason": "no_node"},
    ),
}
_TOKEN: list[dict[str, list[str]]] = [{"token": []}]
_TASK_PARAMETER = {
    "name": "taskID",
    "in": "query",
    "required": True,
    "description": "as the submission answered it; `taskId` and `task_id` are taken too",
    "schema": {"type": "string", "pattern": "^[0-9]{8}_[0-9]{2}_[0-9]{2}_[0-9]{2}_[0-9]{20}$"},
    "example": TASK_ID,
}
_RANGE = [
    {
        "name": name,
        "in": "query",
        "description": f"a date (its whole day) or date-time in the wire's zone; {default} without it",
        "schema": {"type": "string"},
        "example": example,
    }
    for name, default, example in (
        ("startTime", "1970-01-01", "2024-04-11"),
        ("endTime", "2099-01-01", "2024-04-20 18:00:00"),
    )
]
_PAGE = [
    {
        "name": "limit",
        "in": "query",
        "description": "entries at most",
        "schema": {"type": "integer", "minimum": 1, "maximum": 10_000, "default": 10_000},
    },
    {
        "name": "cursor",
        "in": "query",
        "description": "where the next page begins, as the page before answered it",
        "schema": {"type": "string"},
    },
]
_IDEMPOTENCY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "the same key again answers with the first task and runs nothing",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}
_TASK_LIST = {
    "result_code": 200,
    "msg": "success",
    "result_size": 2,
    "taskIds": [TASK_ID, TASK_ID.replace("28", "27", 1)],
}


def documented_paths() -> dict[str, Any]:
    """Return the `paths` of the calls under `/user/` and `/brc20/`."""
    submitted = {"result_code": 200, "msg": "success", "taskID": TASK_ID, "taskId": TASK_ID, "task_id": TASK_ID}
    done = {
        **submitted,
        "result_size": 1,
        "state": 3,
        "data": '{"image_url": "https://example.org/1.png"}',
    }
    named = {
        "name": "api",
        "in": "path",
        "required": True,
        "description": "a name the workspace declares",
        "schema": {"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9_]{0,63}$"},
        "example": "img2img",
    }
    return {
        "/user/schedulingTask": {
            "post": _operation(
                "Submit a task to any path of the workspace; poll `queryTask` for its answer.",
                [
                    {
                        "name": "paramUrl",
                        "in": "query",
                        "required": True,
                        "description": "path in the workspace, with a query of its own if need be",
                        "schema": {"type": "string"},
                        "example": "sdapi/v1/img2img",
                    },
                    {
                        "name": "paramPort",
                        "in": "query",
                        "description": "one of the workspace's ports; the first without it",
                        "schema": {"type": "integer", "minimum": 1, "maximum": 65535},
                        "example": 8080,
                    },
                    _IDEMPOTENCY,
                ],
                submitted,
                (400, 401, 403, 404, 413, 429, 503),
                token=True,
                body=True,
            )
        },
        "/user/{api}": {
            "post": _operation(
                "Call an API the workspace declares: the answer is in `data`, or a task id where it is asynchronous.",
                [named, _IDEMPOTENCY],
                {"result_code": 200, "msg": "success", "data": '{"image_url": "..."}', "taskID": TASK_ID},
                (400, 401, 403, 404, 413, 429, 502, 503),
                token=True,
                body=True,
            ),
            "get": _operation("The same as `queryTask`.", [named, _TASK_PARAMETER], done, (400, 401, 403, 404)),
        },
        "/user/queryTask": {
            "get": _operation(
                "Poll a task: `result_code` 100 and `result_size` 0 until there is a result. Needs no token.",
                [_TASK_PARAMETER],
                done,
                (400, 401, 403, 404),
            )
        },
        "/user/queryTaskList": {
            "get": _operation(
                "The ids of the workspace's tasks, newest first.",
                [*_RANGE, *_PAGE],
                _TASK_LIST,
                (400, 401, 403, 429),
                token=True,
            )
        },
        "/user/getTasksFromNode": {
            "get": _operation(
                "The same of one node.",
                [
                    {
                        "name": "nodeAddr",
                        "in": "query",
                        "required": True,
                        "description": "with or without 0x",
                        "schema": {"type": "string", "pattern": "^(0x)?[0-9a-f]{40}$"},
                        "example": NODE,
                    },
                    *_RANGE,
                    *_PAGE,
                ],
                _TASK_LIST,
                (400, 401, 403, 429),
                token=True,
            )
        },
        "/user/queryNodes": {
            "get": _operation(
                "The nodes the workspace is distributed to. `status` 1: it is served there; -1: it failed there.",
                _RANGE,
                {
                    "result_code": 200,
                    "msg": "success",
                    "result_size": 1,
                    "nodes": [{"nodeAddr": NODE, "progress": 100, "status": 1, "state": "ready"}],
                },
                (400, 401, 403, 429),
                token=True,
            )
        },
        "/user/getDetailed": {
            "get": _operation(
                "Everything known of a task, its receipt, verdict and attempts included. Needs no token.",
                [_TASK_PARAMETER],
                {"result_code": 200, "msg": "success", "taskInfo": _TASK_INFO},
                (400, 401, 403, 404),
            )
        },
        "/brc20/checkAddress": {
            "get": _operation(
                "What a BTC address holds. `exists` is about `ticker`, or the gateway's own without it.",
                [
                    {
                        "name": "address",
                        "in": "query",
                        "required": True,
                        "description": "base58check, bech32 or bech32m",
                        "schema": {"type": "string"},
                        "example": ADDRESS,
                    },
                    {
                        "name": "ticker",
                        "in": "query",
                        "schema": {"type": "string", "maxLength": 16},
                        "example": "AINN",
                    },
                ],
                {"exists": True, "names": ["AINN"], "balances": [100], "amounts": ["100.9"]},
                (400, 429, 503),
            )
        },
    }


_TASK_INFO = {
    "id": 2687,
    "userkey": f"{WORKSPACE}.1",
    "btcaddress": ADDRESS,
    "workspaceid": WORKSPACE,
    "taskid": TASK_ID,
    "requrl": "/user/schedulingTask?paramUrl=create",
    "method": "schedulingTask",
    "userip": "94.74.66.215",
    "nodeip": "43.240.1.180",
    "nodeaddr": NODE,
    "requesttime": "2026-11-20 18:24:28",
    "responsetime": "2026-11-20 18:24:29",
    "request": '{"prompt": "a cat"}',
    "state": 3,
    "response": '{"image_url": "https://example.org/1.png"}',
    "recordDursion": 1,
    "videodursion": 0,
    "gpudursion": 1,
    "watermarktime": "",
    "watermarkres": "",
    "verdict": "verified",
}

_PATH_EXAMPLES = {"task_id": TASK_ID, "workspace_id": WORKSPACE, "node": NODE, "node_addr": NODE}


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """Return the application's own OpenAPI document with these calls, credentials and examples added."""
    examples = _application_examples()
    document["paths"] = {**documented_paths(), **document["paths"]}
    document.setdefault("components", {})["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer", "description": "a workspace token, or an operator key"}
    }
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if path.startswith("/api/"):
                operation.setdefault("security", [{}, *_TOKEN])
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path" and (example := _PATH_EXAMPLES.get(parameter["name"])):
                    parameter.setdefault("example", example)
            _add_examples(operation, examples.get(path, {}).get(method, {}))
    return document


def _add_examples(operation: dict[str, Any], example: dict[str, Any]) -> None:
    if "body" in example:
        operation["requestBody"]["content"]["application/json"]["example"] = example["body"]
    if "answer" in example:
        good = next(status for status in operation["responses"] if status.startswith("2"))
        operation["responses"][good]["content"]["application/json"]["example"] = example["answer"]
    if "accepted" in example:
        operation["responses"]["202"]["content"]["application/json"]["example"] = example["accepted"]


def _application_examples() -> dict[str, dict[str, dict[str, Any]]]:
    """Return bodies and answers of the calls that the application serves, by path and method; of a real run."""
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(
        (resources.files("ngpu_bootstrap.api") / "examples.json").read_text()
    )
    return found


def _operation(
    summary: str,
    parameters: list[dict[str, Any]],
    answer: dict[str, Any],
    refusals: tuple[int, ...],
    *,
    token: bool = False,
    body: bool = False,
) -> dict[str, Any]:
    responses: dict[str, Any] = {
        "200": {
            "description": "as in the example",
            "content": {"application/json": {"schema": {"type": "object"}, "example": answer}},
        }
    }
    for status in refusals:
        words, example = _WORDS[status]
        responses[str(status)] = {
            "description": words,
            "content": {"application/json": {"schema": _REFUSAL, "example": example}},
        }
    operation: dict[str, Any] = {
        "tags": ["gateway documents"],
        "summary": summary,
        "parameters": parameters,
        "responses": responses,
    }
    if token:
        operation["security"] = _TOKEN
    if body:
        wrapped = {
            "type": "object",
            "properties": {
                "btc_address": {"type": "string", "maxLength": 128, "description": "may be empty"},
                "data": {"type": "string", "description": "the workspace's own request, as text"},
            },
        }
        operation["requestBody"] = {
            "description": "wrapped as in the schema, or the workspace's own request as it is",
            "content": {
                "application/json": {
                    "schema": wrapped,
                    "example": {"btc_address": ADDRESS, "data": '{"prompt": "a cat"}'},
                }
            },
        }
    return operation
