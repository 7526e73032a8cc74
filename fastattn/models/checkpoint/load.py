"""Fills a model from a folder: each parameter is in the file or named as new, and all that does not fit is listed."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastattn.generation.options import HONOURED, NOT_COMPUTED, WITH_PROMPT
from fastattn.models.checkpoint.folder import CONFIG, GENERATION, Tensors, open_weights, read_json
from fastattn.models.checkpoint.hub import resolve_folder
from fastattn.models.checkpoint.int8 import is_int8, widened
from fastattn.models.checkpoint.names import Family, Placed, join, placed, stored
from fastattn.models.checkpoint.report import LoadReport
from fastattn.models.checkpoint.save import generation_entries
from fastattn.nn.uninitialised import Uninitialised

# Values of generation's options that old files hold although nobody set them.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "max_length": (20,),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("num_return_sequences", "num_beams", "temperature", "top_p"), (1,)),
    **dict.fromkeys(("repetition_penalty", "length_penalty"), (1,)),
    **dict.fromkeys(("do_sample", "early_stopping"), (False,)),
}

log = logging.getLogger("fastattn")


def load_model(
    cls: Any,
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    new: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A `Pretrained` class's model from a folder or hub repository, in eval mode; see `Pretrained.from_pretrained`."""
    wanted = None if dtype is None else float_dtype(dtype)
    if (
        isinstance(new, str)
        or not isinstance(new, Sequence)
        or not all(isinstance(each, str) for each in new)
    ):
        raise TypeError(f"new: got {new!r}, needs a sequence of patterns of parameters' names")
    folder = resolve_folder(path_or_id)
    entries = read_json(folder / CONFIG)
    small = is_int8(entries)
    if small:
        del entries["quantization_config"]
    try:
        family = family_of(entries, cls.families)
        config = family.read_config(entries)
        generation = generation_of(folder, entries, config) if cls.generates else None
    except ValueError as error:
        raise ValueError(naming_file(error, folder / CONFIG)) from None
    if changes:
        unknown = sorted(changes.keys() - {field.name for field in dataclasses.fields(config) if field.init})
        if unknown:
            raise TypeError(f"{unknown[0]}: {type(config).__name__} has no such field")
        config = dataclasses.replace(config, **changes)
    tensors = widened(open_weights(folder)) if small else open_weights(folder)
    config, family = cls.fitted(config, family, frozenset(map(family.plain, tensors.names())))
    with torch.device("meta"), Uninitialised():
        model = cls(config)
    report = load_weights(
        model, config, family, tensors, new=cls.new_heads, fresh=new, dtype=wanted or dtype_of(entries)
    )
    model.load_report, model.loaded_from, model.generation_config = report, folder, generation
    filled: nn.Module = model.eval()
    if small:
        model.quantize("int8")
    return filled


def generation_of(folder: Path, entries: Mapping[str, Any], config: Any) -> dict[str, Any] | None:
    """What generation_config.json holds; in folders without one, what config.json says of generation, None for nothing.

    Older versions of transformers wrote it there, for an encoder-decoder in the decoder's entries too. transformers
    reads both, the outer ones first.
    """
    if (folder / GENERATION).exists():
        return read_json(folder / GENERATION)
    inner = entries.get("decoder")
    found = {
        name: value
        for part in ((inner if isinstance(inner, Mapping) else {}), entries)
        for name, value in part.items()
        if (name in HONOURED or name in NOT_COMPUTED or name in WITH_PROMPT)
        and value is not None
        and value not in NOT_COMPUTED.get(name, DEFAULTS.get(name, ()))
    }
    return {**generation_entries(config), **found} if found else None


def family_of(entries: dict[str, Any], families: Sequence[Family]) -> Family:
    """The family that config.json's model_type names; ValueError where there is none."""
    kind = entries.get("model_type")
    of_kind = [family for family in families if family.model_type == kind]
    written_as = entries.get("architectures")
    for family in of_kind:  # several formats of one type, by the class that wrote it
        if isinstance(written_as, list) and any(name in family.architectures for name in written_as):
            return family
    if of_kind:
        return of_kind[0]
    names = [repr(family.model_type) for family in families]
    known = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    raise ValueError(f"model_type: got {kind!r}, needs {known}")


