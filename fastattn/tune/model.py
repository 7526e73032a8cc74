"""`fastattn bench model`: the cycle model of the attention kernels compiled on this machine; a ranking of tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastattn.console import InputError, Output
from fastattn.extension.commands import BuildError
from fastattn.kernels import tuned
from fastattn.kernels.tiles import HEAD_DIMS, Tile
from fastattn.kernels.tuned import Machine, Winner
from fastattn.tune import ahead, extension, plan
from fastattn.tune.command import forget_lookups, stored_winners
from fastattn.tune.cycles import machine
from fastattn.tune.cycles.report import PRODUCTS, SCORES, Kernel, Prediction, cuda_kernel, predict, table
from fastattn.tune.cycles.resources import Resources, resources_of
from fastattn.tune.cycles.sass import functions_of
from fastattn.tune.plan import Candidate, Work

BACKENDS = ("triton", "cuda")
KINDS = ("plain", "causal", "alibi+softcap")  # by default: rows without and with features that change scores
SOURCE = tuned.MODEL  # the origin of figures, as printed and stored
LEAST_GAIN = 1.03  # minimum gain over the built-in tile; a smaller one is within the model's error
L2_BYTES = 28  # assumed, per clock and multiprocessor; in the cycle model itself, copies have always arrived
MAX_NAME = 100  # characters of a device's name
NOTE = "A model of one Hopper multiprocessor, not a measurement; differences under 3 % are noise."

Report = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Which kernels are modelled."""

    head_dims: tuple[int, ...] = HEAD_DIMS
    directions: tuple[str, ...] = tuple(PRODUCTS)
    backends: tuple[str, ...] = BACKENDS
    kinds: tuple[str, ...] = KINDS

    @classmethod
    def of(
        cls,
        head_dims: Sequence[int] | None,
        directions: Sequence[str] | None,
        backends: Sequence[str] | None,
        kinds: Sequence[str] | None,
    ) -> Options:
        """Options of the command line; None is all."""
        for name, given, known in (
            ("--head-dim", head_dims, HEAD_DIMS),
            ("--direction", directions, PRODUCTS),
            ("--backend", backends, BACKENDS),
        ):  # fmt: skip
            for each in given or ():
                if each not in known:
                    raise InputError(f"{name}: got {each!r}, needs one of {', '.join(map(str, known))}")
        made = cls(
            tuple(head_dims or HEAD_DIMS), tuple(directions or PRODUCTS), tuple(backends or BACKENDS),
            tuple(kinds or KINDS),
        )  # fmt: skip
        made.works()  # checks the names of features, also where Triton compiles nothing
        return made

    def works(self) -> list[Work]:
        """The Triton kernels chosen."""
        kernels = [name for name in ahead.MODELLED if name in self.directions]
        dims = [(dim, dim) for dim in self.head_dims]
        try:
            found = list(plan.works(("bfloat16",), dims, self.kinds, ahead.MODELLED))
        except ValueError as error:
            raise InputError(f"--{error}") from None
        return [work for work in found if work.kernel in kernels]


def model_kernels(options: Options, output: Output, named: bool) -> Report:
    """Compile and model the chosen kernels; `named`: backends were named, which then have to compile."""
    reasons = {"triton": ahead.why_not(), "cuda": extension.why_not()}
    missing = {name: reason for name in options.backends if (reason := reasons[name]) is not None}
    if missing and (named or len(missing) == len(options.backends)):
        raise InputError("; ".join(f"{name}: {reason}" for name, reason in missing.items()))
    found: list[Prediction] = []
    for name in options.backends:
        if name in missing:
            output.line(f"left out: {name}, which {missing[name]}")
        else:
            found += _triton(options, output) if name == "triton" else _cuda(options, output)
    return _report(found, output)


