"""Hugging Face transformers: `register()` once, then `attn_implementation="fastattn"`."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.integrations import transformers_compat as compat

compat.check_version()

from fastattn import torch_compat  # noqa: E402
from fastattn.backends import NAMES  # noqa: E402
from fastattn.integrations.structured_mask import StructuredMask  # noqa: E402
from fastattn.integrations.transformers_kinds import wants_eager_masks  # noqa: E402
from fastattn.integrations.transformers_masks import known_makers, structured_mask  # noqa: E402
from fastattn.ops.attention import attention  # noqa: E402

NAME = "fastattn"  # transformers treats names with "flash", "sdpa" or "flex_attention" in them specially

# Arguments that a model passes only to implementations that support them, which this one does not.
REFUSED = {
    "cache": "paged caches are read by transformers' own implementations only",
    "indices": "attention to keys chosen one by one has no kernel",
    "block_indices": "attention to blocks chosen one by one has no kernel",
    "sinks": "sinks that depend on the query have no kernel",
}
_last_packing: tuple[Any, int, Tensor | None] | None = None


def register() -> None:
    """Make "fastattn" an `attn_implementation` of every transformers model, with its masks.

    Then `from_pretrained(..., attn_implementation="fastattn")` or `model.set_attn_implementation("fastattn")`;
    "fastattn_torch" and the like name one backend. Registers the attention function and the mask function; calling it
    again changes nothing.

    Causal masks, sliding windows, padding and packed documents reach the kernel as structure; a mask of any other
    kind becomes a dense one. Packed documents are recognised from `position_ids` that start again at 0 (except in
    compiled code with a cache) or from `cu_seq_lens_q` and `cu_seq_lens_k`. `output_attentions=True` returns the
    weights. A query that sees no key gets 0.

    Raises:
        ImportError: transformers is older than 5.23, or has an interface this was not written for.
    """
    attention_interface, mask_interface = compat.interfaces()
    wanted = {"q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "use_vmap"}
    dense = compat.masking("sdpa_mask")
    if dense is not None and (missing := wanted - inspect.signature(dense).parameters.keys()):
        got = f"transformers {compat.version()}, whose masks know no {', '.join(sorted(missing))}"
        raise ImportError(f"fastattn.integrations.transformers: got {got}; needs 5.23 or newer")
    known_makers()
    for name, (function, mask) in _REGISTERED.items():
        attention_interface.register(name, function)
        mask_interface.register(name, mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | StructuredMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    *,
    backend: str = "auto",
    masks: str = "",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """A transformers attention function: (B, H, L, D) in, (B, L, H, D) and the weights, if they are collected, out.

    Without a mask it is causal if the module is, counted from the first key, as transformers' own "sdpa" is. Eager
    attention's masks (`masks="float"`, or structured ones in a model that needs those) are complete: without one,
    every key is seen.
    """
    if attention_mask is None and (
        masks == "float" or (not masks and wants_eager_masks(getattr(module, "config", None)))
    ):
        is_causal, sliding_window = False, None
    for name in kwargs:
        if name in REFUSED:
            _refuse(kwargs)
    if query.shape[0] == 1 and key.shape[0] != 1:  # learned queries, shared by the batch
        query = query.expand(key.shape[0], -1, -1, -1)
    options = _mask_options(module, query, key, attention_mask, is_causal, sliding_window)
    if "segment_ids" not in options and not isinstance(attention_mask, Tensor):
        options |= _packing_options(query, key, options, kwargs)
    if position_bias is not None:
        options["bias"] = position_bias + options["bias"] if "bias" in options else position_bias
    want_weights = _weights_wanted(kwargs)
    results = attention(
        query, key, value, softcap=softcap, sinks=s_aux, dropout_p=dropout, scale=scaling,
        return_weights=want_weights, backend=backend, **options,
    )  # fmt: skip
    out, weights = results if isinstance(results, tuple) else (results, None)
    return out.transpose(1, 2).contiguous(), weights


def _refuse(kwargs: dict[str, Any]) -> None:
    for name, why in REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: is not supported by fastattn: {why}; use attn_implementation='eager'")


def implementation_name(backend: str = "auto", masks: str = "") -> str:
    """The registered name for a backend and kind of masks: "" as structure, "float" as eager attention's, "bool"."""
    return "_".join([NAME, *([] if backend == "auto" else [backend]), *([f"{masks}_masks"] if masks else [])])


