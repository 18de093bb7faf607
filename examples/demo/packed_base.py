"""A base image made of the interpreter that is running, for machines that can pull none.

Packs the executable, the standard library and the closure of shared libraries that ``ldd`` names into one tar for
``docker import``: 25 to 75 MB, a second of work; packages that are installed here can go along. Paths stay as they are
on this machine, since an interpreter finds its library by where it lies; ``/usr/local/bin/python3`` is a link to it.
There is no shell in the image.

Works for a system's own interpreter, for one built under a home directory (pyenv, uv, conda) and from inside a virtual
environment, whose base is taken. Needs glibc's or musl's ``ldd``.
"""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

PYTHON_LINK = "/usr/local/bin/python3"
IMAGE_CHANGES = ["ENV PATH=/usr/local/bin:/usr/bin:/bin", 'CMD ["python3"]']
# Tests, build files, the interactive shell and the installer are more than half of the library; no server needs them.
_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3",
     "pydoc_data", "_tkinter", "_pyrepl"}
)  # fmt: skip
_LEFT_OUT_PREFIXES = ("config-", "_test", "_tkinter")


class PackError(Exception):
    """The interpreter cannot be packed; the message says what is missing."""


def pack_interpreter(to: Path, packages: Iterable[str] = ()) -> int:
    """Write the tar of the running interpreter to *to* and return its size in bytes.

    Args:
        packages: import names of installed packages to put beside the standard library (``numpy``, ``PIL``).

    Raises:
        PackError: ``ldd`` is missing or failed, or a package is not installed.
    """
    executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    libraries = {Path(sysconfig.get_path(name, vars=_base_prefix())).resolve() for name in ("stdlib", "platstdlib")}
    files = {executable, *(file for library in libraries for file in _library_files(library))}
    added = {file: name for package in packages for file, name in _package_files(package)}
    extensions = [file for file in (*files, *added) if file.suffix == ".so"]
    with tarfile.open(to, "w") as tar:
        packed = _Packed(tar)
        packed.directory("/tmp", mode=0o1777)
        for file in sorted(files):
            packed.file(file, str(file))
        for file in sorted(added):
            packed.file(file, added[file])
        # A library is looked up by the name ldd prints, which is often a link: it is stored under that name.
        for name in sorted(_shared_libraries([executable, *extensions]) - set(map(str, added))):
            packed.file(Path(name).resolve(), name)
        packed.link(PYTHON_LINK, str(executable))
    return to.stat().st_size


def _base_prefix() -> dict[str, str]:
    return {"base": sys.base_prefix, "platbase": sys.base_exec_prefix, "installed_base": sys.base_prefix}


def _library_files(library: Path) -> Iterator[Path]:
    for path in library.iterdir():
        if path.name in _LEFT_OUT or path.name.startswith(_LEFT_OUT_PREFIXES):
            continue
        if path.is_dir():
            yield from _library_files(path)
        elif path.is_file() and path.suffix != ".a" and not path.name.endswith((".opt-1.pyc", ".opt-2.pyc")):
            yield path


def _package_files(name: str) -> Iterator[tuple[Path, str]]:
    """Yield a package's files, and those of the libraries its wheel brought, with their names in the image."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise PackError(f"the package {name} is not installed here")
    folder = Path(found.submodule_search_locations[0]).resolve()
    purelib = Path(sysconfig.get_path("purelib", vars=_base_prefix()))
    # auditwheel puts them beside the package, under the distribution's name: numpy.libs, pillow.libs for PIL
    beside = [path for path in folder.parent.glob("*.libs") if path.stem.lower() in {name.lower(), _WHEEL.get(name)}]
    for part in (folder, *beside):
        for file in part.rglob("*"):
            inside = file.relative_to(folder.parent)
            if file.is_file() and not {"tests", "__pycache__", "include"} & set(inside.parts):
                yield file, str(purelib / inside)


_WHEEL = {"PIL": "pillow"}


def _shared_libraries(binaries: Iterable[Path]) -> set[str]:
    """Return the absolute names of every shared library the *binaries* load, the program loader included."""
    try:
        run = subprocess.run(
            ["ldd", *map(str, binaries)], capture_output=True, text=True, timeout=60, check=False,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PackError(f"ldd, which lists shared libraries, did not run: {error}") from error
    names: set[str] = set()
    for line in run.stdout.splitlines():
        # "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)" or "/lib64/ld-linux-x86-64.so.2 (0x…)"
        if line.startswith((" ", "\t")):
            target = line.partition("=>")[2] or line
            name = os.path.normpath(target.strip().partition(" (")[0])
            if name.startswith("/") and Path(name).is_file():
                names.add(name)
    if not names and "not a dynamic executable" not in run.stderr + run.stdout:
        raise PackError(f"ldd named no library: {run.stderr.strip()[:200]}")
    # Threads that end by cancellation load it by name at run time (pthread_exit), so no binary lists it.
    for name in list(names):
        beside = Path(name).parent / "libgcc_s.so.1"
        if "libc.so" in name and beside.is_file():
            names.add(str(beside))
    return names


class _Packed:
    """A tar that holds each path once, with the folders above it."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._seen: set[str] = set()

    def directory(self, name: str, *, mode: int = 0o755) -> None:
        if name in self._seen or name == "/":
            return
        self.directory(str(Path(name).parent))
        self._seen.add(name)
        entry = tarfile.TarInfo(name.lstrip("/"))
        entry.type, entry.mode = tarfile.DIRTYPE, mode
        self._tar.addfile(entry)

    def file(self, source: Path, name: str) -> None:
        if name in self._seen:
            return
        self.directory(str(Path(name).parent))
        self._seen.add(name)
        entry = self._tar.gettarinfo(str(source), arcname=name.lstrip("/"))
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o755 if entry.mode & 0o100 else 0o644
        if not entry.isreg():  # gettarinfo makes a second name of one inode a link; the copy is simpler and as good
            entry.type, entry.size, entry.linkname = tarfile.REGTYPE, source.stat().st_size, ""
        with source.open("rb") as content:
            self._tar.addfile(entry, content)

    def link(self, name: str, target: str) -> None:
        if name in self._seen:
            return
        self.directory(str(Path(name).parent))
        self._seen.add(name)
        entry = tarfile.TarInfo(name.lstrip("/"))
        entry.type, entry.linkname = tarfile.SYMTYPE, target
        self._tar.addfile(entry)