def model_file(
    path: Path, output: Output, direction: str | None, head_dim: int | None, rows: int | None, function: str
) -> Report:
    """The kernels of a cubin file; those of other libraries need a direction, a head dim and the rows of a block."""
    try:
        cubin = path.read_bytes()
        functions, resources = functions_of(cubin), resources_of(cubin)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    found = []
    for each in functions:
        if function not in each.name:
            continue
        kernel = cuda_kernel(each.name)
        if direction and head_dim:
            kernel = Kernel(each.name[:60], direction, head_dim, rows or 128)
        if kernel is None:
            continue
        try:
            found.append(predict(each, resources.get(each.name, Resources()), kernel))
        except ValueError:
            continue
    if not found:
        raise InputError(
            f"{path}: holds no kernel of fastattn with a loop of matrix products; for another kernel, give "
            "--direction and --head-dim"
        )
    return _report(found, output)


def _triton(options: Options, output: Output) -> Iterator[Prediction]:
    for work in options.works():
        with output.waiting(str(work)):
            try:
                yield ahead.predict_work(work, work.built_in(ahead.MODEL_ARCH))
            except Exception as error:  # a compiler may fail in any way: the others are still reported
                output.line(f"{work}: {type(error).__name__}: {error}", good=False)


def _cuda(options: Options, output: Output) -> Iterator[Prediction]:
    for dim in options.head_dims:
        for source in extension.attention_sources(dim):
            forward = "_fwd_" in source.name
            if not any((name == "forward") == forward for name in options.directions):
                continue
            with output.waiting(source.name):
                try:
                    found = extension.predict_source(source)
                except BuildError as error:
                    raise InputError(str(error)) from None
            yield from (each for each in found if each.direction in options.directions)


def _report(found: Sequence[Prediction], output: Output) -> Report:
    if not found:
        raise InputError("no kernel matches the options")
    output.table(*table(found))
    output.line(f"Cycles of a multiprocessor for 64 x 128 scores. {NOTE}")
    return {"source": SOURCE, "arch": ahead.MODEL_ARCH, "kernels": [asdict(each) for each in found]}


@dataclass(frozen=True)
class Ranked:
    """A candidate tile with the model's prediction, or the reason why there is none."""

    tile: Tile
    prediction: Prediction | None
    reason: str | None = None
    l2: float = 0.0  # cycles of the L2 cache for the operands of the loop

    @property
    def cycles(self) -> float:
        """Cycles for 64 x 128 scores: of the loop, or of the L2 cache if that takes longer."""
        return max(self.l2, self.prediction.cycles if self.prediction else 0.0)

    @property
    def bound(self) -> str:
        """The unit that bounds them."""
        assert self.prediction is not None
        if self.l2 > self.prediction.cycles:
            return "L2"
        return f"{self.prediction.bound} {self.prediction.share:.2f}"

    @property
    def order(self) -> tuple[int, float]:
        """The sort key: by cycles, then tiles that spill registers, then those that do not compile."""
        if self.prediction is None:
            return 2, 0.0
        return int(self.prediction.spills > 0), self.cycles

    def entry(self) -> Report:
        """For the report."""
        made = {} if self.prediction is None else asdict(self.prediction) | {"cycles": self.cycles}
        return {"tile": asdict(self.tile), "reason": self.reason, "l2_cycles": self.l2, **made}


def rank(work: Work, candidates: Sequence[Candidate]) -> list[Ranked]:
    """Candidates by predicted cycles, without a GPU."""
    ranked = []
    for candidate in candidates:
        reason, prediction = candidate.reason, None
        if reason is None:
            try:
                prediction = ahead.predict_work(work, candidate.tile)
            except Exception as error:  # a compiler may fail in any way: the candidate is refused
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        ranked.append(Ranked(candidate.tile, prediction, reason, l2_cycles(work, candidate.tile)))
    return sorted(ranked, key=lambda each: each.order)


def l2_cycles(work: Work, tile: Tile) -> float:
    """Cycles of the L2 cache for the two operands that a loop reads per 64 x 128 scores."""
    stationary = tile.block_n if work.kernel == "dkdv" else tile.block_m
    return SCORES / stationary * (work.head_dim + work.value_dim) * work.itemsize / L2_BYTES


