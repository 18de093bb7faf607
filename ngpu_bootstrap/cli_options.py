"""The options every command of `ngpu-bootstrap` has, and what they lead to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ngpu_bootstrap.config import DEFAULT_DATA_DIR, ENV_PREFIX, BootstrapSettings
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


def management(config: Path | None, data_dir: Path | None) -> Any:
    """Return the management commands on a data directory; loaded here, since it takes a second."""
    from ngpu_bootstrap.commands import Management

    return Management(settings_of(config, data_dir=data_dir))
