"""What a command exits with, and the one line an operator gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
import trio
from structlog.testing import capture_logs

from ngpu_daemon.entry import exit_code_of, run_main
from ngpu_daemon.errors import OperatorError


class PortTaken(OperatorError):
    pass


@pytest.fixture(autouse=True)
def _plain_structlog() -> Iterator[None]:
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


async def fails_in_nurseries(*errors: BaseException) -> None:
    async def fail(error: BaseException) -> None:
        raise error

    async with trio.open_nursery(), trio.open_nursery() as nursery:
        for error in errors:
            nursery.start_soon(fail, error)


def test_what_returns_is_success() -> None:
    async def main(word: str) -> str:
        await trio.lowlevel.checkpoint()
        return word

    assert exit_code_of(main, "done") == 0
    assert exit_code_of(lambda: None) == 0
    assert exit_code_of(lambda: True) == 0


def test_an_int_is_the_exit_code() -> None:
    assert exit_code_of(lambda: 3) == 3


@pytest.mark.parametrize("depth", ["bare", "in nurseries"])
def test_an_operators_mistake_is_one_line(depth: str, capsys: pytest.CaptureFixture[str]) -> None:
    mistake = PortTaken("port 8080 is taken:\n choose another")

    def bare() -> None:
        raise mistake

    with capture_logs() as logged:
        code = exit_code_of(bare) if depth == "bare" else exit_code_of(fails_in_nurseries, mistake)
    assert (code, logged) == (1, [])
    assert capsys.readouterr() == ("", "error: port 8080 is taken: choose another\n")


def test_our_own_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with capture_logs() as logged:
        assert exit_code_of(fails_in_nurseries, ZeroDivisionError(), PortTaken("taken")) == 1
    assert [(entry["event"], entry["log_level"]) for entry in logged] == [("daemon_failed", "error")]
    assert capsys.readouterr().err == "error: taken\n"


def test_a_bare_bug_is_logged_too() -> None:
    with capture_logs() as logged:
        assert exit_code_of(lambda: 1 // 0) == 1
    assert isinstance(logged[0]["exc_info"], ZeroDivisionError)


def test_an_interrupt_is_its_own_code() -> None:
    assert exit_code_of(fails_in_nurseries, KeyboardInterrupt()) == 130


def test_run_main_exits() -> None:
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: 4)
    assert caught.value.code == 4
