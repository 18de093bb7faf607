"""The calls that are served outside the application, as the OpenAPI document has them: `/user/...`, `/brc20/...`.

Owns the description of these calls and the examples of all others; what they do is `front`'s. Written as the document
is, so that a reader can hold one against the other. The application's own calls have their examples in `examples.json`,
taken from a running network.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from ngpu_bootstrap.api.profile_calls import ProfileCalls

TASK_ID = "20261120_18_24_28_43667151477142904981"
NODE = "0xd5B4dbFa70209f57b009Dc595F41C56BB58bf635"
ADDRESS = "bc1pp8vyhh2ma0ntzjwr26xxrn5r0w296yu68wdwle5rrhgtv3a2lgkqtyayus"
WORKSPACE = "367614711220405248"

ERROR_SHOWN: dict[str, Any] = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorView"}}}}
"""How a call of the application names the shape of its errors. Not by FastAPI's own `model`, for which it would build
a validator for each error of each call: three quarters of what the application costs to make, and never used."""

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
_NO_TEXT = {"encoding": "base64", "content_type": "image/png"}
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
                submitted,
                (400, 401, 403, 404, 413, 429, 502, 503),
                token=True,
                body=True,
                optional={"data": "", **_NO_TEXT},
            ),
            "get": _operation(
                "The same as `queryTask`.",
                [named, _TASK_PARAMETER],
                done,
                (400, 401, 403, 404),
                optional={"reason": "", "result_url": "", **_NO_TEXT},
            ),
        },
        "/user/queryTask": {
            "get": _operation(
                "Poll a task: `result_code` 100 and `result_size` 0 until there is a result. Needs no token.",
                [_TASK_PARAMETER],
                done,
                (400, 401, 403, 404),
                optional={"reason": "", **_NO_TEXT},
            )
        },
        "/user/queryTaskList": {
            "get": _operation(
                "The ids of the workspace's tasks, newest first.",
                [*_RANGE, *_PAGE],
                _TASK_LIST,
                (400, 401, 403, 429),
                token=True,
                optional={"cursor": ""},
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
                optional={"cursor": ""},
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
                    "nodes": [
                        {
                            "nodeAddr": NODE,
                            "progress": 100,
                            "status": 1,
                            "state": "ready",
                            "standing": 1.0,
                            "trusted": True,
                            "lastChallenge": "good",
                            "lastChallengedAtMs": 1795170268000,
                        }
                    ],
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


_RECEIPT = {
    "hash": "0x" + "5f" * 32,
    "sequence": 7,
    "verdict": "verified",
    "rule": "",
    "outcome": "complete",
    "meter": "nvml-process",
    "duration_ms": 812,
    "reserved_gpu_ms": 812,
    "busy_gpu_ms": 640,
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
    "state_name": "finished",
    "result_code": 200,
    "reason": "",
    "brc20": {"ticker": "AINN", "at_ms": 1795170268000},
    "verdict": "verified",
    "receipt": _RECEIPT,
    "attempts": [
        {
            "attempt": 1,
            "nodeaddr": NODE,
            "nodeip": "43.240.1.180",
            "begintime": "2026-11-20 18:24:28",
            "endtime": "2026-11-20 18:24:29",
            "outcome": "complete",
            "reason": "",
            "status": 200,
            "receipt": _RECEIPT,
        }
    ],
}

_PATH_EXAMPLES = {"task_id": TASK_ID, "workspace_id": WORKSPACE, "node": NODE, "node_addr": NODE}


# What fields mean, wherever they stand. `userip` and its like are spelled as in the documents.
_MEANING = {
    "result_code": "200 is success, 100 says that there is no result yet; else the HTTP status, or the workspace's own",
    "msg": "for people",
    "reason": "why there is no answer of the workspace, for programs; empty or absent where there is one",
    "taskID": "the task; so are `taskId` and `task_id`",
    "result_size": "entries of the list; of a poll: 0 until there is a result, then 1",
    "data": "the workspace's own answer, as text",
    "encoding": "`base64` where the answer is no text",
    "content_type": "of an answer that is no text",
    "result_url": "lifted out of the workspace's answer, at /user/sadTalker",
    "state": "0 accepted, 1 dispatched, 2 running, 3 finished, 4 failed, 5 cancelled, 6 expired",
    "taskIds": "newest first",
    "cursor": "where the next page begins; absent on the last",
    "nodeAddr": "the node",
    "progress": "of the distribution, in percent",
    "status": "of a node: 1 served there, -1 failed there, 0 neither; of an attempt: the workspace's HTTP status",
    "exists": "whether the address holds any of the ticker",
    "names": "tickers that it holds",
    "balances": "whole units of each, rounded down",
    "amounts": "the exact decimals",
    "id": "counts the gateway's tasks",
    "userkey": "public label of the token that asked",
    "btcaddress": "as the client sent it",
    "workspaceid": "public id of the workspace",
    "requrl": "the request's path and query",
    "method": "the API's name, or `schedulingTask`",
    "userip": "where the client's request came from",
    "nodeip": "where the node's connection came from; empty where the operator hides it",
    "requesttime": "of acceptance, in the wire's zone",
    "responsetime": "of the end, in the wire's zone; empty before it",
    "request": "the body that went to the workspace; base64 with `request_encoding` beside it where it is no text",
    "response": "the workspace's answer; base64 with `response_encoding` beside it where it is no text",
    "recordDursion": "seconds from acceptance to the end, rounded up",
    "videodursion": "obsolete, 0",
    "gpudursion": "GPU seconds, rounded up: busy where metered, else reserved; none of a disputed receipt",
    "watermarktime": "obsolete, empty",
    "watermarkres": "obsolete, empty",
    "state_name": "the state in a word",
    "brc20": "what was found out about the address; null where nothing was asked",
    "verdict": "of the last attempt's receipt: verified, skew or disputed; empty before it is there",
    "receipt": "in short, the last one or that of an attempt; null before it is there",
    "attempts": "each run of the task on a node, first one first",
}


def _schema(example: Any, optional: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of what *example* is one of, with the *optional* fields of its outermost object."""
    if isinstance(example, dict):
        properties = {}
        beside = {name: value for field in example for name, value in _BESIDE.get(field, {}).items()}
        for name, value in {**example, **optional, **beside}.items():
            properties[name] = _schema(value, {})
            if name in _NULLABLE:
                properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
            if meaning := _MEANING.get(name):
                properties[name] = {**properties[name], "description": meaning}
        return {"type": "object", "required": list(example), "properties": properties}
    if isinstance(example, list):
        return {"type": "array", "items": _schema(example[0], {})}
    kind = {bool: "boolean", int: "integer", float: "number", str: "string"}[type(example)]
    return {"type": kind}


