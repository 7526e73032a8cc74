"""Files copied to and from the GPU's machine: the results as one archive, compiled kernels, a built extension."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

ARCHIVE, TABLE, KERNELS = "evidence.tar.gz", "table.txt", "triton-cache.tar.gz"
MOST_BYTES = 15 * 2**20  # of one archive


def pack(out: Path, folder: Path, triton: str | None = None) -> list[Path]:
    """Pack all results into an archive, and a folder of Triton's kernels, if given, into another; write the table."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in out.iterdir() if path.is_file() and not path.name.endswith(".partial"))
    made = [_archive(folder / ARCHIVE, [(path, path.name) for path in files])]
    if (out / TABLE).exists() and folder.resolve() != out.resolve():
        shutil.copyfile(out / TABLE, folder / TABLE)
        made.append(folder / TABLE)
    if triton is not None and Path(triton).is_dir():
        files = [path for path in sorted(Path(triton).rglob("*")) if path.is_file() and _needed(path)]
        kernels = _archive(folder / KERNELS, [(path, path.relative_to(triton).as_posix()) for path in files])
        if kernels.stat().st_size > MOST_BYTES:
            kernels.unlink()
        else:
            made.append(kernels)
    return made


def _needed(path: Path) -> bool:
    """Whether Triton needs this file to load a kernel: a binary, its description, a compiled launcher."""
    return path.suffix in (".json", ".cubin", ".so")


def _archive(target: Path, members: list[tuple[Path, str]]) -> Path:
    partial = target.with_name(target.name + ".partial")
    with tarfile.open(partial, "w:gz", compresslevel=6) as archive:
        for path, name in members:
            if name not in (ARCHIVE, KERNELS):  # the archives may be in the folder that is packed
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

    Kernels compiled by another Triton, Python or ptxas have other keys and are not used.
    """
    folder = source
    if source.is_file():
        folder = out / "triton-cache"
        unpack(source, folder)
    folder.mkdir(parents=True, exist_ok=True)
    settle(folder.resolve())
    return folder.resolve()


def settle(folder: Path) -> int:
    """Rewrite the paths that Triton stored in a moved cache; returns the number of kernels.

    Triton stores the absolute paths of a kernel's files, and compiles it again if one is missing.
    """
    lists = list(folder.glob("*/__grp__*.json"))
    for path in lists:
        names = json.loads(path.read_text(encoding="utf-8"))["child_paths"]
        here = {name: str(path.parent / name) for name in names if (path.parent / name).exists()}
        path.write_text(json.dumps({"child_paths": here}), encoding="utf-8")
    return len(lists)


def place_extension(folder: Path) -> tuple[Path | None, list[str]]:
    """Copy a matching library into the cache: its path or None, and why each other one does not match."""
    from fastattn.cache import cache_dir
    from fastattn.extension import load
    from fastattn.extension.info import BuildInfo, library_name

    here, wrong = load.info_here(), []
    found = [folder] if folder.is_file() else sorted(folder.rglob("_C*.so"))
    for path in found:
        info = BuildInfo.of_file(path)
        reason = "it was not built by fastattn" if info is None else info.mismatch(here)
        if reason is not None:
            wrong.append(f"{path.name}: {reason}")
            continue
        target = cache_dir() / "prebuilt" / library_name()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        return target, wrong
    return None, wrong or [f"there is no _C*.so in {folder.name}"]
