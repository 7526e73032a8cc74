"""Maps the source tree to packages, and builds the CUDA extension where torch and a CUDA toolkit are there for it.

FASTATTN_BUILD_CUDA: auto (the default) builds it where it can, 1 fails where it cannot, 0 never builds it.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

KERNELS, SOURCES, BENCHES = "fastattn.kernels", "fastattn.csrc", "fastattn.benchmarks"
BUILDING = {"bdist_wheel", "editable_wheel", "build_ext", "develop", "install"}


def load_build():
    """fastattn/extension/build.py and what it imports, in a package of their own: fastattn itself needs torch."""
    package = ModuleType("fastattn_extension")
    package.__path__ = [str(Path(__file__).resolve().parent / "fastattn" / "extension")]
    sys.modules[package.__name__] = package
    return importlib.import_module("fastattn_extension.build")


build = load_build()
wanted = os.environ.get("FASTATTN_BUILD_CUDA", "auto")
if wanted not in ("auto", "0", "1"):
    raise SystemExit(f"FASTATTN_BUILD_CUDA={wanted!r}: needs auto, 0 or 1")


def plan():
    """What is to be built, or None."""
    if wanted == "0" or not BUILDING & set(sys.argv):
        return None
    try:
        return build.make_plan()
    except build.BuildError as error:
        if wanted == "1":
            raise SystemExit(f"FASTATTN_BUILD_CUDA=1, but {error}") from None
        print(f"without the CUDA extension: {error}", file=sys.stderr)
        return None


class BuildExtension(build_ext):
    """Compiles by fastattn/extension, as `fastattn build` does."""

    def build_extension(self, extension):
        target = Path(self.get_ext_fullpath(extension.name))
        try:
            made = build.build(chosen, Path(self.build_temp).resolve())
        except build.BuildError as error:
            if wanted == "1":
                raise SystemExit(str(error)) from None
            print(f"without the CUDA extension: {error}", file=sys.stderr)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(made), str(target))


chosen = plan()
setup(
    packages=[
        # fastattn/kernels is a link to kernels, by which type checkers and a bare checkout find them
        *find_packages(include=["fastattn", "fastattn.*"], exclude=[KERNELS, f"{KERNELS}.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels")),
        SOURCES,
        BENCHES,
        *(f"{BENCHES}.{name}" for name in find_packages("benchmarks")),
    ],
    package_dir={KERNELS: "kernels", SOURCES: "csrc", BENCHES: "benchmarks"},
    ext_modules=[Extension("fastattn._C", sources=[], optional=wanted == "auto")] if chosen else [],
    cmdclass={"build_ext": BuildExtension},
)
