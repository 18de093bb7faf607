"""JSON schemas of bodies: which ones may be declared, and what a body that does not fit is told.

Bodies are validated where all clients are served, so a schema must not let one caller take what others need. Checked
when it is declared, with words for who wrote it:

- it refers to nothing outside itself, and not to itself (a recursive schema takes as long as a caller likes);
- laid out whole, references resolved, it has at most `MAX_PARTS` parts;
- its patterns cannot be made to try for long: `steps_of` counts what backtracking may come to on the longest text that
  is matched at all, which `maxLength` beside the pattern bounds;
- `uniqueItems` has `maxItems` beside it, since items that cannot be sorted are compared with each other.

When a body is judged, a text or list beyond its bound is not matched or compared as well, and the first few problems
are enough. Pure.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator, SchemaError, ValidationError, validators

from ngpu_bootstrap.errors import BadRequest
from ngpu_bootstrap.profiles.strict_json import read_json
from ngpu_protocol.workspaces import MAX_SCHEMA_CHARS

MAX_PARTS = 10_000
MAX_STEPS = 20_000_000  # about half a second
MAX_UNIQUE_ITEMS = 1000
MAX_PROBLEMS = 5
MAX_PROBLEM_CHARS = 2000

_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_ONE_MORE = ("unevaluatedItems", "unevaluatedProperties")
_SEVERAL = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "dependentSchemas")
_ELSEWHERE = ("$id", "$anchor", "$dynamicRef", "$dynamicAnchor", "$vocabulary")


def check_declared(schema: Mapping[str, Any], max_bytes: int) -> None:
    """Return if bodies of at most *max_bytes* may be held to *schema*.

    Raises:
        ValueError: what is to be changed, and where.
    """
    try:
        _check(schema, max_bytes)
    except RecursionError:
        raise ValueError("schema is nested too deeply") from None


def _check(schema: Mapping[str, Any], max_bytes: int) -> None:
    if len(json.dumps(schema)) > MAX_SCHEMA_CHARS:
        raise ValueError(f"schema must have at most {MAX_SCHEMA_CHARS} characters as JSON")
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        where = "/".join(str(part) for part in error.absolute_path)
        raise ValueError(f"schema is no JSON schema at /{where}: {error.message[:200]}") from None
    left = MAX_PARTS

    def walk(part: Any, where: str, within: tuple[str, ...]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"schema has more than {MAX_PARTS} parts, those it refers to counted each time")
        if not isinstance(part, dict):
            return
        for keyword in _ELSEWHERE:
            if keyword in part:
                raise ValueError(f"schema must not use {keyword} (at {where}): it has to be whole in itself")
        reference = part.get("$ref")
        if reference is not None:
            if reference in within:
                raise ValueError(f"schema refers to itself at {where} ($ref {reference}): write out what may be there")
            walk(_target(schema, reference, where), f"{where}/$ref", (*within, reference))
        _check_bounds(part, where, max_bytes)
        for keyword in (*_ONE, *_ONE_MORE):
            if keyword in part:
                walk(part[keyword], f"{where}/{keyword}", within)
        for keyword in _SEVERAL:
            for number, one in enumerate(part.get(keyword, ())):
                walk(one, f"{where}/{keyword}/{number}", within)
        for keyword in _NAMED:
            for name, one in part.get(keyword, {}).items():
                walk(one, f"{where}/{keyword}/{name}", within)

    walk(schema, "#", ("#",))


def laid_out(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checked *schema* without references: what each names stands in its place, so that it means the same in
    another document."""

    def whole(part: Any, at: str) -> Any:
        if not isinstance(part, dict):
            return part
        out: dict[str, Any] = {}
        for keyword, value in part.items():
            if keyword in (*_ONE, *_ONE_MORE):
                out[keyword] = whole(value, at)
            elif keyword in _SEVERAL:
                out[keyword] = [whole(one, at) for one in value]
            elif keyword in _NAMED and keyword != "$defs":
                out[keyword] = {name: whole(one, at) for name, one in value.items()}
            elif keyword not in ("$ref", "$defs", "$schema"):
                out[keyword] = value
        if "$ref" in part:
            named = whole(_target(schema, part["$ref"], at), at)
            out = {**out, "allOf": [named, *out.get("allOf", ())]} if out else named
        return out

    laid: dict[str, Any] = whole(dict(schema), "#")
    return laid