# Fields that sometimes stand beside another.
_BESIDE = {
    "request": {"request_encoding": "base64"},
    "response": {"response_encoding": "base64"},
    "ticker": {"amount": "100.9", "problem": "indexer_unavailable"},
}
_NULLABLE = frozenset({"brc20", "receipt"})


def complete(document: dict[str, Any], error: dict[str, Any], profiles: ProfileCalls | None = None) -> dict[str, Any]:
    """Return the application's own OpenAPI document with these calls, credentials, examples and *error* added.

    Args:
        error: the JSON schema that `ERROR_SHOWN` refers to.
    """
    examples = _application_examples()
    document["paths"] = {**documented_paths(), **document["paths"]}
    document.setdefault("components", {})["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer", "description": "a workspace token, or an operator key"}
    }
    document["components"].setdefault("schemas", {})["ErrorView"] = error
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if path.startswith("/api/"):
                operation.setdefault("security", [{}, *_TOKEN])
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path" and (example := _PATH_EXAMPLES.get(parameter["name"])):
                    parameter.setdefault("example", example)
            _add_examples(operation, examples.get(path, {}).get(method, {}))
    if profiles is not None:
        profiles.add_to(document)
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
    optional: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return one operation.

    Args:
        answer: an example of it; every field there is in every answer.
        optional: examples of fields that are in some.
    """
    responses: dict[str, Any] = {
        "200": {
            "description": "as in the example",
            "content": {"application/json": {"schema": _schema(answer, optional or {}), "example": answer}},
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
