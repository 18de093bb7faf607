"""Configuration: defaults, then a TOML file, then the environment, then flags; frozen and validated once at start.

A daemon describes its keys as a `DaemonSettings` subclass (tables as `Section`s), every field with a description, and
calls `load_settings`. An unknown key is an error that names the nearest known one and where it was written, because a
misspelled key that is silently ignored is a limit its operator believes in and does not have. `sample_toml` renders
the same descriptions as a file to start from, so that documentation cannot drift from the code.

Environment: the prefix and the key in upper case, two underscores between table and key
(`NGPU_NODE_LIMITS__BODY_BYTES=1000`); lists and tables are written as JSON.
"""

from __future__ import annotations

import difflib
import enum
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError
from pydantic_settings.sources import EnvSettingsSource

from ngpu_daemon.errors import OperatorError

ENV_DELIMITER = "__"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class ConfigurationError(OperatorError):
    """The configuration cannot be used; `problems` holds one line for each thing to change."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class Section(BaseModel):
    """A table of the configuration file: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class DaemonSettings(BaseSettings):
    """The whole configuration of one daemon: frozen, no unknown keys.

    Building one directly takes the values given and nothing else; only `load_settings` looks at files and at the
    environment. (A plain `BaseSettings` would read a field called `path` from `$PATH`.)
    """

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", validate_default=True, env_nested_delimiter=ENV_DELIMITER
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


Model = TypeVar("Model", bound=DaemonSettings)


def load_settings(
    model: type[Model],
    path: Path | None = None,
    env_prefix: str = "",
    overrides: Mapping[str, Any] | None = None,
) -> Model:
    """Return the daemon's configuration, each key from the strongest of defaults < file < environment < flags.

    Args:
        model: the keys, their types, defaults and descriptions.
        path: the TOML file. None reads no file; a path that is not there is an error.
        env_prefix: what the daemon's variables start with, `NGPU_NODE_`. Empty reads no environment.
        overrides: values of flags by key, tables nested; a None was not given and overrides nothing.

    Raises:
        ConfigurationError: with one line for each problem, all of them at once.
    """
    file_values = _read_toml(path) if path is not None else {}
    env_values = _read_environment(model, env_prefix) if env_prefix else {}
    flag_values = _without_none(overrides or {})
    merged = _merge(_merge(file_values, env_values), flag_values)
    try:
        return model(**merged)
    except ValidationError as error:
        origin = _Origin(path, env_prefix, env_values, flag_values)
        problems = [_describe(model, problem, origin) for problem in error.errors(include_url=False)]
        raise ConfigurationError(list(dict.fromkeys(problems))) from None


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that *name* was most likely meant to be, or None when nothing is close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


# -- sources -----------------------------------------------------------------------------------------------------------


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (ValueError, RecursionError) as error:  # not only TOMLDecodeError: a number of 5,000 digits, a deep list
        raise ConfigurationError([f"{path}: not valid TOML: {error}"]) from None
    except OSError as error:
        raise ConfigurationError([f"cannot read the configuration {path}: {error.strerror}"]) from None


def _read_environment(model: type[DaemonSettings], prefix: str) -> dict[str, Any]:
    known = [_variable(prefix, (name,)) for name in model.model_fields]
    problems = []
    for variable in sorted(os.environ):
        if variable.upper().startswith(prefix):
            top, *below = variable.upper().removeprefix(prefix).split(ENV_DELIMITER)
            if (name := prefix + top) not in known:
                problems.append(_unknown(f"environment variable {variable}", nearest(name, known), below))
    if problems:
        raise ConfigurationError(problems)
    try:
        return EnvSettingsSource(model, env_prefix=prefix)()
    except SettingsError as error:
        # its text names the field, and its cause quotes the value: only the first may be shown
        raise ConfigurationError([f"environment {prefix}*: {error}: write lists and tables as JSON"]) from None


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            if table := _without_none(value):
                kept[key] = table
        elif value is not None:
            kept[key] = value
    return kept


