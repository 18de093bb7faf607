"""Which calls of a registered model server workspaces may make, and where on the server each of them lies. Pure.

A model server is a program of the owner's, with more on its port than the calls it registered for: Ollama deletes
models there, vLLM loads adapters, llama.cpp writes its cache to files. What passes is the model interface (OpenAI's
paths, with their methods), the path of the registered URL, and what the registration declares besides (`paths`);
nothing else, whoever asks.

The registered URL is that of the model's main call, which `type` names, and need not be where OpenAI has it:

    http://127.0.0.1:8000/v1/chat/completions       as they are
    http://127.0.0.1:8000/llm/v1/chat/completions   all of the interface below /llm
    http://127.0.0.1:8000/llm/v1                    the same, as OpenAI's clients name a base
    http://127.0.0.1:8000/llm/v1/models             the same, as any other call of the interface
    http://127.0.0.1:8000/generate                  the main call there, the others below /
    http://127.0.0.1:8000                           all below /
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote

MAIN_CALLS = {0: "/v1/chat/completions", 1: "/v1/images/generations", 2: "/v1/images/edits"}
"""The call that each type of model is for."""

_CALLS = frozenset({*MAIN_CALLS.values(), "/v1/completions", "/v1/embeddings", "/v1/images/variations"})
_BELOW = "/v1/audio/"
_LIST = "/v1/models"

MAX_DECLARED = 64
MAX_PATH_CHARS = 256
_PATH = re.compile(r"/[!-~]*")  # visible ASCII


class ModelPaths:
    """The paths of one registered copy.

    Args:
        api: the path of its registered URL, without a query; may be empty.
        kind: its type, a key of `MAIN_CALLS`; another one has no main call.
        declared: what it declares besides, each a `declared_path`.
    """

    def __init__(self, api: str, kind: int, declared: Sequence[str] = ()) -> None:
        self._declared = frozenset(path for path in declared if not path.endswith("/"))
        self._folders = tuple(path for path in declared if path.endswith("/"))
        self._elsewhere: dict[str, str] = {}
        base = _base(api)
        if base is None:
            base = ""
            self._declared |= {api}
            if (main := MAIN_CALLS.get(kind)) is not None:
                self._elsewhere[main] = api
        self._base = base

    def target(self, method: str, target: str) -> str | None:
        """Return what the server is asked for when *target*, `/path?query`, is asked of the model; None: it may not."""
        path, mark, query = target.partition("?")
        if _is_interface(method, path):
            return self._elsewhere.get(path, self._base + path) + mark + query
        if path in self._declared or any(_is_below(path, folder) for folder in self._folders):
            return target
        return None


def declared_path(path: str) -> str:
    """Return *path* as a registration may declare it: one path, or with a slash at its end all below it.

    Raises:
        ValueError: it is none; the message says why.
    """
    if _PATH.fullmatch(path) is None or len(path) > MAX_PATH_CHARS:
        raise ValueError(f"a path begins with / and has at most {MAX_PATH_CHARS} visible ASCII characters")
    if "?" in path or "#" in path:
        raise ValueError("a path is declared without a query")
    if _wanders(path):
        raise ValueError("a path is declared without . and .. in it")
    return path


def _base(api: str) -> str | None:
    """Return what stands before the interface's own paths in a URL's path; None where it is none of theirs."""
    path = api.rstrip("/")
    before, below, name = path.rpartition(_BELOW)
    if below and "/" not in name:
        return before
    for end in (*sorted(_CALLS, key=len, reverse=True), _LIST, "/v1"):
        if path.endswith(end):
            return path.removesuffix(end)
    return None if path else ""


def _is_interface(method: str, path: str) -> bool:
    if method == "POST":
        return path in _CALLS or _is_below(path, _BELOW)
    return method in ("GET", "HEAD") and (path == _LIST or _is_below(path, _LIST + "/"))


def _is_below(path: str, folder: str) -> bool:
    """Whether *path* lies below *folder* however a server reads it; everything lies below `/`."""
    return path.startswith(folder) and len(path) >= len(folder) and (folder == "/" or not _wanders(path))


def _wanders(path: str) -> bool:
    """Whether some server may take *path* for one that lies elsewhere: by `..`, in whatever disguise."""
    plain = unquote(path, "latin-1")
    if any(mark in plain for mark in "%\\\0"):
        return True
    return any(part.partition(";")[0] in (".", "..") for part in plain.split("/"))
