"""Hugging Face transformers: `register()` once, then `attn_implementation="fastattn"`."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

try:
    from transformers import masking_utils
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel
    from transformers.utils import output_capturing
except ImportError as error:
    raise ImportError(
        f"fastattn.integrations.transformers: got transformers {transformers.__version__}, needs 5.23 or newer"
    ) from error

from fastattn.backends import NAMES
from fastattn.integrations.structured_mask import StructuredMask
from fastattn.integrations.transformers_masks import structured_mask
from fastattn.ops.attention import attention

NAME = "fastattn"  # without "flash", "sdpa" or "flex_attention", which transformers reads a meaning into

# What a model hands only to implementations that follow it, and this one does not.
_REFUSED = {
    "cache": "paged caches are read by transformers' own implementations only",
    "indices": "attention to keys chosen one by one has no kernel",
    "block_indices": "attention to blocks chosen one by one has no kernel",
    "sinks": "sinks that depend on the query have no kernel",
}
_PREVIOUS = (
    "_fastattn_previous"  # on a swapped model: (config, its implementation before) of every config in it
)
_last_packing: tuple[Any, int, Tensor | None] | None = None


def register() -> None:
    """Make "fastattn" an `attn_implementation` of every transformers model, with its masks.

    Then `from_pretrained(..., attn_implementation="fastattn")` or `model.set_attn_implementation("fastattn")`;
    "fastattn_torch" and the like name one backend. Registers the attention function and the mask function; calling it
    again changes nothing.

    Causal masks, sliding windows, padding and packed documents reach the kernel as what they are; a mask of any other
    make becomes a dense one. Packed documents are recognised from `position_ids` that start again at 0 (except in
    compiled code with a cache) or from `cu_seq_lens_q` and `cu_seq_lens_k`. `output_attentions=True` returns the
    weights. A query that sees no key gets 0.

    Raises ImportError if transformers has an interface this was not written for.
    """
    wanted = {"q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "use_vmap"}
    if missing := wanted - inspect.signature(masking_utils.sdpa_mask).parameters.keys():
        got = f"transformers {transformers.__version__}, whose masks know no {', '.join(sorted(missing))}"
        raise ImportError(f"fastattn.integrations.transformers: got {got}; needs 5.23 or newer")
    for name, function in _FUNCTIONS.items():
        AttentionInterface.register(name, function)
        masking_utils.AttentionMaskInterface.register(name, structured_mask)


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
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """A transformers attention function: (B, H, L, D) in, (B, L, H, D) and the weights, if anyone collects them, out.

    Without a mask it is causal if the module is, counted from the first key, as transformers' own "sdpa" is.
    """
    for name, why in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: fastattn cannot honour it: {why}; use attn_implementation='eager'")
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


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    NAME: attention_forward,
    **{f"{NAME}_{backend}": partial(attention_forward, backend=backend) for backend in NAMES},
}


def _mask_options(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | StructuredMask | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> dict[str, Any]:
    """The options of `attention` that mean what transformers passed as a mask and beside it."""
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    if isinstance(mask, StructuredMask):
        if mask.shape[2:] != (seqlen_q, seqlen_k):
            got = f"one for {mask.shape[2]} queries and {mask.shape[3]} keys"
            raise ValueError(f"attention_mask: got {got}, needs {seqlen_q} and {seqlen_k}")
        return mask.options(query.shape[0])
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
    """Segment ids of documents packed into one row, from what the caller passed beside the mask."""
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
    if "key_lengths" in options:  # positions of padding mean nothing
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
    if torch.compiler.is_compiling():  # values cannot be looked at; equal lengths have to do
        return ends_q.shape == ends_k.shape
    return torch.equal(ends_q, ends_k)


def _documents(cu_seqlens: Tensor, length: int) -> Tensor:
    """(1, length): the document of each token, -1 for tokens after the last."""
    tokens = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    ids = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    return torch.where(ids < cu_seqlens.shape[0] - 1, ids, -1)[None].to(torch.int32)


def _packing_of(positions: Tensor) -> Tensor | None:
    """(B or 1, S) document ids if positions start again at 0; remembered, as every layer asks the same."""
    global _last_packing
    if torch.compiler.is_compiling() or positions.is_inference():
        return None if torch.compiler.is_compiling() else _find_packing(positions)
    last = _last_packing
    if last is not None and last[0]() is positions and last[1] == positions._version:
        return last[2]
    ids = _find_packing(positions)
    _last_packing = (weakref.ref(positions), positions._version, ids)
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
    collector = output_capturing._active_collector
    wanted = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return wanted is not None and any("attentions" in name for name in wanted)


def swap_models(model: nn.Module, backend: str) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """Set the implementation of every transformers model in a tree: (swapped, already, left), names of modules."""
    register()
    name = NAME if backend == "auto" else f"{NAME}_{backend}"
    before = {path: _implementation(owner) for path, _, owner in _attentions(model)}
    for _, top in top_models(model):
        recorded = {id(config): old for config, old in getattr(top, _PREVIOUS, [])}
        previous = []
        for config in _configs(top):
            current = config._attn_implementation_internal
            ours = id(config) in recorded and current in _FUNCTIONS
            previous.append((config, recorded[id(config)] if ours else current))
        if all(old in _FUNCTIONS for _, old in previous):
            continue  # its user chose fastattn
        setattr(top, _PREVIOUS, previous)
        top.set_attn_implementation(name)
        if all(config._attn_implementation == old for config, old in getattr(top, _PREVIOUS)):
            delattr(top, _PREVIOUS)
    swapped: list[str] = []
    already: list[str] = []
    left: list[tuple[str, str]] = []
    for path, module, owner in _attentions(model):
        if not _calls_interface(module):
            left.append((path, f"{type(module).__name__} computes attention itself"))
        elif _implementation(owner) not in _FUNCTIONS:
            left.append((path, f"{type(owner).__name__} does not let its attention be chosen"))
        else:
            (already if before[path] in _FUNCTIONS else swapped).append(path)
    return swapped, already, left


def restore_models(model: nn.Module) -> list[str]:
    """Undo `swap_models`: the names of the modules that run what they ran before."""
    before = {path: _implementation(owner) for path, _, owner in _attentions(model)}
    for _, top in top_models(model):
        for config, implementation in vars(top).pop(_PREVIOUS, []):
            if config._attn_implementation in _FUNCTIONS:  # its user may have chosen another since
                config._attn_implementation_internal = implementation
    return [path for path, module, owner in _attentions(model) if _implementation(owner) != before[path]]


def _implementation(model: PreTrainedModel) -> str | None:
    return cast("str | None", model.config._attn_implementation)


def top_models(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """The transformers models that lie in no other."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not path.startswith(inside or ("\0",)):
            inside = (*inside, f"{path}." if path else "")
            yield path, module


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every config in a model, each once."""
    found: dict[int, Any] = {}
    queue = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while queue:
        config = queue.pop()
        if id(config) not in found:
            found[id(config)] = config
            queue += [sub for key in config.sub_configs if (sub := getattr(config, key, None)) is not None]
    return list(found.values())


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """(name, module, the model whose config decides) of what computes attention inside transformers models."""
    for prefix, top in top_models(model):
        owners: dict[str, PreTrainedModel] = {}
        for inner, module in top.named_modules():
            parent = inner.rpartition(".")[0]
            owners[inner] = module if isinstance(module, PreTrainedModel) else owners[parent]
            if _calls_interface(module) or _attends_itself(module):
                yield ".".join(filter(None, (prefix, inner))), module, owners[inner]


def _calls_interface(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "get_interface" in code.co_names


def _attends_itself(module: nn.Module) -> bool:
    """Whether a module is called attention, and nothing in it that runs on the interface would be."""
    if "attention" not in type(module).__name__.lower() or isinstance(module, nn.MultiheadAttention):
        return False
    return not any(
        _calls_interface(m) or (m is not module and "attention" in type(m).__name__.lower())
        for m in module.modules()
    )
