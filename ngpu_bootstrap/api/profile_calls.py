"""The calls that profiles declare, as the OpenAPI document has them: the shipped ones' and the operator's own.

Owns the translation of a declaration: its path, the places of its credential, its body's schema, its errors in its
dialect. What a workspace answers is the workspace's, and is not described. A path's last parameter that takes the rest
of the path (`{name...}`) is an ordinary one here, as OpenAPI knows no other. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from ngpu_bootstrap.errors import Refusal
from ngpu_bootstrap.front.answers import Answer
from ngpu_bootstrap.profiles.catalogue import Catalogue
from ngpu_bootstrap.profiles.declaration import Credential, Dialect, Mode, Profile, Route, parameters_of
from ngpu_bootstrap.profiles.dialects import refusal_in
from ngpu_bootstrap.profiles.form_bodies import MULTIPART
from ngpu_bootstrap.profiles.schemas import laid_out

_REFUSALS: tuple[Refusal, ...] = (
    Refusal(400, "invalid", "prompt is required"),
    Refusal(401, "token_missing", "this call needs a workspace token: send it as header Authorization"),
    Refusal(403, "link_bad", "this is no link that a bootstrap of this service has made"),
    Refusal(404, "model_unknown", "no model 'gpt-9' is served here; GET /v1/models lists those that are"),
    Refusal(410, "link_expired", "this link has expired; ask for the file again"),
    Refusal(413, "body_too_large", "the body has 70000000 bytes, at most 67108864 are taken"),
    Refusal(429, "queue_full", "10 of these calls run and 100 wait already; come again later"),
    Refusal(502, "workspace_broke", "the workspace could not be reached or broke"),
    Refusal(503, "no_node", "no node serves workspace 5 now (no node is connected)"),
    Refusal(504, "deadline", "the task did not end in time"),
)
_MEANING = {
    400: "the request is wrong",
    401: "no token, or an unknown one",
    403: "no link that was made here",
    404: "no such thing",
    410: "the link has expired",
    413: "the body is too large",
    429: "too many calls, or every slot is taken; come again after `Retry-After`",
    500: "what was asked for failed, or took too long",
    502: "the node or the workspace broke",
    503: "nothing serves the call now",
    504: "it took too long",
}
_CALLS_A_WORKSPACE = (400, 401, 404, 413, 429, 502, 503, 504)
_OWN_HEADER = "ngpuToken"
_METHODS = frozenset({"GET", "PUT", "POST", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE"})
_BODILESS = frozenset({"GET", "HEAD", "DELETE", "OPTIONS", "TRACE"})
_PARAMETER = re.compile(r"\{([a-z_][a-z0-9_]*)(?:\.\.\.)?\}")
_MODEL = {
    "model": {"type": "string", "minLength": 1, "description": "which model; `GET /v1/models` lists them"},
    "project": {"type": "string", "description": "whose, where several projects serve one of that name"},
}
_MODEL_VIEW = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "project", "model", "type", "url"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "project": {"type": "string"},
        "model": {"type": "string"},
        "type": {"type": "string", "description": "as its server registered it; empty where nobody said"},
        "url": {"type": "string", "description": "where it is called"},
    },
}
_MODELS_VIEW = {
    "type": "object",
    "required": ["object", "project", "data"],
    "properties": {
        "object": {"const": "list"},
        "project": {"type": "string", "description": "of all of them, empty where they are of several"},
        "data": {"type": "array", "items": _MODEL_VIEW},
    },
}

_MODEL_EXAMPLE = {
    "id": "Llama3-8B",
    "object": "model",
    "created": 1795747968,
    "owned_by": "DecentralGPT",
    "project": "DecentralGPT",
    "model": "Llama3-8B",
    "type": "text-to-text",
    "url": "https://gateway.example/v1/chat/completions",
}
_MODELS_EXAMPLE = {"object": "list", "project": "DecentralGPT", "data": [_MODEL_EXAMPLE]}


@dataclass(frozen=True, slots=True)
class ProfileCalls:
    """The declared calls of one bootstrap.

    Attributes:
        public: profiles that may be called without a credential.
        body_bytes: the largest body, whatever a route allows.
    """

    catalogue: Catalogue
    public: Collection[str]
    body_bytes: int

    def add_to(self, document: dict[str, Any]) -> None:
        """Add them to an OpenAPI *document*."""
        components = document.setdefault("components", {})
        schemes = components.setdefault("securitySchemes", {})
        shapes = components.setdefault("schemas", {})
        written: dict[str, str] = {}  # each path by what it matches: a template may stand there once only
        for profile, route in self.catalogue.routes():
            if route.method not in _METHODS:
                continue  # OpenAPI has no place for other methods
            shape = _PARAMETER.sub("{}", route.path)
            path = written.setdefault(shape, _PARAMETER.sub(r"{\1}", route.path))
            names = dict(zip(parameters_of(route.path), parameters_of(path), strict=True))
            dialect = profile.dialect_of(route)
            shapes.setdefault(_shape_name(dialect), _shape(dialect))
            operation = self._operation(profile, route, names)
            for scheme in operation["security"]:
                for name in scheme:
                    schemes.setdefault(name, _scheme(name, profile))
            document["paths"].setdefault(path, {})[route.method.lower()] = operation

    def _operation(self, profile: Profile, route: Route, names: dict[str, str]) -> dict[str, Any]:
        operation: dict[str, Any] = {
            "tags": [f"profile {profile.name}"],
            "summary": route.about or f"{route.method} {route.path}",
            "parameters": list(_parameters(route, names)),
            "responses": dict(_responses(profile, route)),
            "security": self._security(profile, route),
        }
        if route.method not in _BODILESS and route.mode not in (Mode.FIXED, Mode.MODELS):
            operation["requestBody"] = _body(profile, route, min(route.body_limit, self.body_bytes))
        return operation

    def _security(self, profile: Profile, route: Route) -> list[dict[str, list[str]]]:
        if route.signed or route.mode is Mode.FIXED:
            return []
        found: list[dict[str, list[str]]] = [{_scheme_name(one): []} for one in profile.credentials if _is_outside(one)]
        found.append({_OWN_HEADER: []})
        inside = any(not _is_outside(one) for one in profile.credentials)
        return [{}, *found] if profile.name in self.public or inside else found


def _is_outside(credential: Credential) -> bool:
    return credential.where in ("header", "query")


def _scheme_name(credential: Credential) -> str:
    name = (credential.name or "").lower()
    return "token" if (credential.where, name) == ("header", "authorization") else f"{credential.where}-{name}"


def _scheme(name: str, profile: Profile) -> dict[str, Any]:
    if name == _OWN_HEADER:
        return {"type": "apiKey", "in": "header", "name": "Ngpu-Token", "description": "a workspace token"}
    one = next(one for one in profile.credentials if _is_outside(one) and _scheme_name(one) == name)
    return {"type": "apiKey", "in": one.where, "name": one.name, "description": "a workspace token"}


def _parameters(route: Route, names: dict[str, str]) -> Iterator[dict[str, Any]]:
    for own, name in names.items():
        rest = " (the rest of the path)" if route.path.endswith(f"{{{own}...}}") else ""
        yield {
            "name": name,
            "in": "path",
            "required": True,
            "description": f"a part of the path{rest}",
            "schema": {"type": "string", "minLength": 1},
        }
    if route.mode is Mode.MODELS:
        words = "only the models of this project"
        yield {"name": "project", "in": "query", "description": words, "schema": {"type": "string"}}
    for place in (*route.affinity, *((route.job.key,) if route.job is not None and route.job.key is not None else ())):
        if place.where in ("query", "header", "cookie"):
            words = "calls that say the same go to one node" if place in route.affinity else "the job's id"
            yield {"name": place.name, "in": place.where, "description": words, "schema": {"type": "string"}}
    if route.signed:
        for name in ("workspace", "node", "Expires", "Signature"):
            yield {"name": name, "in": "query", "required": True, "schema": {"type": "string"}}


def _body(profile: Profile, route: Route, limit: int) -> dict[str, Any]:
    json_places = [one for one in profile.credentials if one.where == "json"]
    form_places = [one for one in profile.credentials if one.where == "form"]
    schema = laid_out(route.body_schema) if route.body_schema is not None else {}
    properties: dict[str, Any] = {}
    if profile.workspace == "model":
        properties |= _MODEL
    for one in json_places:
        properties[(one.pointer or "").removeprefix("/")] = _token_of(one)
    if properties or "type" not in schema:
        beside = {"required": ["model"]} if profile.workspace == "model" else {}
        schema = {"type": "object", **beside, **schema}
        schema["properties"] = {**properties, **schema.get("properties", {})}
    content: dict[str, Any] = {}
    if route.form is None:
        content["application/json"] = {"schema": schema, "example": _example(schema)}
    if route.form is not None or profile.workspace == "model":  # which is looked for in a form as well
        content[MULTIPART] = {"schema": _form(profile, route, form_places)}
    return {
        "description": f"at most {limit} bytes",
        "required": route.body_schema is not None or route.form is not None or profile.workspace == "model",
        "content": content,
    }


def _example(schema: Any) -> Any:
    """Return a plain value that shows what a *schema* without references asks for: what is required, and no more."""
    if not isinstance(schema, dict):
        return {}
    if "const" in schema or schema.get("enum"):
        return schema["const"] if "const" in schema else schema["enum"][0]
    kinds = schema.get("type", "object")
    match kinds if isinstance(kinds, str) else kinds[0]:
        case "string":
            return "text".ljust(schema.get("minLength", 0), "t")[: schema.get("maxLength", 64)]
        case "integer" | "number":
            return schema.get("minimum", schema.get("maximum", 1))
        case "boolean":
            return True
        case "array":
            return [_example(schema.get("items", {"type": "string"}))] * schema.get("minItems", 1)
        case "null":
            return None
        case _:
            known = schema.get("properties", {})
            return {name: _example(known.get(name, {"type": "string"})) for name in schema.get("required", ())}


def _form(profile: Profile, route: Route, credentials: list[Credential]) -> dict[str, Any]:
    several = {"type": "array", "items": {"type": "string", "format": "binary"}}
    properties: dict[str, Any] = dict(_MODEL) if profile.workspace == "model" else {}
    required = ["model"] if profile.workspace == "model" else []
    bounds = route.form
    if bounds is not None:
        required += bounds.required
        for name in dict.fromkeys((*bounds.required, *bounds.allowed, *bounds.once)):
            properties[name] = {"type": "string"} if name in bounds.once else several
    properties |= {one.name or "": _token_of(one) for one in credentials}
    form: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        form["required"] = required
    if bounds is not None and bounds.allowed:
        form["additionalProperties"] = False
    return form


def _token_of(credential: Credential) -> dict[str, Any]:
    return {"type": "string", "description": "the workspace token; its workspace gets the public id instead"}


def _responses(profile: Profile, route: Route) -> Iterator[tuple[str, dict[str, Any]]]:
    yield _success(route)
    dialect = profile.dialect_of(route)
    by_status = {one.status: refusal_in(dialect, one) for one in _REFUSALS}
    shown: set[int] = set()
    for status in _statuses(route):
        answer = by_status[status]
        if answer.status in shown:
            continue
        shown.add(answer.status)
        yield (
            str(answer.status),
            {
                "description": _MEANING[answer.status],
                "content": {
                    "application/json": {"schema": {"$ref": _reference(dialect)}, "example": _document(answer)}
                },
            },
        )


def _success(route: Route) -> tuple[str, dict[str, Any]]:
    if route.mode is Mode.MODELS:
        view = _MODEL_VIEW if parameters_of(route.path) else _MODELS_VIEW
        content: dict[str, Any] = {
            "application/json": {"schema": view, "example": _MODEL_EXAMPLE if view is _MODEL_VIEW else _MODELS_EXAMPLE}
        }
        return "200", {"description": "as in the schema", "content": content}
    if route.answer is not None:
        answer = route.answer
        if answer.text is not None:
            content = {"text/plain": {"schema": {"const": answer.text}}}
        else:
            content = {"application/json": {"schema": {"const": answer.json_}, "example": answer.json_}}
        return str(answer.status), {"description": "always this", "content": content}
    if route.job is not None and route.job.submits:
        return "200", {"description": "the job's result" if getattr(route.job, "wait", False) else "its id"}
    return "200", {"description": "as the workspace answers, streamed where it streams; so are errors of its own"}


def _statuses(route: Route) -> tuple[int, ...]:
    if route.mode is Mode.FIXED:
        return ()
    if route.mode is Mode.MODELS:
        return (401, 404) if parameters_of(route.path) else (401,)
    if route.signed:
        return (400, 403, 404, 410, 429, 502, 503, 504)
    return tuple(sorted((*_CALLS_A_WORKSPACE, 410))) if route.mode is Mode.JOB else _CALLS_A_WORKSPACE


def _shape_name(dialect: Dialect) -> str:
    return f"refusal_{dialect.value}"


def _reference(dialect: Dialect) -> str:
    return f"#/components/schemas/{_shape_name(dialect)}"


def _document(answer: Answer) -> Any:
    return json.loads(answer.body)


def _shape(dialect: Dialect) -> dict[str, Any]:
    """Return the schema of a dialect's refusals, made of one."""
    document = _document(refusal_in(dialect, _REFUSALS[0]))
    schema = _schema(document)
    schema["properties"]["task_id"] = {"type": "string", "description": "of the task, where one was accepted"}
    schema["description"] = f"A refusal in the dialect {dialect.value}; `reason` is stable and for programs."
    return schema


def _schema(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        properties = {name: _schema(one) for name, one in value.items()}
        if "param" in properties:
            properties["param"] = {"type": ["string", "null"]}
        return {"type": "object", "required": list(value), "properties": properties}
    return {"type": "integer" if isinstance(value, int) else "string" if isinstance(value, str) else "null"}
