"""The cache folder, for files that can be recreated: measured tiles and built extensions."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path


def cache_dir() -> Path:
    """FASTATTN_CACHE_DIR, else fastattn's folder in this system's cache of the user; it need not exist."""
    chosen = os.environ.get("FASTATTN_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "fastattn" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fastattn"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastattn"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """A lock that one process of this machine holds at a time, released even if it dies; none on Windows."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file, creating its folder: readers see the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise OSError(
                error.errno, os.strerror(error.errno), str(path)
            ) from error  # a write names no file
        raise
