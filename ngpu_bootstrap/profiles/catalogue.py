"""The profiles in use: read and checked at the start, and asked for every call that no part of ours answers.

Owns which profile and route a method and path mean. Where two enabled profiles declare the same call, the one named
first in `profiles.enabled` answers it, and `Catalogue.covered` lists what the other does not get; within a profile a
literal segment goes before `{name}` and that before `{name...}`. Paths of the bootstrap's own cannot be declared: the
first segment is always literal, and decides in one look-up whether a profile is concerned at all.

Files are read here and nowhere else, once; everything after is pure.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ngpu_bootstrap.config import ProfilesSection
from ngpu_bootstrap.profiles.declaration import (
    Credential,
    Envelope,
    FixedAnswer,
    FormBounds,
    Links,
    Mode,
    Profile,
    Route,
    problems_between,
)
from ngpu_bootstrap.profiles.job_declaration import AskedJob, SubmittedJob
from ngpu_bootstrap.profiles.places import Place
from ngpu_daemon.errors import OperatorError
from ngpu_daemon.settings import nearest, problem_words
from ngpu_protocol.job_terms import Ask

RESERVED_SEGMENTS = frozenset({"", "proxy", "user", "brc20", "docs", "openapi.json", "ready", "metrics"})
RESERVED_PREFIXES = ("/api/v1/", "/v1/files/")
# Answered by the bootstrap on its own listener; a profile's own listener answers them as it declares.
OWN_LISTENER_ONLY = frozenset({"health"})

_SETTING = re.compile(r"\$([a-z][a-z0-9_]*)")
_MAX_FILE_BYTES = 1024 * 1024


def is_own(path: str) -> bool:
    """Return whether *path* is one that the bootstrap answers itself on every listener of its own."""
    return path[1:].split("/")[0] in RESERVED_SEGMENTS or f"{path}/".startswith(RESERVED_PREFIXES)


class ProfileError(OperatorError):
    """A profile that cannot be used.

    Attributes:
        problems: one line for each thing to change.
        name: what the profile is called, empty where that is not known.
    """

    def __init__(self, problems: Sequence[str], name: str = "") -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)
        self.name = name


@dataclass(frozen=True, slots=True)
class Matched:
    """A call that a profile answers. `parameters` are the raw texts of the path's parameters, not decoded."""

    profile: Profile
    route: Route
    parameters: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class WrongMethod:
    """A path that a profile knows, with other methods."""

    profile: Profile
    allowed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Covered:
    """A call that two profiles declare: *by* answers it, *profile* does not."""

    profile: str
    by: str
    method: str
    path: str


