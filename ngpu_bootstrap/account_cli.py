"""The commands about accounts and products of existing NGPU clients: `ngpu-bootstrap user` and `product`."""

from __future__ import annotations

import getpass
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ngpu_bootstrap.cli_options import ArgumentError, ConfigOption, DataDirOption, JsonOption, settings_of
from ngpu_daemon.entry import run_main

user_app = typer.Typer(help="Accounts of existing NGPU clients ([compat] ngpu_cloud).", no_args_is_help=True)
product_app = typer.Typer(help="Products that existing NGPU clients are shown.", no_args_is_help=True)


def _accounts(config: Path | None, data_dir: Path | None) -> Any:
    from ngpu_bootstrap.compat.accounts import Accounts

    return Accounts(settings_of(config, data_dir=data_dir))


def _password(file: Path | None) -> str:
    if file is not None:
        try:
            text = file.read_text().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    elif sys.stdin.isatty():
        text = getpass.getpass("password: ")
        if text != getpass.getpass("again: "):
            raise ArgumentError("the two passwords differ")
    else:
        raise ArgumentError("give --password-file: there is no terminal to ask at")
    if len(text) < 8:
        raise ArgumentError("a password has at least 8 characters")
    return text


@user_app.command("add")
def user_add(
    email: Annotated[str, typer.Argument(help="What the user logs in with.")],
    password_file: Annotated[Path | None, typer.Option(help="File with the password; default: asked for.")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an account. The daemon may run meanwhile."""

    def main() -> None:
        _accounts(config, data_dir).add_user(email, _password(password_file))
        typer.echo(json.dumps({"added": email}) if as_json else f"added {email}")

    run_main(main)


@user_app.command("list")
def user_list(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show every account."""

    def main() -> None:
        users = _accounts(config, data_dir).users()
        if as_json:
            typer.echo(
                json.dumps({"users": [{"email": one.email, "created_at_ms": one.created_at_ms} for one in users]})
            )
        for one in () if as_json else users:
            typer.echo(one.email)

    run_main(main)


@user_app.command("remove")
def user_remove(
    email: Annotated[str, typer.Argument(help="As `user list` shows it.")],
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove an account with its logins, images and groups. Its workspaces stay: `workspace remove` ends those."""

    def main() -> None:
        _accounts(config, data_dir).remove_user(email)
        typer.echo(json.dumps({"removed": email}) if as_json else f"removed {email}")

    run_main(main)


@product_app.command("add")
def product_add(
    name: Annotated[str, typer.Argument(help="What users see.")],
    gpu_model: Annotated[str, typer.Option(help="GPU its workspaces run on; empty: none.")] = "",
    field: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of any other field; repeat for more.")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a product: what workspaces of existing clients run on. Prices and sizes are shown, and nothing else."""

    def main() -> None:
        given = {"product_name": name, "gpu_model": gpu_model, "gpu_name": gpu_model}
        for text in field or ():
            key, separator, value = text.partition("=")
            if not separator:
                raise ArgumentError(f"--field {text[:64]}: write NAME=VALUE")
            given[key] = value
        number = _accounts(config, data_dir).add_product(given)
        typer.echo(json.dumps({"id": number}) if as_json else f"product {number}")

    run_main(main)


@product_app.command("list")
def product_list(config: ConfigOption = None, data_dir: DataDirOption = None, as_json: JsonOption = False) -> None:
    """Show every product."""

    def main() -> None:
        products = _accounts(config, data_dir).products()
        if as_json:
            typer.echo(json.dumps({"products": [{"id": number, **document} for number, document in products]}))
        for number, document in () if as_json else products:
            typer.echo(f"{number}  {document['product_name']}  {document['gpu_model']}")

    run_main(main)


@product_app.command("remove")
def product_remove(
    number: Annotated[int, typer.Argument(help="As `product list` shows it.")],
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a product. Workspaces made of it stay."""

    def main() -> None:
        _accounts(config, data_dir).remove_product(number)
        typer.echo(json.dumps({"removed": number}) if as_json else f"removed product {number}")

    run_main(main)
