"""What the daemon refuses reaches whoever gave the command, in its own words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from ngpu_bootstrap import admin_socket
from ngpu_bootstrap.admin_socket import AdminSocketError, ask_daemon


def answering(monkeypatch: pytest.MonkeyPatch, status: int, document: Any) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(status, json=document))
    monkeypatch.setattr(admin_socket.httpx, "HTTPTransport", lambda **options: transport)


def test_a_store_that_cannot_write_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, 503, {"reason": "store_unavailable", "message": "the store cannot be used now; come again"})
    with pytest.raises(AdminSocketError, match="the store cannot be used now"):
        ask_daemon(Path("s"), "POST", "/api/v1/workspaces", {})


def test_not_being_ready_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    unready = {"ready": False, "reason": "no_peer: no admitted node is connected", "peers": 0}
    answering(monkeypatch, 503, unready)
    assert ask_daemon(Path("s"), "GET", "/ready") == unready