class Catalogue:
    """Every enabled profile, in the order in which they are asked.

    Attributes:
        profiles: in that order.
        covered: calls that an earlier profile takes from a later one.
    """

    def __init__(self, profiles: Sequence[Profile] = ()) -> None:
        self.profiles = tuple(profiles)
        self.covered: list[Covered] = []
        self._by_first: dict[str, list[_Compiled]] = {}
        self._own: dict[str, dict[str, list[_Compiled]]] = {}
        for profile in self.profiles:
            own: dict[str, list[_Compiled]] = {}
            for route in sorted(profile.routes, key=_specificity):
                compiled = _Compiled(profile, route)
                own.setdefault(compiled.first, []).append(compiled)
                if compiled.first in OWN_LISTENER_ONLY:
                    continue
                before = self._by_first.setdefault(compiled.first, [])
                by = next((one for one in before if one.profile is not profile and one.covers(compiled)), None)
                if by is not None:
                    self.covered.append(Covered(profile.name, by.profile.name, route.method, route.path))
                    continue
                before.append(compiled)
            self._own[profile.name] = own

    def __len__(self) -> int:
        return len(self.profiles)

    def get(self, name: str) -> Profile | None:
        """Return the enabled profile of this name."""
        return next((one for one in self.profiles if one.name == name), None)

    def routes(self) -> Iterator[tuple[Profile, Route]]:
        """Yield what the bootstrap's own listener answers, in the order in which profiles and routes were declared."""
        answered = {id(one.route) for several in self._by_first.values() for one in several}
        for profile in self.profiles:
            yield from ((profile, route) for route in profile.routes if id(route) in answered)

    def match(self, method: str, path: str, *, only: str = "") -> Matched | WrongMethod | None:
        """Return what answers *method* and *path* (raw, with its leading slash); None when no profile is concerned.

        Args:
            only: the profile whose own listener the call came on; empty for the bootstrap's.
        """
        if not only and path.startswith(RESERVED_PREFIXES):  # whatever `/api/{rest...}` is declared to mean
            return None
        routes = self._own.get(only, {}) if only else self._by_first
        slash = path.find("/", 1)
        found = routes.get(path[1:slash] if slash > 0 else path[1:])
        if found is None:
            return None
        segments = tuple(path[1:].split("/"))
        other: WrongMethod | None = None
        for compiled in found:
            parameters = compiled.parameters(segments)
            if parameters is None:
                continue
            route = compiled.route
            if method == route.method or (method == "HEAD" and route.method == "GET"):
                return Matched(compiled.profile, route, parameters)
            allowed = (*(other.allowed if other is not None else ()), route.method)
            other = WrongMethod(other.profile if other is not None else compiled.profile, allowed)
        return other

    def near(self, path: str) -> Profile | None:
        """Return whose caller most likely asks for a *path* that nothing answers: the profile that has its first
        segment."""
        if is_own(path):
            return None
        found = self._by_first.get(path[1:].partition("/")[0])
        return found[0].profile if found else None


class _Compiled:
    """A route's path, ready to be compared."""

    __slots__ = ("first", "profile", "rest", "route", "wanted")

    def __init__(self, profile: Profile, route: Route) -> None:
        self.profile = profile
        self.route = route
        segments = route.path[1:].split("/")
        self.rest = segments[-1].endswith("...}")
        self.wanted = tuple(segments)
        self.first = segments[0]

    def covers(self, other: _Compiled) -> bool:
        """Whether every call of *other* is one of this route too."""
        if self.route.method != other.route.method:
            return False
        size, others = len(self.wanted), other.wanted
        if self.rest:
            if len(others) < size:
                return False
        elif other.rest or len(others) != size:
            return False
        return all(
            pattern.startswith("{") or pattern == one for pattern, one in zip(self.wanted, others[:size], strict=True)
        )

    def parameters(self, segments: tuple[str, ...]) -> dict[str, str] | None:
        wanted = self.wanted
        if len(segments) != len(wanted) and not (self.rest and len(segments) > len(wanted)):
            return None
        found: dict[str, str] = {}
        for number, pattern in enumerate(wanted):
            segment = segments[number]
            if not pattern.startswith("{"):
                if segment != pattern:
                    return None
                continue
            if self.rest and number == len(wanted) - 1:
                segment = "/".join(segments[number:])
                pattern = pattern.replace("...", "")
            if not segment:
                return None
            found[pattern[1:-1]] = segment
        return found


def _specificity(route: Route) -> tuple[tuple[int, ...], int]:
    segments = route.path[1:].split("/")
    ranks = tuple(2 if s.endswith("...}") else 1 if s.startswith("{") else 0 for s in segments)
    return ranks, -len(segments)


# -- reading -----------------------------------------------------------------------------------------------------------


def shipped_names() -> tuple[str, ...]:
    """Return the names of the profiles that come with this package."""
    folder = resources.files("ngpu_bootstrap.profiles") / "shipped"
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