def _merge(weaker: Mapping[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, tables merged key by key; anything else (lists too) is replaced whole."""
    merged = dict(weaker)
    for key, value in stronger.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


# -- what to tell the operator -----------------------------------------------------------------------------------------


class _Origin:
    """Which source a key's value came from, as the operator wrote it."""

    def __init__(
        self, path: Path | None, env_prefix: str, env_values: Mapping[str, Any], flag_values: Mapping[str, Any]
    ) -> None:
        self._path = path
        self._prefix = env_prefix
        self._env_values = env_values
        self._flag_values = flag_values

    def name(self, keys: Sequence[str]) -> str:
        if _holds(self._flag_values, keys):
            return "--" + "-".join(keys).replace("_", "-")
        if _holds(self._env_values, keys):
            return f"environment variable {_variable(self._prefix, keys)}"
        return str(self._path) if self._path is not None else "configuration"


def _variable(prefix: str, keys: Sequence[str]) -> str:
    return prefix + ENV_DELIMITER.join(keys).upper()


def _holds(values: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(values, Mapping) or key not in values:
            return False
        values = values[key]
    return True


def _describe(model: type[BaseModel], problem: Any, origin: _Origin) -> str:
    location: tuple[str | int, ...] = problem["loc"]
    keys = [part for part in location if isinstance(part, str)]
    if not keys:  # a rule between keys: its text names them, and each may come from another source
        return f"configuration: {problem['msg'].removeprefix('Value error, ')}"
    where = origin.name(keys)
    if problem["type"] == "extra_forbidden":
        siblings = list(_model_at(model, keys[:-1]).model_fields)
        return _unknown(f"{where}: {_dotted(location)}", nearest(keys[-1], siblings), ())
    if problem["type"] == "missing":
        return f"{where}: {_dotted(location)} is required"
    return f"{where}: {_dotted(location)}: {problem_words(problem)}"


def problem_words(problem: Any) -> str:
    """Return what a value must be instead, of one of pydantic's errors: never the value itself, which may be a secret
    in the wrong place."""
    kind, given, about = problem["type"], problem.get("input"), problem.get("ctx") or {}
    if kind in ("literal_error", "enum"):
        known = re.findall(r"'([^']*)'", str(about.get("expected", "")))
        meant = nearest(given, known) if isinstance(given, str) else None
        hint = "" if meant is None else f'; did you mean "{meant}"?'
        return f"must be one of {', '.join(one or 'an empty text' for one in known)}{hint}"
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        bound = about[key]
        return f"must {words.format(f'{bound:g}' if isinstance(bound, float) else bound)}"
    return str(problem["msg"]).removeprefix("Value error, ")


_KINDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "path_type": "a path",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "be at least {}"),
    "less_than_equal": ("le", "be at most {}"),
    "greater_than": ("gt", "be more than {}"),
    "less_than": ("lt", "be less than {}"),
    "string_pattern_mismatch": ("pattern", "match {}"),
    "string_too_short": ("min_length", "have at least {} characters"),
    "string_too_long": ("max_length", "have at most {} characters"),
    "too_short": ("min_length", "have at least {} entries"),
    "too_long": ("max_length", "have at most {} entries"),
}


def _unknown(what: str, meant: str | None, below: Sequence[str]) -> str:
    suggestion = "" if meant is None else f'; did you mean "{ENV_DELIMITER.join((meant, *below))}"?'
    return f"{what} is not a known key{suggestion}"


def _dotted(location: Sequence[str | int]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _model_at(model: type[BaseModel], keys: Sequence[str]) -> type[BaseModel]:
    for key in keys:
        if (field := model.model_fields.get(key)) is not None:
            model = _table_of(field.annotation) or model
    return model


def _table_of(annotation: Any) -> type[BaseModel] | None:
    """Return the table a field holds, bare, optional or in a list; None for a plain value."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((table for part in typing.get_args(annotation) if (table := _table_of(part))), None)


# -- the sample --------------------------------------------------------------------------------------------------------


def sample_toml(model: type[DaemonSettings], heading: str = "") -> str:
    """Return a configuration file that documents every key of *model* and loads as it stands.

    Keys that have a default are commented out with it; a required key shows its first example. Repeated tables
    (`[[bootstraps]]`) and tables by name (`[public.NAME]`) are shown as one commented-out table.
    """
    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    if lines:
        lines.append("")
    lines += _table_lines(model, (), commented=False)
    return "\n".join(lines).rstrip("\n") + "\n"


def _table_lines(model: type[BaseModel], above: tuple[str, ...], *, commented: bool) -> Iterator[str]:
    tables: list[tuple[str, FieldInfo, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        if (table := _table_of(field.annotation)) is not None:
            tables.append((name, field, table))
            continue
        yield from _comment(field)
        yield _key_line(name, field, commented=commented)
        yield ""
    for name, field, table in tables:
        repeated = not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
        named = typing.get_origin(field.annotation) is dict
        path = (*above, name, "NAME") if named else (*above, name)
        yield from _comment(field)
        header = f"[[{'.'.join(path)}]]" if repeated and not named else f"[{'.'.join(path)}]"
        yield f"# {header}" if repeated or commented else header
        yield from _table_lines(table, path, commented=repeated or commented)


def _comment(field: FieldInfo) -> Iterator[str]:
    for line in (field.description or "").splitlines():
        yield f"# {line}".rstrip()


def _key_line(name: str, field: FieldInfo, *, commented: bool) -> str:
    default = None if field.is_required() else field.get_default(call_default_factory=True, validated_data={})
    shown = default if default is not None else next(iter(field.examples or ()), "")
    line = f"{name} = {toml_value(shown)}"
    return f"# {line}" if commented or not field.is_required() else line


def toml_value(value: Any) -> str:
    """Return *value* as TOML text. Only what settings hold: text, numbers, booleans, paths, enums, lists, tables."""
    if isinstance(value, enum.Enum):
        return toml_value(value.value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_toml_key(str(key))} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple | set | frozenset):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    # a JSON string is a TOML basic string, but for DEL, which TOML wants escaped
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else toml_value(key)