def dtype_of(entries: dict[str, Any]) -> torch.dtype | None:
    """The dtype that config.json names, as "dtype" or, in older files, "torch_dtype"; None without one."""
    name = entries.get("dtype", entries.get("torch_dtype"))
    dtype = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def float_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype, or the one of that name.

    Raises:
        TypeError, ValueError: it is none.
    """
    if not isinstance(dtype, (torch.dtype, str)):
        raise TypeError(f"dtype: got {type(dtype).__name__}, needs a torch.dtype or its name")
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype: got {dtype!r}, needs float32, bfloat16, float16 or float64")
    return cast(torch.dtype, found)


def load_weights(
    model: nn.Module,
    config: Any,
    family: Family,
    folder: Path | Tensors,
    *,
    new: Sequence[str] = (),
    fresh: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> LoadReport:
    """Give every parameter and persistent buffer of a model on the meta device its values.

    A parameter that is one tensor of a safetensors file in the same dtype is that part of the file, mapped into
    memory: pages are read when they are used and copied when they are written to; the file never changes.

    Args:
        model: on the meta device; tied parameters stay tied, and the file may hold any of their names.
        config: what the family's `sizes` ask.
        family: its rows.
        folder: a folder with weights, or tensors that were opened already.
        new: patterns (fnmatch) of our names that the file may lack. Those are initialised as transformers does:
            matrices normal(0, config.initializer_range), other weights 1, biases 0.
        fresh: patterns of our names that are initialised so whatever the file holds; each has to name something.
        dtype: of floating-point parameters; None keeps the file's.

    Raises:
        ValueError: tensors are missing, left over, of another shape or not finite; the message lists all of them.
    """
    tensors = folder if isinstance(folder, Tensors) else open_weights(folder)
    plan = _Plan(model, config, family, tensors, new, fresh)
    plan.check(str(tensors.origin))
    for names in plan.missing_new:
        _put(model, names, _initialised(names[0], model, config, dtype))

    def value_of(found: tuple[list[str], Placed, tuple[str, ...]]) -> tuple[Tensor, bool]:
        _, place, sources = found
        value = join([tensors.get(source) for source in sources], place.part, dtype)
        return value, _finite(value)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # new memory costs more than copying into it
        values = list(pool.map(value_of, plan.found))
    for (names, _, _), (value, _) in zip(plan.found, values):
        _put(model, names, value)
    damaged = [names[0] for (names, _, _), (_, finite) in zip(plan.found, values) if not finite]
    if damaged:
        raise ValueError(
            f"pretrained model: the weights of {tensors.origin} are not finite (NaN or infinity) in "
            f"{', '.join(damaged)}"
        )
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise RuntimeError(
            f"{type(model).__name__}: a checkpoint has no values for the buffers {', '.join(left)}; "
            f"compute them where they are used"
        )
    report = LoadReport(tuple(plan.dropped), tuple(names[0] for names in plan.missing_new))
    if report.dropped:
        log.info("%s: not used by %s: %s", tensors.origin, type(model).__name__, ", ".join(report.dropped))
    if report.new:
        log.warning(
            "%s: initialised, not loaded: %s; train %s before use",
            tensors.origin,
            ", ".join(report.new),
            type(model).__name__,
        )
    return report


class _Plan:
    """Which tensors of a file go where, and what does not fit."""

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        family: Family,
        tensors: Tensors,
        new: Sequence[str],
        fresh: Sequence[str],
    ) -> None:
        self.found: list[tuple[list[str], Placed, tuple[str, ...]]] = []
        self.missing_new: list[list[str]] = []
        self.missing: list[str] = []
        self.wrong: list[str] = []
        self.dropped: list[str] = []
        self.state = model.state_dict(keep_vars=True)
        self.config, self.tensors = config, tensors
        by_plain: dict[str, str] = {}
        for name in tensors.names():
            plain = family.plain(name)
            if plain in by_plain:
                self.wrong.append(f"{name} and {by_plain[plain]} are the same tensor")
            by_plain[plain] = name
        groups = stored(model)
        places = placed(family, list(self.state))
        for pattern in fresh:
            if not any(fnmatchcase(name, pattern) for name in self.state):
                raise ValueError(f"new: got {pattern!r}, which names no parameter of {type(model).__name__}")
        used: set[str] = set()
        replaced: set[str] = set()
        for names in groups.values():
            wanted = {family.plain(t): t for n in names for t in places[n].theirs}
            if any(fnmatchcase(name, pattern) for name in names for pattern in fresh):
                self.missing_new.append(names)
                replaced |= wanted.keys()
            else:
                self._place(names, places, wanted, by_plain, new, used)
        self._check_whole_layers(fresh)
        left = [(plain, name) for plain, name in by_plain.items() if plain not in used]
        known = {p for p, name in left if p in replaced or family.drops(p) or family.drops(name)}
        self.dropped = [name for plain, name in left if plain in known]
        self.extra = [name for plain, name in left if plain not in known]

    def _check_whole_layers(self, fresh: Sequence[str]) -> None:
        """A layer of which the file has a part is not new."""
        present = {name.rpartition(".")[0] for names, _, _ in self.found for name in names}
        for names in list(self.missing_new):
            asked = any(fnmatchcase(name, pattern) for name in names for pattern in fresh)
            if not asked and any(name.rpartition(".")[0] in present for name in names):
                self.missing_new.remove(names)
                self.missing.append(names[0])

    def _place(
        self,
        names: list[str],
        places: dict[str, Placed],
        wanted: dict[str, str],
        by_plain: dict[str, str],
        new: Sequence[str],
        used: set[str],
    ) -> None:
        """Find the tensors of one parameter, under any of the names that it has."""
        used.update(plain for plain in wanted if plain in by_plain)
        plains = {theirs: plain for plain, theirs in wanted.items()}
        whole = [n for n in names if all(plains[t] in by_plain for t in places[n].theirs)]
        if not whole:
            partly = any(plain in by_plain for plain in wanted)
            if not partly and any(fnmatchcase(n, pattern) for n in names for pattern in new):
                self.missing_new.append(names)
                return
            place = places[names[0]]
            lacking = [t for t in place.theirs if plains[t] not in by_plain]
            self.missing.append(names[0] if lacking == [names[0]] else f"{names[0]} ({', '.join(lacking)})")
            return
        for name in whole:
            sources = tuple(by_plain[plains[t]] for t in places[name].theirs)
            if not self._fits(name, places[name], sources):
                return
        first = whole[0]
        self.found.append((names, places[first], tuple(by_plain[plains[t]] for t in places[first].theirs)))
        for other in whole[1:]:
            if not self._same(places[first], places[other], by_plain, plains):
                self.wrong.append(f"{other} and {first} differ, which the config ties")

    def _fits(self, name: str, place: Placed, sources: tuple[str, ...]) -> bool:
        """Whether the tensors have the shapes of our parameter and a float dtype where it has one."""
        ours = self.state[name]
        shape = tuple(ours.shape)
        rows = place.part.rows(self.config, shape[0]) if len(sources) > 1 else []
        needed = [(r, *shape[1:]) for r in rows] or [shape]
        fits = True
        for source, need in zip(sources, needed, strict=True):
            need = need[::-1] if place.part.transposed else need
            got = self.tensors.shape(source)
            if got != need:
                self.wrong.append(f"{source} has shape {got}, needs {need}")
                fits = False
            dtype = self.tensors.dtype(source)
            if dtype.is_floating_point != ours.dtype.is_floating_point:
                kind = "a float dtype" if ours.dtype.is_floating_point else str(ours.dtype)
                self.wrong.append(f"they hold {name} in {dtype}, needs {kind}")
                fits = False
        return fits

    def _same(self, one: Placed, other: Placed, by_plain: dict[str, str], plains: dict[str, str]) -> bool:
        a, b = (
            join([self.tensors.get(by_plain[plains[t]]) for t in place.theirs], place.part)
            for place in (one, other)
        )
        return a.data_ptr() == b.data_ptr() or torch.equal(a, b)

    def check(self, origin: str) -> None:
        """Raise ValueError that lists all that does not fit."""
        parts = list(self.wrong)
        if self.missing:
            parts.append(f"missing: {', '.join(self.missing)}")
        if "lm_head.weight" in self.missing:
            parts.append("it has no output head, new=['lm_head.weight'] initialises one")
        if self.extra:
            parts.append(f"left over: {', '.join(self.extra)}")
        if parts:
            raise ValueError(
                f"pretrained model: the weights of {origin} do not fit its config: {'; '.join(parts)}"
            )


def _finite(tensor: Tensor) -> bool:
    """Whether there is no NaN or infinity; their sum shows them, and is looked at closer where it overflowed."""
    if not tensor.is_floating_point() or math.isfinite(tensor.sum().item()):
        return True
    return bool(torch.isfinite(tensor).all())


def _initialised(name: str, model: nn.Module, config: Any, dtype: torch.dtype | None) -> Tensor:
    """Values for a parameter that the file does not have."""
    like = model.state_dict(keep_vars=True)[name]
    out = torch.empty(like.shape, dtype=dtype or like.dtype, device="cpu")
    if name.endswith("bias"):
        return out.zero_()
    if out.dim() < 2:
        return out.fill_(1.0)
    return out.normal_(0.0, getattr(config, "initializer_range", 0.02))


def _put(model: nn.Module, names: Sequence[str], value: Tensor) -> None:
    """Make `value` the parameter or buffer of these names."""
    parameter: nn.Parameter | None = None
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, leaf)
        if isinstance(old, nn.Parameter):
            if parameter is None:
                parameter = nn.Parameter(value, requires_grad=old.requires_grad)
            setattr(module, leaf, parameter)
        else:
            setattr(module, leaf, value)


def naming_file(error: ValueError, path: Path) -> str:
    """The message of an error about a folder's file, which names the file in any case."""
    return str(error) if str(path.parent) in str(error) else f"pretrained model: {path}: {error}"