def _target(schema: Mapping[str, Any], reference: str, where: str) -> Any:
    """Return the part of *schema* that a reference names."""
    if not reference.startswith("#/") and reference != "#":
        raise ValueError(f"schema refers to {reference} at {where}: only its own parts can be named, as #/$defs/name")
    at: Any = schema
    for raw in reference[2:].split("/") if reference != "#" else ():
        name = raw.replace("~1", "/").replace("~0", "~")
        at = at.get(name) if isinstance(at, dict) else None
    if not isinstance(at, dict | bool):
        raise ValueError(f"schema has nothing at {reference}, which {where} refers to")
    return at


def _check_bounds(part: Mapping[str, Any], where: str, max_bytes: int) -> None:
    length = min(part.get("maxLength", max_bytes), max_bytes)
    patterns = [(part["pattern"], length)] if "pattern" in part else []
    patterns += [(name, max_bytes) for name in part.get("patternProperties", ())]
    for pattern, longest in patterns:
        try:
            steps = steps_of(pattern, int(longest))
        except (re.error, OverflowError) as error:
            raise ValueError(f"schema has a pattern at {where} that cannot be used: {error}") from None
        if steps > MAX_STEPS:
            raise ValueError(
                f"schema has a pattern at {where} that a text of {longest} characters can keep busy for long: "
                f"{pattern[:80]!r}; begin it with ^, put a smaller maxLength beside it, or write its repeats so that "
                "they never go back (possessive: ++ and *+)"
            )
    if part.get("uniqueItems") and part.get("maxItems", math.inf) > MAX_UNIQUE_ITEMS:
        raise ValueError(f"schema needs maxItems of at most {MAX_UNIQUE_ITEMS} beside uniqueItems at {where}")


def steps_of(pattern: str, length: int) -> float:
    """Return an upper bound, by order of magnitude, on how often the search for *pattern* goes on after going back.

    Each way in which a repeat can divide a text is one that a match that fails in the end tries: as many as the repeat
    has counts, to the power of them where its own content can be divided too. Ways of parts that follow each other are
    multiplied. A possessive repeat or an atomic group has one way, seen from outside.

    Args:
        length: of the longest text.

    Raises:
        re.error: it is no pattern.
    """
    re.compile(pattern)
    parsed = _parser.parse(pattern)
    inner = [1.0]  # of what lies in possessive parts, which is tried apart from the rest
    ways = _ways(parsed, max(1, length), inner)
    first = str(parsed[0][0]) if len(parsed) else ""
    multiline = parsed.state.flags & re.MULTILINE
    anchored = first == "AT" and str(parsed[0][1]) in ("AT_BEGINNING", "AT_BEGINNING_STRING") and not multiline
    return max(ways, *inner) * (1 if anchored else max(1, length))


def _ways(parts: Any, length: int, inner: list[float]) -> float:
    total = 1.0
    for kind, value in parts:
        match str(kind):
            case "MAX_REPEAT" | "MIN_REPEAT":
                low, high, content = value
                total *= _repeated(int(low), min(int(high), length), _ways(content, length, inner))
            case "POSSESSIVE_REPEAT":
                inner.append(length * _ways(value[2], length, inner))
            case "ATOMIC_GROUP":
                inner.append(_ways(value, length, inner))
            case "ASSERT" | "ASSERT_NOT":
                inner.append(_ways(value[1], length, inner))
            case "SUBPATTERN":
                total *= _ways(value[3], length, inner)
            case "BRANCH":
                total *= sum(_ways(one, length, inner) for one in value[1])
            case "GROUPREF_EXISTS":
                total *= sum(_ways(one, length, inner) for one in value[1:] if one is not None)
        if total > MAX_STEPS:
            return math.inf
    return total


def _repeated(low: int, high: int, ways: float) -> float:
    counts = max(1, high - low + 1)
    if ways <= 1:
        return counts
    if ways == math.inf or high * math.log(ways) > math.log(MAX_STEPS):
        return math.inf if high else 1
    return counts * ways**high