def choice(ranked: Sequence[Ranked], built_in: Tile) -> Ranked | None:
    """The first candidate if its predicted gain is above LEAST_GAIN, else the built-in tile."""
    known = {each.tile: each for each in ranked if each.prediction is not None}
    if not known:
        return None
    first = next(iter(known.values()))
    kept = known.get(built_in)
    return first if kept is None or kept.cycles >= LEAST_GAIN * first.cycles else kept


def machine_of(device: str | None) -> Machine:
    """The machine that the model's tiles are stored for: the named device, or this machine's of that architecture."""
    if device is not None and not (device.isprintable() and 0 < len(device.strip()) <= MAX_NAME):
        raise InputError(f"--device: got {device[:20]!r}, needs the name that torch gives the device")
    name = device or tuned.device_name(ahead.MODEL_ARCH)
    if name is None:
        raise InputError(
            f"--store: there is no GPU of compute capability {ahead.MODEL_ARCH / 10} here, or several kinds; "
            "--device names the one that the tiles are for"
        )
    return Machine.of(name, ahead.MODEL_ARCH)


def rank_works(works: Sequence[Work], quick: bool, output: Output, target: Machine | None = None) -> Report:
    """`fastattn bench tune --model`: every work's candidates in the model's order; stored for a target, if any."""
    reason = ahead.why_not()
    if reason is not None:
        raise InputError(f"--model {reason}")
    winners = {} if target is None else stored_winners(target)
    done, kept = [], 0
    for work in works:
        if work.kernel not in ahead.MODELLED or work.itemsize != 2:
            continue
        with output.waiting(str(work)):
            ranked = rank(work, plan.candidates(work, ahead.MODEL_ARCH, quick))
        built_in = work.built_in(ahead.MODEL_ARCH)
        _show(work, ranked, built_in, output)
        done.append({
            "name": str(work), "kernel": work.kernel, "built_in": asdict(built_in),
            "candidates": [each.entry() for each in ranked],
        })  # fmt: skip
        if target is not None:
            kept += not _replace(winners, work.signature(ahead.MODEL_ARCH), ranked, built_in)
            tuned.store(target, winners)
    if not done:
        raise InputError(f"--model: none of the works is one of {', '.join(ahead.MODELLED)} in 16 bits")
    output.line(NOTE)
    report = {"source": SOURCE, "arch": ahead.MODEL_ARCH, "stored": target is not None, "works": done}
    if target is not None:
        forget_lookups()
        output.line(f"tiles are in {target.path}; measured ones stay: {kept}")
        report |= {"path": str(target.path), "machine": asdict(target)}
    return report


def _replace(winners: dict[str, Winner], signature: str, ranked: Sequence[Ranked], built_in: Tile) -> bool:
    """Replace the model's earlier choice; False, without a change, where a measured winner is stored."""
    known = winners.get(signature)
    if known is not None and known.source == tuned.MEASURED:
        return False
    winners.pop(signature, None)
    chosen = choice(ranked, built_in)
    if chosen is not None and chosen.tile != built_in:
        before = next((each.cycles for each in ranked if each.tile == built_in), 0.0)
        winners[signature] = Winner(chosen.tile, _ms(chosen.cycles), _ms(before), SOURCE)
    return True


def _ms(cycles: float) -> float:
    return 1e3 * cycles / machine.CLOCK_HZ


def _show(work: Work, ranked: Sequence[Ranked], built_in: Tile, output: Output) -> None:
    output.heading(f"{work}, by the {SOURCE}")
    output.table(("tile", "cycles", "bound by", "registers", "spills"), [
        (str(each.tile) + (" (built-in)" if each.tile == built_in else ""), f"{each.cycles:.0f}",
         each.bound, str(p.registers), str(p.spills))
        for each in ranked if (p := each.prediction) is not None
    ])  # fmt: skip
