"""`fastattn build`: the CUDA extension for this torch."""

from __future__ import annotations

from typing import Annotated

import typer

from fastattn.cli.command import JsonFlag, output, print_json, stop


def build(
    arch: Annotated[
        str | None,
        typer.Option(
            help="GPU architectures, such as '8.0;9.0a'; by default TORCH_CUDA_ARCH_LIST or the GPUs of this machine."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compile again even if the cache has it.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Build the CUDA extension for this torch into the cache, from which fastattn loads it.

    Needs a CUDA build of torch, a CUDA toolkit of the same major version, g++ and some minutes. FASTATTN_CACHE_DIR
    sets the cache folder, MAX_JOBS the number of compilers at a time. Exits with 1 if the build fails.
    """
    from fastattn import extension
    from fastattn.cache import cache_dir
    from fastattn.extension.build import BuildError, build_here

    try:
        made = build_here(cache_dir(), arch, force, log=lambda line: output(as_json).line(line))
    except BuildError as error:
        raise stop(str(error), 1) from None
    found = extension.state()
    loads = found.path is not None and found.path.name == made.library.name
    if as_json:
        print_json(made.to_dict() | {"loads": loads, "reason": found.reason})
    elif loads:
        typer.echo(f"built {made.library}")
    if not loads:
        raise stop(f"built {made.library}, but {found.reason}", 1)