_parser: Any = re._parser  # type: ignore[attr-defined]  # no public one tells how a pattern is read


# -- bodies ------------------------------------------------------------------------------------------------------------


def _pattern(_: Any, pattern: str, text: Any, part: Mapping[str, Any]) -> Iterator[ValidationError]:
    if isinstance(text, str) and len(text) <= part.get("maxLength", math.inf) and re.search(pattern, text) is None:
        yield ValidationError("does not match")


def _unique(validator: Any, unique: bool, items: Any, part: Mapping[str, Any]) -> Iterator[ValidationError]:
    if isinstance(items, list) and len(items) <= part.get("maxItems", math.inf):
        yield from Draft202012Validator.VALIDATORS["uniqueItems"](validator, unique, items, part) or ()


_Validator: Any = validators.extend(  # type: ignore[no-untyped-call]
    Draft202012Validator, {"pattern": _pattern, "uniqueItems": _unique}
)


def validator_of(schema: Mapping[str, Any]) -> Any:
    """Return what holds bodies to a *schema* that was checked when it was declared."""
    return _Validator(schema)


def check_body(schema: Mapping[str, Any], body: bytes) -> None:
    """Return if *body* is JSON that fits *schema*.

    Raises:
        BadRequest: what would be right.
    """
    check_document(validator_of(schema), read_json(body))


def check_document(validator: Any, document: Any) -> None:
    """Return if *document* fits.

    Raises:
        BadRequest: with a sentence for each of the first problems, which says what would be right.
    """
    try:
        found = list(itertools.islice(validator.iter_errors(document), MAX_PROBLEMS + 1))
    except RecursionError:
        raise BadRequest("invalid", "the body is nested too deeply") from None
    if not found:
        return
    words = "; ".join(dict.fromkeys(_words(problem) for problem in found[:MAX_PROBLEMS]))
    if len(found) > MAX_PROBLEMS:
        words += "; and more"
    raise BadRequest("invalid", words[:MAX_PROBLEM_CHARS])


def _words(problem: ValidationError) -> str:
    """Return what is wrong, without the value itself, which may be long, or a secret in the wrong place."""
    where = ".".join(str(part) for part in problem.absolute_path) or "the body"
    kind, wanted = problem.validator, problem.validator_value
    if kind == "enum" and isinstance(wanted, Collection):
        return f"{where} must be one of: {', '.join(str(one) for one in wanted)}"
    if kind == "required" and isinstance(problem.instance, dict) and isinstance(wanted, Collection):
        missing = [str(name) for name in wanted if name not in problem.instance]
        words = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} required"
        return words if where == "the body" else f"{where}: {words}"
    if kind == "type":
        kinds = [wanted] if isinstance(wanted, str) else list(wanted) if isinstance(wanted, Collection) else []
        return f"{where} must be of type {' or '.join(str(one) for one in kinds)}"
    if kind == "const":
        return f"{where} must be {wanted!r}"
    if kind in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        side = (
            "at least"
            if kind == "minimum"
            else "at most"
            if kind == "maximum"
            else "beyond"
            if "Min" in kind
            else "below"
        )
        return f"{where} must be {side} {wanted}"
    if kind in ("minLength", "minItems", "minProperties"):
        return f"{where} must have at least {_counted(wanted, kind)}"
    if kind in ("maxLength", "maxItems", "maxProperties"):
        return f"{where} must have at most {_counted(wanted, kind)}"
    if kind == "pattern":
        return f"{where} must match {wanted}"
    if kind == "additionalProperties" and isinstance(problem.instance, dict):
        known = problem.schema.get("properties", {}) if isinstance(problem.schema, dict) else {}
        extra = [str(name)[:64] for name in problem.instance if name not in known]
        return f"{where} has {', '.join(extra[:5])}, and may have: {', '.join(known)}"
    return f"{where} does not fit {kind}"


_UNITS = {"Length": "character", "Items": "item", "Properties": "member"}


def _counted(number: Any, kind: str) -> str:
    return f"{number} {_UNITS[kind[3:]]}{'' if number == 1 else 's'}"