_MASKS: dict[str, Callable[..., Any]] = {
    "": structured_mask,
    "float": compat.dense_float_mask,
    "bool": compat.dense_bool_mask,
}
_REGISTERED: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    implementation_name(backend, masks): (
        partial(attention_forward, backend=backend, masks=masks) if (backend, masks) != ("auto", "")
        else attention_forward,
        function,
    )
    for masks, function in _MASKS.items()
    for backend in ("auto", *NAMES)
}  # fmt: skip


def is_ours(name: str | None) -> bool:
    """Whether an attention implementation is one of those registered here."""
    return name in _REGISTERED


def _mask_options(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | StructuredMask | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> dict[str, Any]:
    """The options of `attention` for what transformers passed as a mask and in other arguments."""
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    if isinstance(mask, StructuredMask):
        alike = mask.shape[2] == 1 and not mask.causal and mask.window is None  # one row for every query
        if (mask.shape[2] != seqlen_q and not alike) or mask.shape[3] != seqlen_k:
            got = f"one for {mask.shape[2]} queries and {mask.shape[3]} keys"
            raise ValueError(f"attention_mask: got {got}, needs {seqlen_q} and {seqlen_k}")
        return mask.options(query.shape[0], seqlen_q)
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        options: dict[str, Any] = {"causal": "top_left" if causal and seqlen_q > 1 else False}
        if sliding_window is not None and seqlen_k > sliding_window:
            options["window"] = (sliding_window - 1, 0 if causal else sliding_window - 1)
        return options
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: got {got}, needs (batch, heads or 1, queries, keys)")
    if mask.dtype == torch.bool:
        return {"mask": mask}
    if mask.is_floating_point():
        return {"bias": mask}
    raise TypeError(f"attention_mask: got {mask.dtype}, needs bool (True = attend) or a float that is added")


def _packing_options(
    query: Tensor, key: Tensor, options: dict[str, Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Segment ids of documents packed into one row, from the caller's other arguments."""
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    ends_q, ends_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if ends_q is not None and ends_k is not None:
        if query.shape[0] != 1:
            raise ValueError(f"cu_seq_lens_q: got it with a batch of {query.shape[0]}, needs one packed row")
        positional = options.get("causal") or options.get("window")
        if positional and not _same(ends_q, ends_k, seqlen_q == seqlen_k):
            raise ValueError(
                "cu_seq_lens_k: differs from cu_seq_lens_q, which causal or local attention needs"
            )
        return {"segment_ids": (_documents(ends_q, seqlen_q), _documents(ends_k, seqlen_k))}
    if "key_lengths" in options:  # positions of padding are arbitrary
        return {}
    positions = kwargs.get("position_ids")
    if (
        options.get("causal")
        and isinstance(positions, Tensor)
        and positions.shape[1:] == (seqlen_k,) == (seqlen_q,)
    ):
        ids = _packing_of(positions)
        if ids is not None:
            return {"segment_ids": ids.expand(query.shape[0], -1)}
    return {}


def _same(ends_q: Tensor, ends_k: Tensor, same_length: bool) -> bool:
    if ends_q is ends_k or not same_length:
        return same_length
    if torch.compiler.is_compiling():  # values cannot be read here; equal lengths are required instead
        return ends_q.shape == ends_k.shape
    return torch.equal(ends_q, ends_k)


def _documents(cu_seqlens: Tensor, length: int) -> Tensor:
    """(1, length): the document of each token, -1 for tokens after the last."""
    tokens = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    ids = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    return torch.where(ids < cu_seqlens.shape[0] - 1, ids, -1)[None].to(torch.int32)


def _packing_of(positions: Tensor) -> Tensor | None:
    """(B or 1, S) document ids if positions start again at 0; cached, because every layer needs them."""
    global _last_packing
    if torch.compiler.is_compiling() or positions.is_inference():
        return None if torch.compiler.is_compiling() else _find_packing(positions)
    version, last = torch_compat.version_of(positions), _last_packing
    if version is None:
        return _find_packing(positions)
    if last is not None and last[0]() is positions and last[1] == version:
        return last[2]
    ids = _find_packing(positions)
    _last_packing = (weakref.ref(positions), version, ids)
    return ids


def _find_packing(positions: Tensor) -> Tensor | None:
    starts = positions[:, 1:] == 0
    if not bool(starts.any()):
        return None
    return nn.functional.pad(starts.cumsum(-1), (1, 0)).to(torch.int32)


def _weights_wanted(kwargs: dict[str, Any]) -> bool:
    """Whether the caller asked for weights, in the call or through transformers' output collector."""
    if kwargs.get("output_attentions"):
        return True
    wanted = compat.outputs_collected()
    return wanted is not None and any("attentions" in name for name in wanted)
