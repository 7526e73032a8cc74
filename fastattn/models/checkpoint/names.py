"""Parameters by name: which tensors of a file each one is made of, read strictly and written back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.models.checkpoint.adjoining import adjoined

STRIP_BYTES = 256  # of a row that are written together: four cache lines
_LAYER = re.compile(r"(?<![^.])\d+(?![^.])")  # the first whole number of a dotted name


@dataclass(frozen=True)
class Part:
    """One of our parameters and the tensors of a file that it is made of.

    Args:
        ours: its name, with {i} for the number of a layer: "h.{i}.attn.in_proj_weight".
        theirs: the names in a file, as transformers writes them, with the prefix where they have it and {i} for the
            same number; several are rows of ours, concatenated along dimension 0 in this order.
        transposed: the file keeps (in, out) where we keep (out, in), as GPT-2's Conv1D does.
        sizes: given the config, the rows of ours that each of several has; equal shares without it.
    """

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    sizes: Callable[[Any], Sequence[int]] | None = None

    def rows(self, config: Any, total: int) -> list[int]:
        """How many of our `total` rows each tensor of the file has."""
        if len(self.theirs) == 1:
            return [total]
        if self.sizes is not None:
            return list(self.sizes(config))
        return [total // len(self.theirs)] * len(self.theirs)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model type of transformers (or our own): its config.json and the names of its tensors.

    Args:
        model_type: of config.json.
        architectures: the names in "architectures" that it reads; the first one is written where the caller of
            `save_model` does not say another.
        parts: a row for every parameter and persistent buffer of our model. Rows that a model has no parameter for
            (options, heads) are passed over.
        prefix: "transformer.", "model.", "bert.": a file may have it or lack it.
        other_prefix: what some classes of transformers' have in its place.
        dropped: patterns (fnmatch, without the prefix) of heads and buffers that the family knows and a model may
            not use; a tensor that the model does use is never dropped.
        aliases: old endings of names and what they became: (".gamma", ".weight").
        read_config: config.json -> our config; raises ValueError that begins with the key it cannot honour.
        write_config: our config -> what config.json holds besides model_type, architectures and dtype; raises
            ValueError where the config is none of this family.
        in_transformers: whether transformers reads the format.
    """

    model_type: str
    architectures: tuple[str, ...]
    parts: tuple[Part, ...]
    read_config: Callable[[dict[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    prefix: str = ""
    other_prefix: str = ""
    dropped: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    in_transformers: bool = True

    def plain(self, name: str) -> str:
        """A name of a file without the prefix and with endings of today."""
        first = self.prefix if name.startswith(self.prefix) else self.other_prefix
        name = name.removeprefix(first)
        for old, new in self.aliases:
            if name.endswith(old):
                return name.removesuffix(old) + new
        return name

    def drops(self, name: str) -> bool:
        """Whether a plain name is a head or buffer that a model may leave unused."""
        return any(fnmatchcase(name, pattern) for pattern in self.dropped)


def family_for(config: Any, families: Sequence[Family], name: str = "config") -> Family:
    """The family of config.model_type if its config.json can say all of a config, else the first whose can.

    Raises:
        ValueError: none can; the message begins with `name` and holds what each lacks.
    """
    kind = getattr(config, "model_type", None)
    refusals = []
    for family in sorted(families, key=lambda family: family.model_type != kind):
        try:
            family.write_config(config)
        except ValueError as error:
            refusals.append(f"{family.model_type}: {error}")
        else:
            return family
    raise ValueError(f"{name}: no model type supports this config: {'; '.join(refusals)}")


@dataclass(frozen=True)
class Placed:
    """One of our names with the names of the tensors that it is made of in a file, the layer's number filled in."""

    part: Part
    theirs: tuple[str, ...]


def placed(family: Family, names: Iterator[str] | Sequence[str]) -> dict[str, Placed]:
    """The row of each of our names.

    Raises:
        RuntimeError: a name has none, which is a mistake in the family's rows.
    """
    rows = {part.ours: part for part in family.parts}
    found, without = {}, []
    for name in names:
        part, number = rows.get(name), None
        if part is None and (match := _LAYER.search(name)):
            number = match.group()
            part = rows.get(f"{name[: match.start()]}{{i}}{name[match.end() :]}")
        if part is None:
            without.append(name)
            continue
        theirs = part.theirs
        if number is not None:
            theirs = tuple(t.replace("{i}", number) for t in theirs)
        found[name] = Placed(part, theirs)
    if without:
        raise RuntimeError(f"{family.model_type}: no row of its table names {', '.join(without)}")
    return found


def stored(model: nn.Module) -> dict[str, list[str]]:
    """The contents of a model's checkpoint: the first name of each parameter and persistent buffer -> all its names."""
    keys = model.state_dict(keep_vars=True)
    groups: dict[int, list[str]] = {}
    for name, tensor in keys.items():
        groups.setdefault(id(tensor), []).append(name)
    return {names[0]: names for names in groups.values()}


def to_file(state: dict[str, Tensor], config: Any, family: Family) -> dict[str, Tensor]:
    """Our tensors under a file's names: transposed and cut into rows as views, no copies."""
    out = {}
    for name, place in placed(family, list(state)).items():
        tensor = state[name]
        pieces = tensor.split(place.part.rows(config, tensor.shape[0])) if len(place.theirs) > 1 else [tensor]
        for theirs, piece in zip(place.theirs, pieces, strict=True):
            out[theirs] = piece.t() if place.part.transposed else piece
    return out


def join(pieces: Sequence[Tensor], part: Part, dtype: torch.dtype | None = None) -> Tensor:
    """Our tensor of a file's: a view of one or of several that adjoin, in our order and dtype, else copied row block by
    row block."""
    dtype = dtype if dtype is not None and pieces[0].is_floating_point() else pieces[0].dtype
    pieces = [piece.t() if part.transposed else piece for piece in pieces]
    if len(pieces) == 1 and pieces[0].dtype == dtype and pieces[0].is_contiguous():
        return pieces[0]
    if pieces[0].dtype == dtype and (whole := adjoined(pieces)) is not None:
        return whole
    rows = [piece.shape[0] if piece.dim() else 1 for piece in pieces]
    shape = (sum(rows), *pieces[0].shape[1:]) if pieces[0].dim() else ()
    out = torch.empty(shape, dtype=dtype, device="cpu")
    if len(pieces) == 1:
        _copy(pieces[0], out)
        return out
    for rows_of, piece in zip(out.split(rows), pieces):
        _copy(piece, rows_of)
    return out


def _copy(piece: Tensor, out: Tensor) -> None:
    """Write a piece to `out`. A transposed one goes by strips: torch copies a whole one with one thread, element by
    element, and each strip fills cache lines of a row with several."""
    if piece.dim() != 2 or piece.stride(0) != 1 or piece.is_contiguous():
        out.copy_(piece)
        return
    width = STRIP_BYTES // piece.element_size()
    for strip, columns in zip(out.split(width, 1), piece.split(width, 1)):
        strip.copy_(columns)
