"""A folder's files replaced together: readers find the old ones or the new ones, also after a crash."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

UNFINISHED = ".unfinished-"  # what a crash leaves has such a name; nothing reads it


def write_folder(
    directory: Path, write: Callable[[Path], None], *, superseded: Callable[[str], bool] = lambda name: False
) -> None:
    """Let `write` fill a new folder, which then takes the place of `directory`; all is flushed to disk first.

    Files that `directory` holds besides stay, by hard links in the new folder. The two folders change places in one
    step of the file system (Linux, macOS), so that what raises or crashes leaves the old one whole. Where that is not
    available (Windows, network file systems, a mount point, links refused), or this process works in `directory`, files
    move one by one, config.json away first and into place last: a crash of the machine then leaves a folder without
    config.json, which nothing loads, and an exception puts the old files back.

    Args:
        directory: made where it does not exist; a link to a folder stays one.
        write: fills the folder it is given, subfolders too.
        superseded: names in `directory` that go, besides those that are written anew.

    Raises:
        ValueError: `directory` is a file.
        OSError: what writing met, such as a full disk; `directory` is as it was.
    """
    directory = Path(os.path.realpath(directory))
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory: {directory} exists and is not a folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch_for(directory)
    try:
        with naming(scratch):
            write(scratch)
        for path in scratch.rglob("*"):
            sync(path)
        if not directory.exists():
            scratch.chmod(0o777 & ~umask())
            sync(scratch)
            if _renamed(scratch, directory):
                sync(directory.parent)
                return
        written = {entry.name for entry in scratch.iterdir()}
        gone = {n for n in (e.name for e in directory.iterdir()) if superseded(n) and n not in written}
        if not _changed_places(scratch, directory, written | gone):
            _move_files(scratch, directory, written, gone)
        sync(directory.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch_for(directory: Path) -> Path:
    """A new folder beside `directory`, or within it where nothing may be made beside it."""
    try:
        return Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{directory.name}.", dir=directory.parent))
    except PermissionError:
        if not directory.is_dir():
            raise
        return Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=directory))


def _renamed(scratch: Path, directory: Path) -> bool:
    """Make `scratch` the directory; False where another process made one of that name meanwhile."""
    try:
        scratch.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise
        return False
    return True


def _changed_places(scratch: Path, directory: Path, replaced: set[str]) -> bool:
    """Make `scratch` the directory in one step, with the other files of it; False where the system cannot."""
    if scratch.parent == directory or _works_in(directory):
        return False  # a working directory that changed places would be deleted with the old files
    kept = [entry for entry in directory.iterdir() if entry.name not in replaced]
    try:
        for entry in kept:
            _link(entry, scratch / entry.name)
        shutil.copymode(directory, scratch)
        sync(scratch)
        exchange(scratch, directory)
    except OSError:
        for entry in kept:
            delete(scratch / entry.name)
        return False
    for path in list(scratch.rglob("*")):  # what others put there meanwhile comes along
        inside = path.relative_to(scratch)
        if inside.parts[0] not in replaced and not os.path.lexists(directory / inside):
            path.rename(directory / inside)
    return True


def _works_in(directory: Path) -> bool:
    """Whether this process's working directory is `directory` or within it."""
    try:
        here = Path.cwd()
    except OSError:  # it was deleted
        return False
    return directory in (here, *here.parents)


def _move_files(scratch: Path, directory: Path, written: set[str], gone: set[str]) -> None:
    """Move the files of `scratch` into `directory` one by one, or, where that fails, all back."""
    aside = Path(tempfile.mkdtemp(prefix="old-", dir=scratch))
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        os.replace(source, target)
        moved.append((source, target))

    last = "config.json"
    try:
        for name in sorted(written | gone, key=lambda name: name != last):
            if os.path.lexists(directory / name):
                move(directory / name, aside / name)
        for name in sorted(written, key=lambda name: name == last):
            move(scratch / name, directory / name)
    except BaseException:
        for source, target in reversed(moved):
            os.replace(target, source)
        raise
    sync(directory)


def _link(source: Path, target: Path) -> None:
    """The same file, or the same files in folders of the same names, under another name."""
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
    elif source.is_dir():
        target.mkdir()
        for entry in source.iterdir():
            _link(entry, target / entry.name)
        shutil.copystat(source, target)
    else:
        os.link(source, target)


def exchange(one: Path, other: Path) -> None:
    """Two paths change places in one step; OSError where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    a, b = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(a, b, ctypes.c_uint(2))  # RENAME_SWAP
    elif hasattr(libc, "renameat2"):
        here = ctypes.c_int(-100)  # AT_FDCWD
        failed = libc.renameat2(here, a, here, b, ctypes.c_uint(2))  # RENAME_EXCHANGE
    else:
        raise OSError("no system call for it")
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What fails to be written inside raises an OSError that names the file: `path`, or in a folder the newest file.

    Python's own errors of a write name no file, and torch and safetensors have exceptions of their own for one.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(_newest(path))) from error
    except Exception as error:
        text = " ".join(str(error).split())
        number = re.search(r"\(os error (\d+)\)", text)
        if number is None and not re.search(
            r"PytorchStreamWriter failed|file write failed|inline_container|iostream error", text
        ):
            raise
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, f"cannot be written ({text[:200]})", str(_newest(path))) from error


def _newest(path: Path) -> Path:
    """The file in a folder that was changed last; any other path as it is."""
    if not path.is_dir():
        return path
    files = [file for file in path.rglob("*") if file.is_file()]
    return max(files, key=lambda file: file.stat().st_mtime_ns, default=path)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    if path.is_symlink():
        return
    with contextlib.suppress(PermissionError):  # Windows refuses to open a directory
        handle = os.open(path, os.O_RDONLY)
        try:
            with naming(path):
                os.fsync(handle)
        finally:
            os.close(handle)


def delete(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def umask() -> int:
    """The process's file mode creation mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
