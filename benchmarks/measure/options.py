"""The options that every bench shares, checked before anything is measured: one line and exit code 2 for bad ones."""

from __future__ import annotations

import argparse
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

import checkout
from report import schema

MOST_THREADS = 4096
MOST_SECONDS = 86400.0
JSON_HINT = "--json takes no value: it prints the result as JSON; --out PATH stores it"


class Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2, without printing the usage."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def parse(bench: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line; exits with 2 and a line where one cannot be used."""
    parser = build_parser(bench)
    options = parser.parse_args(argv)
    try:
        check(options, bench)
    except ValueError as error:
        parser.error(str(error))
    return options


def check(options: argparse.Namespace, bench: str) -> None:
    """Raise ValueError for an option that argparse lets through and a run could not use."""
    if isinstance(options.json, str):
        raise ValueError(f"--json {options.json}: {JSON_HINT}")
    _check_device(options.device)
    for name in ("only", "providers"):
        patterns = getattr(options, name)
        for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
            _check_pattern(f"--{name}", pattern)
    if options.revision is not None and not re.fullmatch(r"[\w.+-]{1,80}", options.revision):
        raise ValueError(f"--revision {options.revision!r}: needs a commit's name, of letters and digits")
    if options.plot:
        _check_matplotlib()
    for name, suffix in (("out", ".json"), ("csv", ".csv"), ("plot", None)):
        if getattr(options, name):
            _check_writable(f"--{name}", Path(getattr(options, name)), suffix, bench)


def _check_matplotlib() -> None:
    checkout.make_importable()
    from fastattn import plot

    if not plot.is_available():
        raise ValueError(f"--plot: needs matplotlib: {plot.INSTALL}")


def destination(text: str, bench: str, suffix: str) -> Path:
    """The file that an option names, or the bench's own in the folder that it names."""
    path = Path(text)
    return path if path.suffix == suffix else path / f"{bench}{suffix}"


def check_merge(result: schema.Result, path: Path) -> None:
    """Raise ValueError unless the cases of a run like this one can be added to a file."""
    if path.exists():
        schema.merge(schema.load(path), result)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r}: needs cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r}: needs cpu or cuda")
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise ValueError(f"--device {name!r}: torch can use {found} CUDA devices here")


def _check_pattern(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{option} {pattern!r}: is not a regular expression ({error})") from None


def _check_writable(option: str, path: Path, suffix: str | None, bench: str) -> None:
    """Raise ValueError unless a file can be written there, or in the nearest folder above that exists."""
    target = path if suffix is None else destination(str(path), bench, suffix)
    try:
        if target.is_dir() and suffix is not None:
            raise ValueError(f"{option} {path}: {target} is a folder, needs a file's name")
        folder = target if suffix is None else target.parent
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not existing.is_dir():
            raise ValueError(f"{option} {path}: {existing} is a file, needs a folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be written ({error.strerror or error})") from None


def _number(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], float]:
    """A converter for argparse that refuses what lies outside [least, most]."""

    def convert(text: str) -> float:
        try:
            value: float = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not least <= value <= most:
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"got {text!r}, needs {what} from {least:g} to {most:g}")
        return value

    return convert


def build_parser(bench: str) -> argparse.ArgumentParser:
    """The parser of a bench's command line."""
    parser = Parser(
        prog=f"fastattn bench {bench}",
        description=f"Measure {bench} beside its peers on this machine.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--cases-of", choices=("cpu", "cuda"), help="the cases made for this device, whichever runs them")
    add(
        "--only",
        nargs="+",
        default=[],
        metavar="REGEX",
        help="cases whose name or group matches one of these",
    )
    add("--providers", metavar="REGEX", help="only providers whose name matches")
    add("--quick", action="store_true", help="small sizes, few rounds, no memory: shows that everything runs")
    add("--seconds", type=_number(float, 1e-3, MOST_SECONDS), help="measuring time per case")
    add("--threads", type=_number(int, 1, MOST_THREADS), help="CPU threads (default: torch's)")
    add(
        "--json",
        nargs="?",
        const=True,
        default=False,
        help="print the result as JSON, and progress to standard error",
    )
    add(
        "--out",
        metavar="PATH",
        help="store the result: a .json file, or a folder for the bench's own (default for a full run: the results "
        "folder)",
    )
    add("--merge", action="store_true", help="keep the file's other cases")
    add("--csv", metavar="PATH", help="also as a table, one line per provider: a .csv file or a folder")
    add("--plot", metavar="FOLDER", help="also as charts (needs matplotlib)")
    add("--list", action="store_true", help="show the chosen cases and stop")
    add("--no-memory", action="store_true", help="skip the peak memory")
    add("--no-errors", action="store_true", help="skip the comparison with float64")
    add("--revision", help="commit to record where the checkout has no git folder")
    add(
        "--warm",
        type=_number(int, 1, MOST_THREADS),
        metavar="N",
        help="first compile what is needed, in N processes",
    )
    add("--warm-cases", nargs="+", default=[], help=argparse.SUPPRESS)
    add("--measure-memory", nargs="+", help=argparse.SUPPRESS)  # a case, then providers
    return parser
