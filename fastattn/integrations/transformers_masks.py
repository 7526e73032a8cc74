"""Conversion of transformers' mask functions to options of a kernel: causality, windows, documents, lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastattn.integrations import transformers_compat as compat
from fastattn.integrations.structured_mask import StructuredMask
from fastattn.integrations.transformers_kinds import wants_eager_masks


@dataclass(frozen=True)
class Pattern:
    """The keys that a mask function keeps: j of query position i with i - left <= j <= i + right in i's document."""

    causal: bool = False
    left: int | None = None
    right: int | None = None
    documents: Tensor | None = None  # (B, S)
    by_document: bool = False  # positions count within documents; differences of positions are unaffected

    def both(self, other: Pattern) -> Pattern | None:
        """The intersection of two patterns, None where no pattern expresses it."""
        if self.documents is not None and other.documents is not None:
            return None
        return Pattern(
            self.causal or other.causal,
            _smaller(self.left, other.left),
            _smaller(self.right, other.right),
            other.documents if self.documents is None else self.documents,
            self.by_document or other.by_document,
        )

    def keeps(self, batch: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The mask at queries q and keys k; their indices are positions within documents where positions are."""
        kept = (k <= q) if self.causal else q >= 0
        if self.left is not None:
            kept = kept & (k >= q - self.left)
        if self.right is not None:
            kept = kept & (k <= q + self.right)
        if self.documents is not None:
            kept = kept & (self.documents[batch, q] == self.documents[batch, k])
        return kept


def structured_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Any = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> StructuredMask | Tensor | None:
    """A transformers mask function: None, a `StructuredMask`, or the dense bool mask that "sdpa" would get.

    Models that need eager attention's masks, which are complete, get those.

    A mask function is recognised by its code object, and its parameters are read from the variables it closes over. One
    that is not recognised, as of another version of transformers, becomes the dense mask.
    """
    if isinstance(attention_mask, StructuredMask):  # made by `generate` from the same information
        return attention_mask
    if wants_eager_masks(kwargs.get("config")):
        return compat.dense_float_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function or _CAUSAL, attention_mask=attention_mask, device=device,
            allow_is_causal_skip=allow_is_causal_skip, allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **kwargs,
        )  # fmt: skip
    pattern = _pattern_of(mask_function)
    shape = (batch_size, 1, q_length, kv_length)
    mask = None
    if pattern is not None and pattern.by_document and pattern.documents is None:
        pattern = None
    if pattern is not None and not isinstance(kv_offset, Tensor):
        mask = _aligned(pattern, shape, q_offset - kv_offset, device)
    if mask is None:
        return compat.dense_bool_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, device=device,
            allow_is_causal_skip=allow_is_causal_skip, allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **kwargs,
        )  # fmt: skip
    if attention_mask is not None:
        _add_padding(mask, compat.padding_of(attention_mask, kv_length, kv_offset))
    skip = pattern is not None and (allow_is_causal_skip if pattern.causal else allow_is_bidirectional_skip)
    # without a mask, attention counts from the first key, and a single query sees everything
    implied = not mask.causal or mask.causal == "top_left"
    hidden = (mask.window, mask.segment_ids, mask.key_lengths, mask.key_mask)
    if skip and implied and all(part is None for part in hidden):
        return None
    return mask


def _pattern_of(function: Callable[..., Any] | None) -> Pattern | None:
    if function is None or function is _CAUSAL:
        return Pattern(causal=True)
    if function is _BIDIRECTIONAL:
        return Pattern()
    if torch.compiler.is_compiling():  # closures cannot be inspected
        return None
    return _read(function, known_makers())


def _read(function: Callable[..., Any], readers: dict[Any, Callable[..., Pattern | None]]) -> Pattern | None:
    reader = readers.get(getattr(function, "__code__", None))
    if reader is None:
        return None
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    return reader(**dict(zip(names, (cell.cell_contents for cell in cells))))


def _read_and(mask_functions: tuple[Callable[..., Any], ...]) -> Pattern | None:
    whole: Pattern | None = Pattern()
    for function in mask_functions:
        part = _pattern_of(function)
        whole = None if part is None or whole is None else whole.both(part)
    return whole


def _read_remapped(mask_function: Callable[..., Any], position_ids: Tensor) -> Pattern | None:
    inner = _pattern_of(mask_function)
    return None if inner is None or inner.documents is not None else replace(inner, by_document=True)


def _known(name: str, pattern: Pattern) -> Any:
    """A mask function of transformers, if it exists and keeps the same keys as the pattern."""
    function = compat.masking(name)
    return function if function is not None and _agree(function, pattern) else None


_IDS = torch.tensor([[0, 0, 0, 1, 1, 1]], device="cpu")
_POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2]], device="cpu")


def _agree(function: Callable[..., Any], pattern: Pattern) -> bool:
    places = torch.arange(6, device="cpu")
    zero, q, k = torch.zeros(1, dtype=torch.int64, device="cpu"), places[:, None], places[None, :]
    try:
        mask = function(zero, zero, q, k)
    except Exception:
        return False
    return torch.equal(mask.expand(6, 6), pattern.keeps(zero, q, k).expand(6, 6))


_CAUSAL = _known("causal_mask_function", Pattern(causal=True))
_BIDIRECTIONAL = _known("bidirectional_mask_function", Pattern())

# Factories of mask functions, the variables their results close over, what these mean, and an example to verify it.
_MAKERS: tuple[tuple[str, set[str], Callable[..., Pattern | None], tuple[Any, ...]], ...] = (
    ("and_masks", {"mask_functions"}, _read_and, (_CAUSAL, _BIDIRECTIONAL)),
    (
        "sliding_window_overlay",
        {"sliding_window"},
        lambda sliding_window: Pattern(left=sliding_window - 1),
        (2,),
    ),
    (
        "sliding_window_bidirectional_overlay",
        {"sliding_window"},
        lambda sliding_window: Pattern(left=sliding_window, right=sliding_window),
        (2,),
    ),
    (
        "packed_sequence_mask_function",
        {"packed_sequence_mask"},
        lambda packed_sequence_mask: Pattern(documents=packed_sequence_mask),
        (_IDS,),
    ),
    (
        "remap_positions_for_packed_sequence",
        {"mask_function", "position_ids"},
        _read_remapped,
        (_CAUSAL, _POSITIONS),
    ),
)


@lru_cache(maxsize=1)
def known_makers() -> dict[Any, Callable[..., Pattern | None]]:
    """Code object -> reader of a mask function, for those whose meaning in the installed version is the known one."""
    readers: dict[Any, Callable[..., Pattern | None]] = {}
    for name, variables, reader, example in _MAKERS:
        make = compat.masking(name)
        try:
            function = make(*example)
            if set(function.__code__.co_freevars) != variables:
                continue
            pattern = _read(function, {**readers, function.__code__: reader})
        except Exception:  # another implementation: its masks become dense
            continue
        if pattern is not None and pattern.by_document:  # is meaningful within documents only
            whole = replace(pattern, documents=_IDS)
            same = _agree(lambda b, h, q, k, f=function: f(b, h, q, k) & (_IDS[b, q] == _IDS[b, k]), whole)
        else:
            same = pattern is not None and _agree(function, pattern)
        if same:
            readers[function.__code__] = reader
    return readers


def _aligned(
    pattern: Pattern, shape: tuple[int, int, int, int], shift: int | Tensor, device: torch.device | str
) -> StructuredMask | None:
    """The pattern for queries at key positions i + shift; None if no option of the kernel expresses it."""
    batch, _, seqlen_q, seqlen_k = shape
    ids = pattern.documents
    pair = None if ids is None else (ids.to(torch.int32), ids.to(torch.int32))
    mask = StructuredMask(shape, device, segment_ids=pair)
    if pair is not None and (seqlen_q != seqlen_k or pair[0].shape[1] != seqlen_q):
        return None
    if not pattern.causal and pattern.left is None and pattern.right is None:
        return mask
    if isinstance(shift, Tensor):
        if seqlen_q == 1 and pattern.causal and (pattern.left is None or seqlen_k <= pattern.left + 1):
            mask.key_lengths = (shift.to(device) + 1).clamp(max=seqlen_k).to(torch.int32).expand(batch)
            return mask
        if compat.is_tracing(shift):
            return None
        shift = int(shift)
    if seqlen_q == 1 and pattern.causal and shift >= seqlen_k:
        return None
    if pattern.left is not None and shift + seqlen_q - 1 > pattern.left:
        mask.window = (pattern.left, -1)
    if pattern.right is not None and seqlen_k - 1 - shift > pattern.right:
        mask.window = (mask.window[0] if mask.window else -1, pattern.right)
    if shift == seqlen_k - seqlen_q:
        mask.causal = pattern.causal and seqlen_q > 1
        if shift == 0 and mask.causal:
            mask.causal = "top_left"
        return mask
    if shift == 0 and pattern.causal:
        mask.causal = "top_left"
        return mask
    if seqlen_q == 1 and pattern.causal and mask.window is None:
        mask.key_lengths = torch.full((batch,), shift + 1, dtype=torch.int32, device=device)
        return mask
    return None


def _add_padding(mask: StructuredMask, padding: Tensor) -> None:
    """Hide padded keys: by key lengths where they lie at the end, else by negative segment ids.

    For one query on a CPU by a bool mask of the keys, which saves each layer the search for ranges of segments.
    """
    batch, _, seqlen_q, seqlen_k = mask.shape
    if not compat.is_tracing(padding):
        # on a CPU a look at values is no synchronisation, and in a step of generation it saves the operations below
        if padding.is_cpu and bool(padding.all()):
            return
        if not (padding.is_cpu and bool(padding[:, -1].all())):  # else there is padding, and not at the end
            lengths = padding.sum(-1, dtype=torch.int32)
            at_end = torch.arange(seqlen_k, device=padding.device) < lengths[:, None]
            everything, lengths_tell = torch.stack((padding.all(), (at_end == padding).all())).tolist()
            if everything:
                return
            if lengths_tell:
                mask.key_lengths = (
                    lengths if mask.key_lengths is None else torch.minimum(lengths, mask.key_lengths)
                )
                return
        if seqlen_q == 1 and mask.segment_ids is None and padding.is_cpu:
            mask.key_mask = padding
            return
    of_query, of_key = mask.segment_ids or (
        torch.zeros(batch, seqlen_q, dtype=torch.int32, device=padding.device),
        torch.zeros(batch, seqlen_k, dtype=torch.int32, device=padding.device),
    )
    mask.segment_ids = (of_query, of_key.masked_fill(~padding, -1))


def _smaller(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)
