"""The options every command of `ngpu-bootstrap` has, and what they lead to."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ngpu_bootstrap.config import DEFAULT_DATA_DIR, ENV_PREFIX, RUNTIME_FILE, BootstrapSettings
from ngpu_daemon.errors import OperatorError
from ngpu_daemon.settings import load_settings

ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML file; `sample-config` prints one.")]
DataDirOption = Annotated[Path | None, typer.Option(help=f"Where it keeps its state (default {DEFAULT_DATA_DIR}).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class ArgumentError(OperatorError):
    """An argument of a command cannot be understood."""


def settings_of(config: Path | None, **flags: Any) -> BootstrapSettings:
    """Return the settings of a command: its flags, the environment, the file."""
    return load_settings(BootstrapSettings, config, ENV_PREFIX, flags)


def url_of(settings: BootstrapSettings, data_dir: Path) -> str:
    """Return where clients reach the bootstrap: as its running daemon says, else as it is configured."""
    try:
        said = json.loads((data_dir / RUNTIME_FILE).read_bytes())["http"][0]
        if isinstance(said, str):
            return said
    except (OSError, ValueError, LookupError, TypeError):
        pass  # none runs, or it is just starting
    scheme = "http" if settings.tls.certificate is None else "https"
    return f"{scheme}://{settings.http_listen}"


def again(config: Path | None, data_dir: Path | None) -> str:
    """Return the options by which a further command finds the same daemon."""
    options = [("--config", config), ("--data-dir", data_dir)]
    return "".join(f" {name} {shlex.quote(str(value))}" for name, value in options if value is not None)


def management(config: Path | None, data_dir: Path | None) -> Any:
    """Return the management commands on a data directory; loaded here, since it takes a second."""
    from ngpu_bootstrap.commands import Management

    return Management(settings_of(config, data_dir=data_dir))
