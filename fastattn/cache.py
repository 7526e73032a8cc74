"""Where fastattn keeps what it can make again, such as measured tiles and built extensions."""

from __future__ import annotations

import os
import sys
import tempfile
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


def write_atomically(path: Path, text: str) -> None:
    """Replace a file, creating its folder: readers see the old text or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
