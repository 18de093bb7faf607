"""From a command to a running daemon and back to an exit code.

Exit codes: 0 done, 1 the operator must act (one line) or an unexpected failure (a traceback, for systemd to restart),
130 interrupted before signals were caught.
"""

from __future__ import annotations

import gc
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import structlog
import trio

from ngpu_daemon.errors import OperatorError

log = structlog.get_logger(__name__)

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def run_main(main: Callable[..., Any], *arguments: Any) -> NoReturn:
    """Run *main* (an async function under trio, or a plain one) and exit with what became of it.

    An `OperatorError`, alone or in the groups that nurseries wrap around errors, becomes one `error: ...` line on
    stderr. *main*'s own return value is the exit code when it is an int, and success otherwise.
    Files it makes can be read by their owner only, whatever mode the data directory was given.
    """
    previous = os.umask(0o077)
    try:
        code = exit_code_of(main, *arguments)
    finally:
        os.umask(previous)
    sys.exit(code)


def exit_code_of(main: Callable[..., Any], *arguments: Any) -> int:
    """Run *main* as `run_main` does and return the exit code instead of exiting with it."""
    try:
        result = trio.run(main, *arguments) if _is_async(main) else main(*arguments)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OperatorError as error:
        print_error(error)
        return EXIT_FAILED
    except BaseExceptionGroup as group:
        leaves = list(_leaves(group))
        if all(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
            return EXIT_INTERRUPTED
        mistakes = [leaf for leaf in leaves if isinstance(leaf, OperatorError)]
        if len(mistakes) < len(leaves):
            # something of ours broke as well: the traceback must not be lost behind the line
            log.error("daemon_failed", exc_info=group)
        for mistake in mistakes:
            print_error(mistake)
        return EXIT_FAILED
    except Exception as error:
        log.error("daemon_failed", exc_info=error)
        return EXIT_FAILED
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


@contextmanager
def loading() -> Iterator[None]:
    """While a daemon's parts are imported: collect no garbage, and leave what is there at the end out of collections.

    Loading makes some hundred thousand objects that stay. Going through them again and again takes an eighth of the
    time to load, and a pause of tens of milliseconds at each full collection later.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def print_error(error: OperatorError) -> None:
    """Write the one line that an operator gets."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def _is_async(main: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(main)


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
