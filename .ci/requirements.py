"""The requirements of the package and its [test] extra, for .ci/newest: `names`, `lowest`, or which lie `beyond`."""

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

PROJECT = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(extra: str) -> Iterator[Requirement]:
    """Those of an extra, those of the extras that it names in place of them."""
    for text in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            for inner in sorted(requirement.extras):
                yield from requirements(inner)
        elif requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def main(kind: str) -> None:
    wanted = [*map(Requirement, PROJECT["dependencies"]), *requirements("test")]
    if kind == "names":
        print(*dict.fromkeys(r.name for r in wanted), sep="\n")
    elif kind == "lowest":
        (floor,) = {s.version for r in wanted if r.name == "torch" for s in r.specifier if s.operator == ">="}
        print(f"torch=={floor}.*")  # which pins its own Triton
        print("numpy<2.4")  # the newest on which that Triton runs its interpreter
        print(*(str(r).partition(";")[0] for r in wanted if r.name not in ("torch", "triton")), sep="\n")
    elif kind == "beyond":
        for requirement in wanted:
            try:
                installed = version(requirement.name)
            except PackageNotFoundError:
                continue
            if not requirement.specifier.contains(installed, prereleases=True):
                print(f"beyond the bounds: {requirement.name} {installed}, bound {requirement.specifier}")
    else:
        raise SystemExit(f"got {kind!r}, needs names, lowest or beyond")


if __name__ == "__main__":
    main(*sys.argv[1:])
