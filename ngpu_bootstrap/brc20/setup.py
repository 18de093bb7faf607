"""The checker as the operator configured it: which indexer, with which key, over which HTTP client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx

from ngpu_bootstrap.brc20.checker import Brc20Checker
from ngpu_bootstrap.brc20.indexers import Hiro, Indexer, UniSat
from ngpu_bootstrap.config import Brc20Section
from ngpu_daemon.errors import OperatorError

_URLS = {"unisat": "https://open-api.unisat.io", "hiro": "https://api.hiro.so"}
_MAX_KEY_BYTES = 4096


class KeyFileError(OperatorError):
    """The file with the indexer's API key cannot be used."""


@asynccontextmanager
async def open_checker(section: Brc20Section) -> AsyncIterator[Brc20Checker]:
    """Open the checker that *section* describes.

    Raises:
        KeyFileError: its key cannot be read.
    """
    key = _read_key(section.key_file) if section.key_file is not None else ""
    async with AsyncExitStack() as stack:
        indexer: Indexer | None = None
        if section.indexer:
            limits = httpx.Limits(max_connections=section.at_once)
            client = await stack.enter_async_context(
                httpx.AsyncClient(timeout=section.timeout_s, limits=limits, follow_redirects=False)
            )
            url = (section.url or _URLS[section.indexer]).rstrip("/")
            indexer = (UniSat if section.indexer == "unisat" else Hiro)(client, url, key)
        yield Brc20Checker(
            indexer,
            network=section.network,
            ticker=section.ticker,
            timeout_s=section.timeout_s,
            cache_s=section.cache_s,
            cache_size=section.cache_size,
            at_once=section.at_once,
        )


def _read_key(path: Path) -> str:
    try:
        if path.stat().st_mode & 0o077:
            raise KeyFileError(f"others can read {path}: chmod 600 it")
        key = path.read_bytes()[:_MAX_KEY_BYTES].decode("ascii").strip()
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise KeyFileError(f"{path} does not hold an API key") from None
    if not key or not key.isprintable() or " " in key:
        raise KeyFileError(f"{path} does not hold an API key")
    return key
