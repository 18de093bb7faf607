"""Make `.venv` in the checkout from the lock files; do nothing when it is up to date. Started by `scripts/env`.

Standard library only: it runs on the bare interpreter. pip installs, rather than a faster tool that would have to be
fetched first, because pip follows the mirrors and certificates this machine is already configured with. Everything
is pinned by hash. Two packages of the lock have no wheel; both are pure Python, and what builds them is locked too
(`requirements-build.lock`) and installed first, so that nothing is fetched unpinned and no compiler is wanted.

Prints the environment's interpreter on stdout, progress on stderr. `NGPU_VENV` puts the environment elsewhere. With
`--installed` the packages are copied into it, so that it works without this checkout; otherwise they run from here.
"""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get("NGPU_VENV") or ROOT / ".venv").absolute()
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".ngpu-stamp"
INSTALLED = "--installed" in sys.argv[1:]
LOG = VENV / "install.log"
BUILD_LOCK = ROOT / "requirements-build.lock"
LOCK = ROOT / "requirements.lock"
SOURCE_ONLY = "python-baseconv,varint"
# trio-typing, which libp2p needs at run time, brings stubs of an old trio that hide trio's own types from mypy
SHADOWING_STUBS = ("trio-stubs", "outcome-stubs", "async_generator-stubs")


def main() -> int:
    """Return the exit code; 0 means that the printed interpreter is ready."""
    VENV.parent.mkdir(parents=True, exist_ok=True)
    with LOCK.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second script waits for the first one's environment
        if INSTALLED or not is_current():  # a copy is made to be brought up to date
            try:
                make()
            except StepFailed as failure:
                say(f"error: {failure}")
                return 1
    print(PYTHON)
    return 0


class StepFailed(Exception):
    """One step did not work; the text says what to look at."""


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def wanted() -> str:
    """Return what the environment depends on, as one line: interpreter, place, locks."""
    digest = hashlib.sha256()
    for path in (LOCK, BUILD_LOCK, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return f"{platform.python_version()} {'a copy of' if INSTALLED else ''} {ROOT} {digest.hexdigest()}"


def is_current() -> bool:
    try:
        stamp = STAMP.read_text()
    except OSError:
        return False
    # any suitable interpreter will do: the newest on PATH may have changed, the environment still works
    return stamp.split(" ", 1)[1] == wanted().split(" ", 1)[1] and works()


def works() -> bool:
    probe = "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"
    try:
        return subprocess.run([PYTHON, "-c", probe], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def make() -> None:
    if VENV.exists() and not works():
        shutil.rmtree(VENV)
    STAMP.unlink(missing_ok=True)
    say(f"environment: {VENV} (Python {platform.python_version()})")
    if not PYTHON.exists():
        venv.EnvBuilder(symlinks=True, with_pip=True).create(VENV)
    elif subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True, check=False).returncode != 0:
        run("-m", "ensurepip")
    locked = ("--require-hashes", "--no-deps", "--only-binary", ":all:")
    install("build tools", *locked, "-r", str(BUILD_LOCK), count=count(BUILD_LOCK))
    sources = ("--no-binary", SOURCE_ONLY, "--no-build-isolation")
    install("dependencies", *locked, *sources, "-r", str(LOCK), count=count(LOCK))
    for stubs in (VENV / "lib").glob("python*/site-packages/*-stubs"):
        if stubs.name in SHADOWING_STUBS:
            shutil.rmtree(stubs)
    how = ("--force-reinstall",) if INSTALLED else ("--editable",)
    install("ngpu itself", "--no-deps", "--no-build-isolation", *how, str(ROOT), count=1)
    STAMP.write_text(wanted())


def count(lock: Path) -> int:
    """Return how many packages *lock* names for any platform; a few of them are not for this one."""
    return len(re.findall(r"^[a-z0-9][^\s=]*==", lock.read_text(), re.MULTILINE | re.IGNORECASE))


def run(*arguments: str) -> None:
    with LOG.open("a") as log:
        if subprocess.run([PYTHON, *arguments], stdout=log, stderr=log, check=False).returncode != 0:
            raise StepFailed(f"{' '.join(arguments)} failed: see {LOG}")


def install(what: str, *arguments: str, count: int) -> None:
    """Run pip, showing how far it has come; its own words go to the log."""
    command = [PYTHON, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    in_place = sys.stderr.isatty()
    seen, tail = 0, [""]

    def show(text: str) -> None:
        say(f"\r\033[K{text}" if in_place else text, end="" if in_place else "\n")

    show(f"  {what} ...")
    with (
        LOG.open("a") as log,
        subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as pip,
    ):
        assert pip.stdout is not None
        for line in pip.stdout:
            log.write(line)
            tail = [*tail[-11:], line.rstrip()]
            if line.startswith(("Collecting ", "Processing ", "Requirement already satisfied")):
                seen += 1
                if in_place or seen % 25 == 0:
                    show(f"  {what}: {seen} of at most {count}")
            elif line.startswith("Installing collected packages") and count > 1:
                show(f"  {what}: unpacking {seen}")
    if in_place:
        say("")
    if pip.returncode != 0:
        raise StepFailed(f"pip could not install the {what} (whole log: {LOG}):\n" + "\n".join(tail))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
