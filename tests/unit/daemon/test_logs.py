"""How events look, and what never appears in them."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from ngpu_daemon.logs import REDACTED, configure_logging, redact_text

ROOT = Path(__file__).parents[3]
TOKEN = "48210033-Zk9vJ2xQpL7wRt5yBn3mHc8dFs6gKe1a"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, last_resort = root.handlers[:], root.level, logging.lastResort
    yield
    structlog.reset_defaults()
    root.handlers[:], logging.lastResort = handlers, last_resort
    root.setLevel(level)


def lines(log_format: Any = "json", level: str = "info") -> io.StringIO:
    out = io.StringIO()
    configure_logging(level, log_format, stream=out)
    return out


def test_json_reads_when_how_bad_what_then_fields() -> None:
    out = lines()
    structlog.get_logger().info("peer_connected", peer="16Uiu2HA", streams=3, address=None)
    event = json.loads(out.getvalue())
    assert list(event) == ["timestamp", "level", "event", "peer", "streams", "address"]
    assert (event["level"], event["event"], event["streams"], event["address"]) == ("info", "peer_connected", 3, None)
    assert event["timestamp"].endswith("Z")


def test_what_is_no_terminal_gets_json() -> None:
    out = lines("auto")
    structlog.get_logger().info("x")
    json.loads(out.getvalue())


def test_console_lines_are_for_people() -> None:
    out = lines("console")
    structlog.get_logger().warning("receipt_disputed", task_id="t1")
    assert "receipt_disputed" in out.getvalue()
    assert "task_id=t1" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_console_lines_cannot_be_forged_and_command_no_terminal() -> None:
    out = lines("console")
    evil = "a\x1b[2J\x9b31m\r\u202eb\nINFO forged"
    structlog.get_logger().info("x", field=evil, nested=[evil], short="\x1b[2J")
    structlog.get_logger().info(evil)
    logging.getLogger("other").error("%s", evil)
    try:
        raise ValueError(evil)
    except ValueError:
        structlog.get_logger().exception("failed")
    shown = out.getvalue()
    assert not set(shown) & set("\x1b\x9b\r\u202e")
    assert "\\x1b[2J" in shown
    before_the_traceback = shown.partition("Traceback")[0]
    assert before_the_traceback.count("\n") == 4


def test_levels_below_are_not_shown() -> None:
    out = lines(level="warning")
    structlog.get_logger().info("quiet")
    assert out.getvalue() == ""


SECRET_NAMES = (
    "token ngpu_token Ngpu-Token tokens authorization Cookie passphrase password private_key key_bytes secret "
    "client_secret api_key "
    "credential"
)


@pytest.mark.parametrize("name", SECRET_NAMES.split())
@pytest.mark.parametrize("value", ["hunter2", b"hunter2", ["hunter2"], {"a": "hunter2"}])
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_fields_named_like_secrets_are_redacted(name: str, value: object, log_format: str) -> None:
    out = lines(log_format)
    structlog.get_logger().info("x", **{name: value}, headers={name: value}, deep=[{"a": {name: value}}])
    assert "hunter2" not in out.getvalue()
    assert REDACTED in out.getvalue()


def test_names_that_only_sound_alike_are_kept() -> None:
    out = lines()
    structlog.get_logger().info("x", token_count=3, public_key="02ab", keystore="/a", passphrase=None)
    event = json.loads(out.getvalue())
    assert (event["token_count"], event["public_key"], event["keystore"], event["passphrase"]) == (
        3,
        "02ab",
        "/a",
        None,
    )


@pytest.mark.parametrize(
    "text",
    [
        f"GET /?token={TOKEN} HTTP/1.1",
        f"ngpu_{TOKEN}",
        f"Authorization: Bearer {TOKEN}",
        "authorization: bearer abc.def-ghi",
        "Basic dXNlcjpwYXNz",
        "postgresql://ngpu:hunter2@db/ngpu",
    ],
)
def test_what_looks_like_a_credential_is_redacted_anywhere(text: str) -> None:
    shown = redact_text(text)
    assert REDACTED in shown
    for secret in (TOKEN, TOKEN.partition("-")[2], "abc.def", "dXNlcjpwYXNz", "hunter2"):
        assert secret not in shown


@pytest.mark.parametrize(
    "text",
    [
        "GPU-12345678-90ab-cdef-1234-567890abcdef",
        "20261120_18_30_00_01234567890123456789",
        "0x" + "ab" * 32,
        "16Uiu2HAmVyu34Vm2kyZPMqAKS6psvrkS5fyWqZC2zYq7N3bNmY1b",
        "/ip4/127.0.0.1/tcp/4001/p2p/16Uiu2HAm",
        "http://127.0.0.1:8080/a@b",
        "2026-11-20T18:30:00.123456Z",
    ],
)
def test_ordinary_names_and_addresses_are_not_redacted(text: str) -> None:
    assert redact_text(text) == text


def test_bodies_are_counted_not_shown() -> None:
    out = lines()
    structlog.get_logger().info("x", body=b"hunter2", more=[bytearray(b"hunter2")])
    assert json.loads(out.getvalue())["body"] == "<7 bytes>"
    assert "hunter2" not in out.getvalue()


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_show_no_local_variables_and_no_credentials(log_format: str) -> None:
    out = lines(log_format)
    try:
        passphrase = "hunter" + str(2)
        raise ValueError(f"cannot use Bearer {TOKEN}", len(passphrase))
    except ValueError:
        structlog.get_logger().exception("failed")
    assert "ValueError" in out.getvalue()
    assert "hunter2" not in out.getvalue()
    assert TOKEN not in out.getvalue()


def test_the_standard_librarys_logging_comes_out_alike() -> None:
    out = lines()
    logging.getLogger("urllib3").warning("retrying %s", f"Bearer {TOKEN}")
    logging.getLogger("urllib3").info("not shown")
    (event,) = [json.loads(line) for line in out.getvalue().splitlines()]
    assert (event["logger"], event["event"]) == ("urllib3", f"retrying {REDACTED}")


def test_a_value_that_json_does_not_know_is_no_error() -> None:
    out = lines()
    structlog.get_logger().info("x", path=Path("/a"), error=ValueError("b"), nested={1: {2: {3: {4: {5: "deep"}}}}})
    assert json.loads(out.getvalue())["path"] == "/a"


@pytest.mark.parametrize("order", ["before", "after"])
def test_libp2ps_warnings_are_quiet_whether_it_is_imported_before_or_after(order: str) -> None:
    configure = "from ngpu_daemon.logs import configure_logging; configure_logging(log_format='json')"
    steps = ["import libp2p", configure] if order == "before" else [configure, "import libp2p"]
    program = "\n".join([*steps, "import logging", "logging.getLogger('libp2p.kad_dht').warning('per RPC')"])
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert "per RPC" not in result.stdout + result.stderr
