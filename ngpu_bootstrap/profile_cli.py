"""The commands `ngpu-bootstrap profile ...`: which declared calls there are, and what a path means.

They read what the daemon reads at its start, and nothing else: the configuration, the shipped profiles, the operator's
files. So `check` says before a start what the start would say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ngpu_bootstrap.cli_options import ArgumentError, ConfigOption, JsonOption, settings_of
from ngpu_bootstrap.config import ProfilesSection
from ngpu_daemon.entry import run_main

profile_app = typer.Typer(help="Profiles: calls of other systems' clients, declared in TOML.", no_args_is_help=True)


@profile_app.command("list")
def profile_list(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List the profiles in use, in the order in which they are asked, with their calls."""

    def main() -> None:
        settings = settings_of(config).profiles
        catalogue = _catalogue(config)
        covered = {(one.profile, one.method, one.path): one.by for one in catalogue.covered}
        if as_json:
            typer.echo(
                json.dumps({"profiles": [_document(profile, covered, settings) for profile in catalogue.profiles]})
            )
            return
        table = Table("profile", "call", "mode", "on", "errors")
        for profile in catalogue.profiles:
            for route in profile.routes:
                by = covered.get((profile.name, route.method, route.path))
                mode = f"answered by {by}" if by else route.mode.value
                dialect = profile.dialect_of(route).value
                table.add_row(profile.name, f"{route.method} {route.path}", mode, _runs_on(profile, settings), dialect)
        Console(width=None if Console().is_terminal else 140).print(table)

    run_main(main)


@profile_app.command("check")
def profile_check(
    files: Annotated[list[Path] | None, typer.Argument(help="Files to check beside the configured ones.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the configured profiles, and files before they are configured; exit code 1 and the reasons."""

    def main() -> int:
        from ngpu_bootstrap.profiles.catalogue import ProfileError, read_profile
        from ngpu_daemon.settings import ConfigurationError

        problems: list[str] = []
        checked = 0
        settings: dict[str, dict[str, Any]] = {}
        try:
            settings = settings_of(config).profiles.settings
            checked = len(_catalogue(config))
        except (ConfigurationError, ProfileError) as error:
            problems += error.problems
        for file in files or ():
            try:
                read_profile(file, settings)
                checked += 1
            except ProfileError as error:
                problems += error.problems
        if as_json:
            typer.echo(json.dumps({"checked": checked, "problems": problems}))
        else:
            typer.echo("\n".join(problems) or f"{checked} profiles are right")
        return 1 if problems else 0

    run_main(main)


@profile_app.command("explain")
def profile_explain(
    path: Annotated[str, typer.Argument(help="A path such as /v1/chat/completions.")],
    method: Annotated[str, typer.Option(help="Method of the call, where the path takes several.")] = "",
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which profile answers a path, and what it does with the call."""

    def main() -> None:
        from ngpu_bootstrap.profiles.catalogue import OWN_LISTENER_ONLY, Matched, WrongMethod, is_own

        if not path.startswith("/"):
            raise ArgumentError(f"{path} is no path: it begins with /, as in /v1/chat/completions")
        settings = settings_of(config).profiles
        catalogue = _catalogue(config)
        plain = path.partition("?")[0]
        found = catalogue.match(method.upper() or "POST", plain)
        if isinstance(found, WrongMethod) and not method:
            found = catalogue.match(found.allowed[0], plain)
        if isinstance(found, WrongMethod):
            raise ArgumentError(f"{path} takes {', '.join(found.allowed)}; say --method {found.allowed[0]}")
        if not isinstance(found, Matched):
            first = plain[1:].partition("/")[0]
            if is_own(plain) or first in OWN_LISTENER_ONLY:
                beside = ", and a profile that declares it answers it on its own listener" * (
                    first in OWN_LISTENER_ONLY
                )
                raise ArgumentError(f"{path} is the bootstrap's own{beside}; /docs on the bootstrap says what it is")
            call = f"{method.upper()} {path}".strip()
            raise ArgumentError(f"no profile declares {call}; `ngpu-bootstrap profile list` lists what is")
        profile = found.profile
        document = {
            "profile": profile.name,
            **_route(profile, found.route, settings),
            "parameters": dict(found.parameters),
            "credentials": [str(one) for one in profile.credentials] if found.route.mode != "fixed" else [],
            "public": profile.name in settings.public,
            "listener": settings.listen.get(profile.name, ""),
        }
        if as_json:
            typer.echo(json.dumps(document))
            return
        for key, value in document.items():
            typer.echo(f"{key.replace('_', ' '):<18}{_shown(value)}")

    run_main(main)


def _shown(value: Any) -> str:
    """Return a value of an explanation for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        value = [f"{name} = {one}" for name, one in value.items()]
    if isinstance(value, list):
        value = ", ".join(str(one) for one in value)
    return str(value) if value not in ("", 0) else "-"


def _catalogue(config: Path | None) -> Any:
    from ngpu_bootstrap.profiles.catalogue import load_catalogue  # loaded here: other commands need no profiles

    return load_catalogue(settings_of(config).profiles)


def _runs_on(profile: Any, settings: ProfilesSection) -> str:
    if profile.workspace != "bound":
        return str(profile.workspace)
    return f"bound: {settings.bind.get(profile.name, 'to none, its calls get 503')}"


def _document(profile: Any, covered: dict[tuple[str, str, str], str], settings: ProfilesSection) -> dict[str, Any]:
    return {
        "name": profile.name,
        "summary": profile.summary,
        "workspace": _runs_on(profile, settings),
        "credentials": [str(one) for one in profile.credentials],
        "routes": [
            {
                **_route(profile, route, settings),
                "answered_by": covered.get((profile.name, route.method, route.path), profile.name),
            }
            for route in profile.routes
        ],
    }


def _route(profile: Any, route: Any, settings: ProfilesSection) -> dict[str, Any]:
    return {
        "method": route.method,
        "path": route.path,
        "target": "" if route.mode in ("fixed", "models") else route.target_path,
        "mode": route.mode.value,
        "workspace": _runs_on(profile, settings),
        "errors": profile.dialect_of(route).value,
        "max_body_bytes": route.body_limit,
        "at_once": route.at_once,
        "gpu_types": list(route.gpu_types),
        "validated": route.body_schema is not None,
        "affinity": [str(place) for place in route.affinity],
        **({} if route.job is None else {"job": _job(route.job)}),
        "about": route.about,
    }


def _job(job: Any) -> dict[str, Any]:
    if not job.submits:
        return {"asks_for": job.of, "by": str(job.key), "ends_it": job.ends}
    return {
        "name": job.name,
        "answered": "once, with the result" if job.wait else "at once, with the workspace's own answer",
        "asked_every_s": job.interval_s,
        "given_up_after_s": job.duration_s,
        "lost_after_s": job.away_s,
        "cancelled_by": f"{job.cancel.method} {job.cancel.target}"
        if job.cancel
        else "nothing: it goes on, unasked for",
        "receipted": "from its submission to its end"
        if job.hold
        else "its calls alone: GPU time between questions is in no receipt, and paid to nobody (hold = false)",
    }