def load_catalogue(section: ProfilesSection) -> Catalogue:
    """Return the profiles that *section* enables, shipped ones and the operator's.

    Raises:
        ProfileError: with every problem found.
    """
    problems: list[str] = []
    own: dict[str, Profile] = {}
    unread: set[str] = set()  # named by files with problems, which is said once
    for file in section.files:
        try:
            profile = read_profile(file, section.settings)
        except ProfileError as error:
            problems += error.problems
            unread.add(error.name)
            continue
        if profile.name in own:
            problems.append(f"{file}: another file declares a profile named {profile.name} too")
        own[profile.name] = profile
        if section.enabled and profile.name not in section.enabled:
            problems.append(f'profiles.enabled does not name "{profile.name}", which {file} declares')
    known = (*shipped_names(), *own)
    profiles: list[Profile] = []
    for name in section.enabled or (*shipped_names(), *own):
        if name in own:  # an operator's file takes the place of a shipped one of its name
            profiles.append(own[name])
        elif name in shipped_names():
            try:
                profiles.append(read_shipped(name, section.settings))
            except ProfileError as error:
                problems += error.problems
        elif name not in unread and "" not in unread:
            meant = nearest(name, known)
            hint = f'; did you mean "{meant}"?' if meant else f"; known are {', '.join(known)}"
            problems.append(f'profiles.enabled: there is no profile "{name}"{hint}')
    for what, names in (
        ("bind", section.bind),
        ("public", section.public),
        ("listen", section.listen),
        ("settings", section.settings),
    ):
        for name in names:
            of = next((one for one in profiles if one.name == name), None)
            if of is None and name not in unread and "" not in unread:
                problems.append(f"profiles.{what}.{name}: no profile of this name is enabled")
            elif of is not None and what == "bind" and of.workspace != "bound":
                problems.append(f'profiles.bind.{name}: a profile with workspace = "{of.workspace}" is bound to none')
    if problems:
        raise ProfileError(problems)
    return Catalogue(profiles)


def read_shipped(name: str, settings: Mapping[str, Mapping[str, Any]] | None = None) -> Profile:
    """Return a profile that comes with this package.

    Raises:
        ProfileError: the operator's settings do not fit it.
    """
    file = resources.files("ngpu_bootstrap.profiles") / "shipped" / f"{name}.toml"
    return parse_profile(file.read_text("utf-8"), f"profile {name}", settings or {})


