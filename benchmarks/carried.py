"""What is carried to and from a machine that is there for minutes: results as one archive, compiled Triton kernels."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

ARCHIVE, TABLE, KERNELS = "evidence.tar.gz", "table.txt", "triton-cache.tar.gz"
MOST_BYTES = 15 * 2**20  # of one file that is carried away


def pack(out: Path, folder: Path, triton: str | None = None) -> list[Path]:
    """All results in one archive and the table beside it; with a folder of Triton's, the kernels in another."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in out.iterdir() if path.is_file() and not path.name.endswith(".partial"))
    made = [_archive(folder / ARCHIVE, [(path, path.name) for path in files])]
    if (out / TABLE).exists() and folder.resolve() != out.resolve():
        shutil.copyfile(out / TABLE, folder / TABLE)
        made.append(folder / TABLE)
    if triton is not None and Path(triton).is_dir():
        kernels = _archive(folder / KERNELS, [(path, path.name) for path in sorted(Path(triton).iterdir())])
        if kernels.stat().st_size > MOST_BYTES:
            kernels.unlink()
        else:
            made.append(kernels)
    return made


def _archive(target: Path, members: list[tuple[Path, str]]) -> Path:
    partial = target.with_name(target.name + ".partial")
    with tarfile.open(partial, "w:gz", compresslevel=6) as archive:
        for path, name in members:
            if name not in (ARCHIVE, KERNELS):  # where they lie in the folder that is packed
                archive.add(path, name)
    partial.replace(target)
    return target


def unpack(archive: Path, folder: Path) -> None:
    """The files of an archive, in a folder; only files below it are taken."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "r:gz") as opened:
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        opened.extractall(folder, **safe)


def triton_cache(source: Path, out: Path) -> Path:
    """The folder for TRITON_CACHE_DIR: the one that is named, or one into which the named archive is unpacked.

    Kernels compiled by another Triton, Python or ptxas have other keys and are only passed over.
    """
    if source.is_file():
        folder = out / "triton-cache"
        unpack(source, folder)
        return folder.resolve()
    source.mkdir(parents=True, exist_ok=True)
    return source.resolve()
