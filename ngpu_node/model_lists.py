"""Lists of models as servers and bootstraps give them: OpenAI's `GET /v1/models`, and the model interface's.

{"object": "list", "data": [{"id": "Llama3-8B", ...}, ...]}
{"project": "DecentralGPT", "data": [{"model": "Llama3-8B", "url": "http://..."}, ...]}
"""

from __future__ import annotations

import json
from typing import NamedTuple

MAX_LISTED = 65_536
MAX_NAME_CHARS = 256


class ListedModel(NamedTuple):
    """A model of a list; its project is empty where none is named."""

    project: str
    model: str


def models_in(body: bytes, most: int = MAX_LISTED) -> tuple[ListedModel, ...] | None:
    """Return the first *most* models of a list, without what is none; None where *body* is no list."""
    try:
        document = json.loads(body)
        entries, of_all = document["data"], document.get("project", "")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(entries, list):
        return None
    found: list[ListedModel] = []
    for entry in entries:
        if len(found) == most:
            break
        if not isinstance(entry, dict):
            continue
        project, model = entry.get("project", of_all), entry.get("model", entry.get("id"))
        # names are shown on terminals
        if isinstance(project, str) and isinstance(model, str) and model and (project + model).isprintable():
            found.append(ListedModel(project[:MAX_NAME_CHARS], model[:MAX_NAME_CHARS]))
    return tuple(found)