def read_profile(path: Path, settings: Mapping[str, Mapping[str, Any]] | None = None) -> Profile:
    """Return the profile in a file of the operator's.

    Raises:
        ProfileError: it cannot be read, or is none.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ProfileError([f"{path}: a profile has at most {_MAX_FILE_BYTES} bytes"])
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError([f"cannot read the profile {path}: {error}"]) from None
    return parse_profile(text, str(path), settings or {})


def parse_profile(text: str, where: str, settings: Mapping[str, Mapping[str, Any]] | None = None) -> Profile:
    """Return the profile that a TOML *text* declares, with the operator's *settings* (by profile name) filled in.

    Args:
        where: names the text in errors.

    Raises:
        ProfileError: with one line for each problem.
    """
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProfileError([f"{where}: not valid TOML: {error}"]) from None
    name = document.get("name")
    try:
        return _parsed(document, where, settings or {})
    except ProfileError as error:
        raise ProfileError(error.problems, name if isinstance(name, str) else "") from None


def _parsed(document: dict[str, Any], where: str, settings: Mapping[str, Mapping[str, Any]]) -> Profile:
    defaults = document.get("settings")
    values = dict(defaults) if isinstance(defaults, dict) else {}
    for key, value in settings.get(str(document.get("name")), {}).items():
        if key not in values:
            known = ", ".join(values) or "none"
            raise ProfileError(
                [f"profiles.settings.{document.get('name')}.{key}: {where} has no such setting: {known}"]
            )
        if isinstance(value, bool) != isinstance(values[key], bool) or isinstance(value, str) != isinstance(
            values[key], str
        ):
            raise ProfileError([f"profiles.settings.{document.get('name')}.{key}: must be like {values[key]!r}"])
        values[key] = value
    named: set[str] = set()
    filled = _filled(document, values, named)
    if isinstance(defaults, dict) and isinstance(filled, dict):
        filled["settings"] = values
    problems = [
        f"${name} names no setting; [settings] has {', '.join(values) or 'none'}"
        for name in sorted(named - values.keys())
    ]
    problems += [f'settings.{name}: nothing uses it as "${name}"' for name in values if name not in named]
    try:
        profile = Profile.model_validate(filled)
        problems += [*problems_between(profile), *_reserved(profile)]
    except ValidationError as error:
        problems += _lines(error, document)
    if problems:
        raise ProfileError([f"{where}: {line}" for line in problems])
    return profile


def _filled(value: Any, settings: Mapping[str, Any], named: set[str]) -> Any:
    """Return *value* with each text that is `$name` replaced by the setting of that name; add the names to *named*."""
    if isinstance(value, dict):
        # A JSON schema has `$ref` and the like as keys, and `$` in patterns: it stays as it is.
        return {
            key: item if key in ("schema", "settings") else _filled(item, settings, named)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_filled(item, settings, named) for item in value]
    if isinstance(value, str) and (matched := _SETTING.fullmatch(value)):
        named.add(matched[1])
        return settings.get(matched[1], value)
    return value


def _reserved(profile: Profile) -> Iterator[str]:
    for route in profile.routes:
        first = route.path[1:].split("/")[0]
        if first.startswith("{"):
            yield f"routes: {route.path}: the first segment must be literal, so that calls are told apart at once"
        elif is_own(route.path):
            yield f"routes: {route.path}: this path is the bootstrap's own; choose another"
        if route.mode is Mode.MODELS and profile.workspace != "model":
            yield f'routes: {route.path}: mode = "models" needs workspace = "model"'


def _lines(error: ValidationError, document: Any) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        if isinstance(problem["input"], str) and _SETTING.fullmatch(problem["input"]):
            continue  # a setting that is not there, which is said once
        location = [part for part in problem["loc"] if part not in _TAGS]
        keys = [str(part) for part in location]
        text = problem_words(problem)
        where = _named(location, document)
        if problem["type"] == "extra_forbidden":
            meant = nearest(keys[-1], _known_keys(keys))
            hint = f'; did you mean "{meant}"?' if meant else ""
            yield f"{where} is not a known key{hint}"
        elif problem["type"] == "missing":
            yield f"{where} is required"
        else:
            yield f"{where}: {text}" if where else text


def _named(location: Iterable[str | int], document: Any) -> str:
    """Return a place in a declaration for people: a route by its method and path rather than by its number."""
    text = ""
    at: Any = document
    for part in location:
        if isinstance(part, int):
            at = at[part] if isinstance(at, list) and part < len(at) else None
            path = at.get("path") if isinstance(at, dict) else None
            name = f"{at.get('method', 'POST')} {path}" if isinstance(at, dict) and isinstance(path, str) else str(part)
            text += f"[{name}]"
        else:
            at = at.get(part) if isinstance(at, dict) else None
            text += f".{part}" if text else part
    return text


# Which kind of job it is, where two are tried: no key of the document.
_TAGS = ("submitted", "asked")


def _known_keys(keys: Sequence[str]) -> list[str]:
    """Return the keys of the table that the last of *keys* stands in."""
    tables = [key for key in keys[:-1] if not key.isdigit()]
    model = _TABLES.get(tables[-1] if tables else "")
    models = _JOBS if tables and tables[-1] == "job" else (model,) if model is not None else ()
    return sorted({field.alias or name for one in models for name, field in one.model_fields.items()})


_JOBS: tuple[type[BaseModel], ...] = (SubmittedJob, AskedJob)
_TABLES: Mapping[str, type[BaseModel]] = {
    "": Profile,
    "routes": Route,
    "credentials": Credential,
    "affinity": Place,
    "key": Place,
    "answer": FixedAnswer,
    "envelope": Envelope,
    "form": FormBounds,
    "links": Links,
    "poll": Ask,
    "cancel": Ask,
}
