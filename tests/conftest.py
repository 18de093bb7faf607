"""What the whole test run shares: which tests this machine can run, how long one may take, the count of those left out.

A test that wants something a machine may lack says so with a `needs_*` marker, and is skipped with the reason where
it is missing. `NGPU_REQUIRE_ALL=1` (set by `.ci/run`) turns every skip into a failure of the run.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from types import FrameType

import docker
import psycopg
import pytest
from docker.errors import DockerException
from hypothesis import HealthCheck, settings
from requests.exceptions import RequestException

REQUIRE_ALL = os.environ.get("NGPU_REQUIRE_ALL", "") not in ("", "0")
TEST_TIMEOUT_S = float(os.environ.get("NGPU_TEST_TIMEOUT_S", "120"))
MIN_NODE = 22

# How long inputs take to be made, or an example to run, says how busy the machine is, and nothing about the code.
settings.register_profile("ngpu", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("ngpu")


# -- what this machine has: each returns why not, or None --------------------------------------------------------------


@cache
def missing_docker() -> str | None:
    try:
        engine = docker.from_env(timeout=5)
        try:
            engine.ping()
        finally:
            engine.close()
    except (DockerException, RequestException, OSError):
        return f"no Docker engine answers at {os.environ.get('DOCKER_HOST') or 'its usual socket'}"
    return None


@cache
def missing_node() -> str | None:
    binary = os.environ.get("NGPU_TEST_NODE") or shutil.which("node")
    if binary is None:
        return f"no Node.js: install version {MIN_NODE}, or name its binary in NGPU_TEST_NODE"
    try:
        shown = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return f"{binary} does not run"
    version = re.match(r"v(\d+)\.", shown)
    if version is None or int(version[1]) < MIN_NODE:
        return f"Node.js {MIN_NODE} or newer is wanted, {binary} is {shown.strip() or 'something else'}"
    return None


@cache
def missing_postgres() -> str | None:
    url = os.environ.get("NGPU_TEST_POSTGRES", "")
    if not url:
        return "no PostgreSQL: NGPU_TEST_POSTGRES names none (`.ci/postgres start DIR` starts one)"
    try:
        psycopg.connect(url, connect_timeout=5).close()
    except psycopg.Error as error:
        return f"PostgreSQL does not answer at NGPU_TEST_POSTGRES: {error}"
    return None


def _program(*names: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        return None if any(shutil.which(name) for name in names) else f"no {' or '.join(names)} on PATH"

    return missing


@cache
def missing_netns() -> str | None:
    programs = ("unshare", "nsenter", "ip", "iptables", "mount")
    if os.geteuid() != 0 or not all(shutil.which(name) for name in programs):
        return f"network namespaces want root and {', '.join(programs)}"
    trial = "ip link add veth0 type veth peer name veth1 && iptables -t nat -A POSTROUTING -j MASQUERADE"
    done = subprocess.run(["unshare", "--net", "--mount", "sh", "-c", trial], capture_output=True, check=False)
    return None if done.returncode == 0 else "this machine's kernel gives no network namespaces with NAT"


def missing_gpu() -> str | None:
    return None if os.path.exists("/dev/nvidiactl") else "no NVIDIA GPU and driver"


NEEDS: dict[str, Callable[[], str | None]] = {
    "needs_docker": missing_docker,
    "needs_registry": _program("docker-registry"),
    "needs_node": missing_node,
    "needs_systemd": _program("systemd-analyze"),
    "needs_gcc": _program("gcc", "cc"),
    "needs_curl": _program("curl"),
    "needs_postgres": missing_postgres,
    "needs_netns": missing_netns,
    "needs_gpu": missing_gpu,
}
# what CI cannot install: left out without failing it
NEVER_REQUIRED = {"needs_gpu"}
LEFT_OUT = 10  # pytest's exit code where a required test was left out, whether others failed or not


RECURSION_LIMIT = sys.getrecursionlimit()


def pytest_runtest_setup(item: pytest.Item) -> None:
    # libraries that some tests compare ours with (eth_account, eth_keyfile) raise it so far that nested JSON crashes
    sys.setrecursionlimit(RECURSION_LIMIT)
    for name, missing in NEEDS.items():
        if item.get_closest_marker(name) is not None and (reason := missing()) is not None:
            pytest.skip(reason)


# -- no test may hang the run ------------------------------------------------------------------------------------------

ALARM_AGAIN_S = 5
MAX_ALARMS = 6
_real_stderr = 2


def pytest_configure() -> None:
    global _real_stderr
    _real_stderr = os.dup(2)  # while a test runs, 2 is where its output is captured
    gc.disable()


def pytest_collection_finish() -> None:
    # Five thousand tests and all they import stay to the end. Going through them again and again took a third of the
    # collecting and a tenth of the tests' time.
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Interrupt a test that takes too long, as Ctrl-C would: trio delivers that safely, unlike an exception raised
    wherever its loop happens to be. What sits it out under a shield ends the whole run, with every thread's stack.
    """
    marker = item.get_closest_marker("timeout_s")
    limit_s = float(marker.args[0]) if marker is not None else TEST_TIMEOUT_S
    alarms = 0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal alarms
        alarms += 1
        if alarms > MAX_ALARMS:
            os.write(
                _real_stderr, f"\n{item.nodeid} took longer than {limit_s:g} s and cannot be interrupted\n".encode()
            )
            faulthandler.dump_traceback(file=_real_stderr)
            os._exit(pytest.ExitCode.INTERNAL_ERROR)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, limit_s, ALARM_AGAIN_S)
    try:
        return (yield)
    except BaseException as error:
        if alarms:
            raise pytest.fail.Exception(f"took longer than {limit_s:g} s") from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- what was left out -------------------------------------------------------------------------------------------------

_left_out: list[tuple[str, str]] = []  # test, reason
_excused: set[str] = set()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _excused.update(
        item.nodeid for item in items if any(item.get_closest_marker(name) is not None for name in NEVER_REQUIRED)
    )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note_skip(report)


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _left_out.append((report.nodeid, reason.removeprefix("Skipped: ")))


def _required() -> list[str]:
    return [test for test, _ in _left_out if test not in _excused] if REQUIRE_ALL else []


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _required() and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        session.exitstatus = LEFT_OUT


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _left_out:
        return
    terminalreporter.section("left out on this machine")
    for reason, count in Counter(reason for _, reason in _left_out).most_common():
        terminalreporter.write_line(f"{count:4} {'test' if count == 1 else 'tests'}: {reason}")
    if required := _required():
        terminalreporter.write_line(f"NGPU_REQUIRE_ALL is set: these {len(required)} must run", red=True)
