"""Whether the workspaces that `[profiles.bind]` and `[profiles.public]` name are there.

An id that never was any is a mistake of whoever wrote it, and the start says so. One whose workspace was removed since
is not: nobody who removes a workspace should have to think of every bootstrap's configuration, so it may start, warns,
and answers the calls of that profile with 503 until the configuration names another. Pure.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ngpu_bootstrap.config import ProfilesSection

MISTYPED = 0.85  # how alike two ids must be: by chance, two of 18 digits have half of them in common


@dataclass(frozen=True, slots=True)
class Bindings:
    """What was found.

    Attributes:
        problems: a line for each id that names no workspace.
        lost: key and id where the workspace was removed.
    """

    problems: tuple[str, ...]
    lost: tuple[tuple[str, str], ...]


def check_bindings(section: ProfilesSection, names: Mapping[str, str], removed: Collection[str]) -> Bindings:
    """Return which workspaces of the configuration are not there.

    Args:
        names: of the workspaces there are, by id.
        removed: ids of those there were.
    """
    wanted = [(f"profiles.bind.{profile}", id) for profile, id in section.bind.items()]
    wanted += [(f"profiles.public.{profile}.workspace", public.workspace) for profile, public in section.public.items()]
    missing = [(key, id) for key, id in wanted if id not in names]
    return Bindings(
        tuple(f"{key}: {_problem(id, names)}" for key, id in missing if id not in removed),
        tuple((key, id) for key, id in missing if id in removed),
    )


def _problem(id: str, names: Mapping[str, str]) -> str:
    if not names:
        return (
            f'there is no workspace "{id}", and none at all: start without this key, make one with '
            "`ngpu-bootstrap workspace add --file FILE`, and write the id that it prints here"
        )
    named = [one for one, name in names.items() if name == id]
    close = named if len(named) == 1 else difflib.get_close_matches(id, names, n=1, cutoff=MISTYPED)
    hint = "`ngpu-bootstrap workspace list` lists those there are"
    if close:
        hint = f'did you mean "{close[0]}" ({names[close[0]]})?'
    return f'there is no workspace "{id}"; {hint}'
